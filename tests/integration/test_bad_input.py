"""Every mistake a user can make ends with exit code 2 and one message that says what, where and how
to mend it; no traceback, no half-made run, no process left. What can be known before Ray starts is
said before Ray starts.
"""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

GOOD_FUNCTION = "def good(completions, **columns):\n    return [1.0] * len(completions)\n"


@dataclass(frozen=True)
class Case:
    """`words(world, folder)`: the command line. `says`: all must be in the message. `keeps`: the
    run directories that lie there afterwards, by name."""

    words: Callable[[Any, Path], list[object]]
    says: tuple[str, ...]
    keeps: tuple[str, ...] = ()


def train(
    world: Any, folder: Path, *overrides: str, reward: str = "", **sections: str
) -> list[Any]:
    (folder / "good.py").write_text(GOOD_FUNCTION)
    source = reward or 'type = "function"\npath = "good.py:good"'
    return ["train", world.train_toml(folder / "c.toml", source, **sections), *overrides]


def rows(folder: Path, *lines: str) -> str:
    (folder / "p.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return f"data.prompts={folder / 'p.jsonl'}"


def tampered(world: Any, folder: Path, change: Callable[[Path], None]) -> str:
    """A reward source whose directory was changed after training."""
    copy = folder / "rm"
    shutil.copytree(world.reward_model, copy)
    change(copy)
    return f'type = "model"\npath = "{copy}"'


def new_template(directory: Path) -> None:
    file = directory / "chat_template.jinja"
    file.write_text(file.read_text() + " ")


def new_vocabulary(directory: Path) -> None:
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content))


def no_model(folder: Path) -> str:
    (folder / "empty").mkdir()
    return f"model.path={folder / 'empty'}"


def existing_run(world: Any, folder: Path) -> list[Any]:
    (folder / "runs" / "r").mkdir(parents=True)
    return train(world, folder)


def made_run(world: Any, folder: Path, *, status: str, step: int) -> Path:
    """A training run as its command leaves it, with a checkpoint after `step` steps."""
    from cluster.contracts.config.file import load_config
    from cluster.contracts.config.train import TrainConfig
    from cluster.contracts.records import RunState
    from cluster.runs.run import Run

    config = load_config(TrainConfig, str(train(world, folder)[1]))
    run = Run.create(str(folder / "runs"), "r", "train", config)
    state = RunState(
        step=step, version=step, next_group=2 * step, prompts_total=16, dropped=(), elapsed_s=1.0
    )
    run.commit_checkpoint(run.begin_checkpoint(step), state, 2)
    run.update_manifest(status=status)
    return run.path


def resume(world: Any, folder: Path, step: int, *overrides: str) -> list[Any]:
    status = "finished" if step == 3 else "interrupted"
    return ["train", "--resume", made_run(world, folder, status=status, step=step), *overrides]


