"""Ctrl-C (and SIGTERM) in every stage: gone within ten seconds with exit code 130 (143), no process
left, and what was done is kept and can be continued.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

LIMIT_S = 10.0
START_S = 90.0
GOOD = 'type = "function"\npath = "reward.py:length"'


def interrupted(command: Any, number: int = signal.SIGINT) -> None:
    """Interrupt it; check how it ends."""
    code, seconds = command.interrupt(number)
    assert code == 128 + number, command.stderr
    assert seconds < LIMIT_S, command.stderr
    assert command.left() == []
    assert "Traceback" not in command.stderr
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert f"accord: {word}" in command.stderr


def manifest(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "manifest.json").read_text()))


def rows(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a file that may be being written."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def steps(run: Path) -> list[int]:
    return [row["step"] for row in rows(run / "metrics.jsonl") if "time/step" in row]


def event(run: Path, kind: str) -> Callable[[], bool]:
    return lambda: any(row["kind"] == kind for row in rows(run / "events.jsonl"))


# The commands share one handler of signals, one loop of offline training and one way of sampling:
# each of these is stopped once in every run of the tests, the other commands in `make test-long`.
@pytest.mark.parametrize("kind", ["sft", pytest.param("reward-model", marks=pytest.mark.long)])
def test_an_offline_run_is_kept_and_continued(kind: str, world: Any, accord: Any) -> None:
    data = world.demonstrations if kind == "sft" else world.pairs
    config = world.offline_toml(
        accord.folder / "c.toml",
        data,
        "rows_per_step = 8\nepochs = 100000\nmax_steps = 100000\nlr = 1e-5",
    )
    run = accord.folder / "runs" / "r"
    command = accord.start(kind, config)
    command.wait_until(lambda: len(steps(run)) >= 3, START_S, "three steps")
    interrupted(command, signal.SIGTERM if kind == "sft" else signal.SIGINT)
    assert manifest(run)["status"] == "interrupted"
    summary = json.loads((run / "fit.json").read_text())
    done = steps(run)
    assert summary["finished"] is False
    assert summary["steps"] == done[-1] == len(done)
    assert (run / "checkpoints" / f"step-{done[-1]:08d}" / "state.json").is_file()
    if kind == "reward-model":
        return
    again = accord.start(kind, "--resume", run, "--quiet")
    again.wait_until(lambda: len(steps(run)) > len(done), START_S, "a further step")
    interrupted(again)
    assert steps(run) == list(range(1, len(steps(run)) + 1))  # none twice, none left out


def test_training_is_stopped_while_it_starts(world: Any, accord: Any) -> None:
    write_reward(accord.folder)
    config = world.train_toml(accord.folder / "c.toml", GOOD)
    command = accord.start("train", config, "--quiet")
    command.wait_until(lambda: command.used_ray, START_S, "Ray")
    interrupted(command)
    assert manifest(accord.folder / "runs" / "r")["status"] == "interrupted"
    again = accord.start("train", config, "--quiet", "run.name=b", "rollout.engine=vllm")
    again.wait_until(event(accord.folder / "runs" / "b", "cluster"), START_S, "the cluster")
    again.wait_until(
        lambda: any("RolloutActor" in title(pid) for pid, _ in list(again.seen)),
        START_S,
        "a worker",
    )
    interrupted(again)
    assert manifest(accord.folder / "runs" / "b")["status"] == "interrupted"


def test_training_is_stopped_and_continues_at_the_next_step(world: Any, accord: Any) -> None:
    write_reward(accord.folder)
    config = world.train_toml(accord.folder / "c.toml", GOOD)
    run = accord.folder / "runs" / "r"
    command = accord.start("train", config, "batch.steps=100000", "--quiet")
    command.wait_until(lambda: len(steps(run)) >= 2, START_S, "two steps")
    interrupted(command)
    assert manifest(run)["status"] == "interrupted"
    done = steps(run)
    checkpoint = run / "checkpoints" / f"step-{done[-1]:06d}"
    assert json.loads((checkpoint / "run_state.json").read_text())["step"] == done[-1] == len(done)
    hint = f"stopped after step {done[-1]}; to continue: accord train --resume {run}"
    assert hint in command.stderr  # also with --quiet

    last = done[-1] + 2
    again = accord.run("train", "--resume", run, f"batch.steps={last}", timeout_s=120)
    assert again.process.returncode == 0, again.stderr
    assert f"resuming at step {done[-1]} of {last}" in again.stderr
    assert again.left() == []
    assert steps(run) == list(range(1, last + 1))
    first = [row for row in rows(run / "events.jsonl") if row["kind"] == "first_step"]
    assert [row["step"] for row in first] == [1, done[-1] + 1]
    assert f"first step done {first[-1]['seconds']:.1f} s after" in again.stderr
    started = {row["part"] for row in rows(run / "events.jsonl") if row["kind"] == "started"}
    assert {"Ray", "learner", "reward service", "worker-0", "first batch"} <= started
    assert manifest(run)["status"] == "finished"
    import torch
    from transformers import AutoModelForCausalLM

    after = AutoModelForCausalLM.from_pretrained(run / "policy").state_dict()
    before = AutoModelForCausalLM.from_pretrained(world.policy).state_dict()
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[name], before[name]) for name in after)


def test_sampling_is_stopped(world: Any, accord: Any) -> None:
    words = ("generate", world.policy, world.prompts, "--samples", "4096", "--max-tokens", "256")
    command = accord.start(*words, "--quiet")
    command.wait_until(
        lambda: any(name(pid).startswith("accord:worker") for pid, _ in list(command.seen)),
        START_S,
        "a worker",
    )
    assert not command.used_ray
    interrupted(command)
    assert not (accord.folder / "answers.jsonl").exists()


@pytest.mark.long
def test_an_evaluation_is_stopped(world: Any, accord: Any) -> None:
    write_reward(accord.folder)
    (accord.folder / "e.toml").write_text(
        f'samples = 4096\n[run]\ndir = "runs"\nname = "e"\n[policy]\npath = "{world.policy}"\n'
        f'[baseline]\npath = "{world.policy}"\n[data]\nprompts = "{world.prompts}"\n'
        '[rollout]\nengine = "transformers"\nmax_tokens = 256\n'
        f"[[judge.sources]]\n{GOOD}\n"
    )
    command = accord.start("evaluate", "e.toml", "--quiet")
    command.wait_until(
        lambda: any(name(pid).startswith("accord:worker") for pid, _ in list(command.seen)),
        START_S,
        "a worker",
    )
    interrupted(command, signal.SIGTERM)
    assert manifest(accord.folder / "runs" / "e")["status"] == "interrupted"


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)]
)
def test_a_reward_service_is_stopped(number: int, world: Any, accord: Any) -> None:
    (accord.folder / "c.toml").write_text(
        f'[[reward.sources]]\ntype = "model"\npath = "{world.reward_model}"\n'
    )
    command = accord.start("serve-reward", "c.toml")
    command.wait_until(lambda: command.stdout.startswith("127.0.0.1:"), START_S, "its address")
    interrupted(command, number)


@pytest.mark.long
def test_the_quickstart_is_stopped_while_it_samples(accord: Any) -> None:
    command = accord.start("quickstart", "--scale", "0.05", "--name", "q")
    command.wait_until(lambda: "completions for each of" in command.stderr, START_S, "its sampling")
    command.wait_until(
        lambda: any("RolloutActor" in title(pid) for pid, _ in list(command.seen)),
        START_S,
        "a worker",
    )
    interrupted(command)
    run = accord.folder / "runs" / "q"
    assert manifest(run)["status"] == "interrupted"
    assert manifest(run / "sft")["status"] == "finished"
    assert (run / "sft" / "policy" / "model.safetensors").is_file()


def write_reward(folder: Path) -> None:
    (folder / "reward.py").write_text(
        "def length(completions, **columns):\n    return [float(len(c[-1]['content'])) for c in "
        "completions]\n"
    )


def name(pid: int) -> str:
    """What a worker without Ray calls its process."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace")
    except OSError:
        return ""


def title(pid: int) -> str:
    """What a process calls itself now; Ray's workers name what they do."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""
