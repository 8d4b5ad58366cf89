"""`accord train` whose weights travel in many buckets: a worker and the learner are killed in the
middle of a push. An update that was not whole is nobody's; the run goes on, and its versions are
exact."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cluster.contracts.crash_points import VARIABLE
from cluster.runs.rows import Follower
from learner.rl.step_record import read_record

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1200)]

# In each worker's process: the first worker that is in the middle of a push after the file `kill`
# was written ends itself by SIGKILL.
PLUGIN = """
import os
from pathlib import Path

FOLDER = Path("{folder}")

if b"RolloutActor" in Path("/proc/self/cmdline").read_bytes():
    from cluster.weights import intake

    fetch = intake.Incoming._next

    def told():
        try:
            (FOLDER / "kill").unlink()  # one of the workers succeeds
        except FileNotFoundError:
            return False
        return True

    def next_bucket(self, coming, number, deadline):
        with (FOLDER / f"buckets-{{os.getpid()}}").open("a") as file:
            file.write(f"{{self._manifest.version}} {{number}} {{self._manifest.buckets}}\\n")
        if number == self._manifest.buckets // 2 and told():
            (FOLDER / "killed").write_text(f"{{os.getpid()}} {{self._manifest.version}}")
            os.kill(os.getpid(), 9)
        return fetch(self, coming, number, deadline)

    intake.Incoming._next = next_bucket
"""
STEPS = 24
LONG_S = 500


def rows(file: Path) -> list[dict[str, Any]]:
    return Follower(file, 1 << 30).new_rows()


@pytest.mark.parametrize(("processes", "transport"), [(2, "object_store"), (1, "disk")])
def test_a_push_that_is_cut_short_costs_nothing_but_itself(
    world: Any, accord: Any, monkeypatch: pytest.MonkeyPatch, processes: int, transport: str
) -> None:
    pytest.importorskip("vllm", reason="vLLM has no build for this machine")
    folder = accord.folder
    (folder / "cut.py").write_text(PLUGIN.format(folder=folder))
    sharding = 'sharding = "fsdp2"\n' if processes > 1 else ""
    config = world.train_toml(
        folder / "c.toml",
        'type = "rules"\nmax_words = 5',
        batch=f"prompts_per_step = 4\nsamples_per_prompt = 2\nsteps = {STEPS}",
        rollout='engine = "vllm"\nworkers = 2\nmax_tokens = 16\nmax_restarts = 10',
        staleness="bound = 2",
        learner=f"processes = {processes}\n{sharding}lr = 1e-3\ncpus = 0.5",
        weights=f'transport = "{transport}"\nbucket_mb = 0.02',
        checkpoint="every = 6",
        cluster="object_store_mb = 120",
        logging="ray_metrics = false\ntensorboard = false",
    )
    config.write_text(f'plugins = ["{folder}/cut.py"]\n{config.read_text()}')
    # The learner's first process ends in the middle of publishing, at its bucket of this number.
    monkeypatch.setenv(VARIABLE, "learner.mid_publish:200")
    command = accord.start("train", config)
    run = folder / "runs" / "r"

    def until_step(wanted: int) -> None:
        command.wait_until(
            lambda: max((row["step"] for row in rows(run / "metrics.jsonl")), default=0) >= wanted,
            LONG_S,
            f"step {wanted}",
        )

    until_step(2)
    (folder / "kill").touch()
    command.wait_until((folder / "killed").exists, LONG_S, "a worker to be killed in a push")
    assert command.wait(LONG_S) == 0, command.stderr

    killed, in_version = (folder / "killed").read_text().split()
    fetched = [
        tuple(map(int, line.split()))
        for line in (folder / f"buckets-{killed}").read_text().splitlines()
    ]
    version, bucket, buckets = fetched[-1]
    assert version == int(in_version) >= 1
    assert 0 < bucket < buckets - 1
    assert buckets > 10

    audit = accord.run("audit", run, "--json")
    assert audit.process.returncode == 0, audit.stdout + audit.stderr
    books = json.loads(audit.stdout)
    assert (books["violations"], books["trained"]) == ([], STEPS * 4)
    happened = rows(run / "events.jsonl")
    lost = [event for event in happened if event["kind"] == "worker_lost"]
    assert len(lost) == 1, lost
    # Trained again on what was saved, the steps gave the weights that had been published, bit for
    # bit; else the learner would have gone back to its checkpoint.
    replaced = [event for event in happened if event["kind"] == "learner_replaced"]
    assert [bool(event["again"]) for event in replaced] == [True], happened
    assert not [event for event in happened if event["kind"] == "rolled_back"]
    every = sorted((run / "rollouts").glob("step-*.parquet"))
    records = [read_record(pq.read_schema(file)) for file in every]
    digests = [(record.before, record.after) for record in records if record is not None]
    assert len(digests) == STEPS
    assert all(one[1] == other[0] for one, other in itertools.pairwise(digests))
    if processes == 1:
        replay = accord.run("replay", run, "--verify", timeout_s=200)
        assert replay.process.returncode == 0, replay.stderr
        assert "the weights after every step and the policy equal the run's" in replay.stdout