def evaluate(world: Any, folder: Path) -> list[Any]:
    (folder / "good.py").write_text(GOOD_FUNCTION)
    (folder / "e.toml").write_text(
        f'[policy]\npath = "{folder}/gone/policy"\n[baseline]\npath = "{world.policy}"\n'
        f'[data]\nprompts = "{world.prompts}"\n'
        '[[judge.sources]]\ntype = "function"\npath = "good.py:good"\n'
    )
    return ["evaluate", folder / "e.toml"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


TAKEN = socket.socket()


def taken_port() -> int:
    TAKEN.bind(("127.0.0.1", 0))
    TAKEN.listen(1)
    return int(TAKEN.getsockname()[1])


LONG = json.dumps({"prompt": "battery " * 900})
GOOD_ROW = json.dumps({"prompt": [{"role": "user", "content": "how long"}]})

CASES = {
    "no model directory": Case(
        lambda w, d: train(w, d, f"model.path={d}/gone/m"),
        ("gone/m", "no such model directory", "model.path"),
    ),
    "directory without a model": Case(
        lambda w, d: train(w, d, no_model(d)), ("empty", "holds no model", "config.json")
    ),
    "sft without a model": Case(
        lambda w, d: [
            "sft",
            w.offline_toml(d / "s.toml", w.demonstrations),
            f"model.path={d}/gone/m",
            "--quiet",
        ],
        ("gone/m", "no such model directory"),
    ),
    "template of the reward model": Case(
        lambda w, d: train(w, d, reward=tampered(w, d, new_template)),
        ("/rm", "tokenizer or chat template", "trained with"),
    ),
    "tokenizer of the reward model": Case(
        lambda w, d: train(w, d, reward=tampered(w, d, new_vocabulary)),
        ("/rm", "tokenizer or chat template", "trained with"),
    ),
    "misspelt key in the file": Case(
        lambda w, d: train(w, d, rollout="max_token = 3"),
        ("c.toml", "unknown key rollout.max_token", "did you mean rollout.max_tokens?"),
    ),
    "misspelt key on the command line": Case(
        lambda w, d: train(w, d, "algoritm.gamma=0.9"),
        ("unknown key algoritm", "did you mean algorithm?"),
    ),
    "empty prompts file": Case(lambda w, d: train(w, d, rows(d)), ("p.jsonl", "no ")),
    "row without a prompt": Case(
        lambda w, d: train(w, d, rows(d, GOOD_ROW, '{"question": "x"}')),
        ("p.jsonl", "line 2", "no prompt", "question", "data.prompt_key"),
    ),
    "prompt over the context": Case(
        lambda w, d: train(w, d, rows(d, GOOD_ROW, LONG), "data.max_prompt_tokens=4000"),
        ("p.jsonl", "line 2", "the model's context leaves 506"),
    ),
    "row that is not JSON": Case(
        lambda w, d: train(w, d, rows(d, GOOD_ROW, "{broken")),
        ("p.jsonl", "line 2", "not JSON"),
    ),
    "no reward file": Case(
        lambda w, d: train(w, d, reward='type = "function"\npath = "absent.py:f"'),
        ("absent.py", "there is no file", "reward source 'function'"),
    ),
    "no reward function": Case(
        lambda w, d: train(w, d, reward='type = "function"\npath = "good.py:bad"'),
        ("good.py:bad", "no function 'bad'", "it has: good"),
    ),
    "nobody at the reward address": Case(
        lambda w, d: train(w, d, f"reward.address=127.0.0.1:{free_port()}"),
        ("nobody listens at 127.0.0.1:", "accord serve-reward"),
    ),
    "port in use": Case(
        lambda w, d: ["serve-reward", train(w, d)[1], "--port", taken_port()],
        ("127.0.0.1:", "port is in use", "choose another port"),
    ),
    "run directory exists": Case(
        existing_run, ("runs/r", "the run directory exists", "run.name"), keeps=("r",)
    ),
    "resume of no run": Case(
        lambda w, d: ["train", "--resume", d], ("is not a run directory", "manifest.json")
    ),
    "resume of another command's run": Case(
        lambda w, d: ["sft", "--resume", made_run(w, d, status="interrupted", step=1)],
        ("runs/r", "is a run of `accord train`, not of `accord sft`"),
        keeps=("r",),
    ),
    "resume of a finished run": Case(
        lambda w, d: resume(w, d, 3),
        ("runs/r", "has done its 3 steps", "batch.steps=6"),
        keeps=("r",),
    ),
    "resume with changed settings": Case(
        lambda w, d: resume(w, d, 1, "algorithm.gamma=0.5", "batch.steps=9"),
        ("runs/r", "cannot change on resume: algorithm.gamma\n", "start a new run"),
        keeps=("r",),
    ),
    "no preference store": Case(
        lambda w, d: ["preferences", "stats", d / "none.db"],
        ("none.db", "no such preference store"),
    ),
    "evaluate without a policy": Case(evaluate, ("gone/policy", "no such model directory")),
    "unknown command": Case(lambda w, d: ["trian"], ("trian", "No such command")),
    "unknown option": Case(lambda w, d: ["train", "--stpes", "3"], ("--stpes", "No such option")),
}


@pytest.fixture(scope="module")
def outcomes(
    world: Any, command_lines: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """Every case's command, two at a time."""

    def run(name: str) -> tuple[str, Any]:
        folder = tmp_path_factory.mktemp("case")
        line = command_lines(folder)
        try:
            return name, line.run(*CASES[name].words(world, folder))
        finally:
            line.close()

    with closing_port(), ThreadPoolExecutor(2) as pool:
        yield dict(pool.map(run, CASES))


@contextmanager
def closing_port() -> Iterator[None]:
    try:
        yield
    finally:
        TAKEN.close()


def check_message(command: Any, says: tuple[str, ...]) -> None:
    assert command.process.returncode == 2, command.stderr
    assert "Traceback" not in command.stderr
    assert "ray::" not in command.stderr
    assert command.stderr.count("accord: error: ") <= 1
    for part in says:
        assert part in command.stderr, command.stderr


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_told_before_anything_starts(name: str, outcomes: dict[str, Any]) -> None:
    case, command = CASES[name], outcomes[name]
    check_message(command, case.says)
    if not name.startswith("unknown"):
        assert command.stderr.startswith("accord: error: "), command.stderr
        assert "\n  fix: " in command.stderr
    assert command.stdout == ""
    assert not command.used_ray
    assert command.left() == []
    runs = command.out.parent / "runs"
    assert tuple(p.name for p in runs.glob("*")) == case.keeps


# Good when it is tried before the start; then it notes when it was called, so that the way from
# there to the end can be timed.
NOTE = (
    "from pathlib import Path\n\n"
    "def tried(completions):\n"
    "    if completions[0][0]['content'] == 'A trial completion.':\n"
    "        return True\n"
    "    Path(__file__).with_name('called').mkdir(exist_ok=True)\n"
    "    return False\n\n"
    "def broken(completions, **columns):\n"
    "    if tried(completions):\n"
    "        return [1.0, 1.0]\n"
)

FUNCTIONS = {
    "raises": (
        "    known = {}\n    return [known['x'] for _ in completions]\n",
        ("reward.py:broken", "KeyError: 'x'", "reward.py:13 `return [known['x']"),
    ),
    "returns too few": (
        "    return [1.0]\n",
        ("reward.py:broken", "returned 1 rewards for "),
    ),
    "returns nan": (
        "    return [float('nan')] * len(completions)\n",
        ("reward.py:broken", "returned nan for ", "one finite number"),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_reward_function_that_fails_ends_the_run(name: str, world: Any, accord: Any) -> None:
    code, says = FUNCTIONS[name]
    (accord.folder / "reward.py").write_text(NOTE + code)
    config = world.train_toml(
        accord.folder / "c.toml", 'type = "function"\npath = "reward.py:broken"'
    )
    command = accord.run("train", config, "--quiet")
    assert time.time() - (accord.folder / "called").stat().st_mtime < 10.0
    check_message(command, says)
    assert command.stderr.startswith("accord: error: ")
    assert command.used_ray
    assert command.left() == []
    assert list((accord.folder / "runs").iterdir()) == []  # nothing had been learnt
