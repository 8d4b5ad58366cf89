"""`accord train` with the real parts: vLLM in Ray actors, scores over gRPC, verified weights."""

from __future__ import annotations

import json
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from cluster.contracts.config.reward import RewardConfig, RulesSource
from cluster.contracts.rollout_table import from_table
from cluster.contracts.step_parts import unaccounted
from cluster.runs.audit import audit_run
from reward_service.access import Access
from reward_service.server import RunningServer, serve
from tests.integration.listening import STARTED, listeners_of, rows_of

pytestmark = pytest.mark.slow

SECRET = "never-to-be-seen"
MODEL_REWARD = 'type = "model"\npath = "{}"'


def rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def finished(command: Any) -> None:
    assert command.wait(240) == 0, command.stderr
    assert command.left() == []


def metrics_page(run: Path) -> str:
    """What Prometheus would read from Ray, or nothing while it is not there."""
    ports = [e["metrics_port"] for e in rows(run / "events.jsonl") if e["kind"] == "cluster"]
    if not ports:
        return ""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{ports[0]}/metrics", timeout=2) as page:
            return str(page.read(), "utf-8")
    except OSError:
        return ""


def every_socket_is_listed(pid: int) -> None:
    """Of the command, its roles and Ray, against the table of SECURITY.md."""
    rows_known = rows_of(Path("SECURITY.md").read_text(encoding="utf-8"), STARTED)
    found = listeners_of(pid)
    assert {"gcs_server", "raylet", "ray::_RewardActor"} <= {one.process for one in found}
    unknown = [one for one in found if not any(row.allows(one) for row in rows_known)]
    assert unknown == []


def test_engine_and_learner_agree_after_every_update(world: Any, accord: Any) -> None:
    """Synchronous, so that every token is of the version the learner has when it looks at it."""
    config = world.train_toml(
        accord.folder / "c.toml",
        MODEL_REWARD.format(world.reward_model),
        batch="prompts_per_step = 4\nsamples_per_prompt = 2\nsteps = 6",
        rollout='engine = "vllm"\nmax_tokens = 12\ntemperature = 0.8',
        staleness="bound = 0",
        learner="lr = 1e-2\nminibatches = 2",
        logging="tensorboard = true",
    )
    command = accord.start("train", config)
    finished(command)
    run = accord.folder / "runs" / "r"
    measured = rows(run / "metrics.jsonl")
    assert [row["step"] for row in measured] == [1, 2, 3, 4, 5, 6]
    assert max(row["sampling/logp_diff_max"] for row in measured) <= 1e-4
    # The first line may be written before the first update has gone round.
    assert max(row.get("weight_sync/canary_logp_diff", 0.0) for row in measured) <= 1e-4
    assert all(row["async/staleness_max"] == 0 for row in measured)
    assert max(abs(unaccounted(row)) for row in measured) < 0.01
    assert measured[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert abs(measured[-1]["objective/kl"]) > 1e-3  # the weights did move

    groups = [
        group
        for file in sorted((run / "rollouts").glob("*.parquet"))
        for group in from_table(pq.read_table(file))
    ]
    assert [group.group_id for group in groups] == list(range(24))
    for group in groups:
        for rollout, score in group.samples:
            assert {s.version for s in rollout.completion.versions} == {group.group_id // 4}
            assert score.scorer_version

    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(run / "policy")
    assert list((run / "tensorboard").glob("events*"))
    assert (run / "report.html").stat().st_size > 10_000
    assert json.loads((run / "manifest.json").read_text())["status"] == "finished"


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningServer]:
    """Another service that scores for the run and asks for a token; secrets wherever they may be
    given."""
    for name in ("HF_TOKEN", "WANDB_API_KEY", "ACCORD_REWARD_TOKEN", "ACCORD_TEST_TOKEN"):
        monkeypatch.setenv(name, f"{SECRET}-{name}")
    access = Access(token=f"{SECRET}-ACCORD_TEST_TOKEN")
    with serve(RewardConfig(sources=[RulesSource()]), access=access) as running:
        yield running


def content(path: Path) -> bytes:
    """Nothing of a file that was being written, and has its final name by now."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def no_secret_is_told(run: Path, pid: int) -> None:
    """Not in the run directory, on a command line, or in what Ray keeps and shows of a run."""
    process = psutil.Process(pid)
    lines = [" ".join(p.cmdline()) for p in (process, *process.children(recursive=True))]
    session = next(e["session"] for e in rows(run / "events.jsonl") if e["kind"] == "cluster")
    kept = Path(tempfile.gettempdir()) / "ray" / session
    assert (kept / "logs").is_dir()
    files = [*run.rglob("*"), *kept.rglob("*")]
    read = [path for path in files if path.is_file() and not path.is_symlink()]
    told = [str(path) for path in read if SECRET.encode() in content(path)]
    assert (told, [line for line in lines if SECRET in line]) == ([], [])


def test_asynchronous_run_is_scaled_and_seen_while_it_goes_on(
    world: Any, accord: Any, service: RunningServer
) -> None:
    config = world.train_toml(
        accord.folder / "c.toml",
        'type = "rules"\nmax_words = 5\n[[reward.sources]]\ntype = "grpc"\n'
        f'address = "{service.address}"\ntoken_env = "ACCORD_TEST_TOKEN"',
        batch="prompts_per_step = 4\nsamples_per_prompt = 4\nsteps = 100000",
        rollout='engine = "vllm"\nmax_tokens = 16\nkv_on_swap = "keep"',
        staleness='bound = 2\ncorrection = "token-tis"',
        algorithm='advantage = "grpo"',
        logging="tensorboard = false",
        cluster="object_store_mb = 80\ndashboard = true",
    )
    run = accord.folder / "runs" / "r"
    command = accord.start("train", config)
    command.wait_until(lambda: len(rows(run / "metrics.jsonl")) >= 3, 120, "three steps")
    scaled = accord.run("scale", run, 2)
    assert scaled.wait(90) == 0, scaled.stderr
    command.wait_until(
        lambda: any(row.get("workers/alive") == 2 for row in rows(run / "metrics.jsonl")[-3:]),
        120,
        "the second worker",
    )
    assert accord.run("scale", run, 1).wait(90) == 0
    command.wait_until(
        lambda: any(e["kind"] == "worker_left" for e in rows(run / "events.jsonl")),
        60,
        "the second worker to leave",
    )
    command.wait_until(
        lambda: "ray_accord_perf_throughput" in metrics_page(run), 60, "Ray's metrics"
    )
    every_socket_is_listed(command.process.pid)
    no_secret_is_told(run, command.process.pid)
    told = accord.run("status", run, "--json")
    assert json.loads(told.stdout)["status"] == "running"
    code, seconds = command.interrupt()
    assert (code, seconds < 10) == (130, True), command.stderr
    assert command.left() == []

    measured = rows(run / "metrics.jsonl")
    assert max(row["async/staleness_max"] for row in measured) <= 2
    assert max(row.get("weight_sync/canary_logp_diff", 0.0) for row in measured) <= 1e-4
    trained = [
        group.group_id
        for file in sorted((run / "rollouts").glob("*.parquet"))
        for group in from_table(pq.read_table(file))
    ]
    assert trained == list(range(len(trained)))  # nothing lost, nothing twice, in order
    audit = audit_run(str(run))
    assert audit.violations == []
    assert audit.trained == len(trained) == audit.steps * 4
