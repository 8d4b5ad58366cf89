"""The command line as a user meets it: a tiny world on disk, and commands run as processes.

A command gets a session of its own. Every process it starts is noted while it runs, so that a test
can ask afterwards whether one of them is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

WORDS = ("battery", "screen", "hours", "broken", "great", "how", "long", "does", "it", "last")
STARTED_BY_RAY = ("raylet", "gcs_server", "ray::")


@pytest.fixture(scope="session")
def measured_by(
    repo_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """What a script of this folder writes into results.json of the folder it is given: an engine is
    best measured in a process of its own."""

    def run(script: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("measured")
        result = subprocess.run(
            [sys.executable, str(repo_root / "tests" / "integration" / script), str(folder)],
            cwd=repo_root,
            env={**os.environ, "PYTHONPATH": str(repo_root)},
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
        measured: dict[str, Any] = json.loads((folder / "results.json").read_text("utf-8"))
        return measured

    return run


@dataclass(frozen=True)
class World:
    """Paths of what the commands are given; read only."""

    folder: Path
    policy: Path
    reward_model: Path
    prompts: Path
    pairs: Path
    demonstrations: Path

    def train_toml(self, target: Path, reward: str, **sections: str) -> Path:
        """A config of `accord train`, small enough for seconds; `sections` add to or replace."""
        tables = {
            "run": f'dir = "{target.parent}/runs"\nname = "r"',
            "model": f'path = "{self.policy}"',
            "data": f'prompts = "{self.prompts}"',
            "batch": "prompts_per_step = 2\nsamples_per_prompt = 2\nsteps = 3",
            "rollout": 'engine = "transformers"\nmax_tokens = 6',
            "cluster": "object_store_mb = 80",
            "logging": "ray_metrics = false",
            **sections,
        }
        for name in ("model", "rollout"):
            tables[name] = _in_float32(tables[name])
        text = "\n".join(f"[{name}]\n{body}\n" for name, body in tables.items())
        target.write_text(f"{text}\n[[reward.sources]]\n{reward}\n", encoding="utf-8")
        return target

    def offline_toml(self, target: Path, data: Path, fit: str = "", **sections: str) -> Path:
        """A config of `accord sft` or `accord reward-model`."""
        tables = {
            "run": f'dir = "{target.parent}/runs"\nname = "r"',
            "model": f'path = "{self.policy}"',
            "data": f'path = "{data}"',
            "fit": f"threads = 1\n{fit}",
            "logging": "ray_metrics = false\ntensorboard = false",
            **sections,
        }
        tables["model"] = _in_float32(tables["model"])
        text = "\n".join(f"[{name}]\n{body}\n" for name, body in tables.items())
        target.write_text(text, encoding="utf-8")
        return target


def _in_float32(section: str) -> str:
    """So that what a test expects does not depend on what this machine multiplies faster."""
    return section if "dtype" in section else f'{section}\ndtype = "float32"'


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _question(number: int) -> list[dict[str, str]]:
    words = " ".join(WORDS[(number + i) % len(WORDS)] for i in range(4))
    return [{"role": "user", "content": f"{words} {number}"}]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A random qwen2 of hidden 64 (vLLM on CPU wants head_dim 32), a reward model of two steps."""
    from cluster.contracts.config.base import ModelConfig
    from cluster.contracts.config.offline import FitConfig, PairsConfig, RewardModelConfig
    from learner.models.tiny import fresh_model, train_tokenizer
    from learner.offline.reward import train_reward_model

    folder = tmp_path_factory.mktemp("world")
    tokenizer = train_tokenizer([" ".join(WORDS)] * 3, 320, folder / "policy")
    fresh_model(tokenizer, folder / "policy", hidden=64, layers=2, heads=2, intermediate=64)
    answers = [{"role": "assistant", "content": word} for word in WORDS]
    demonstrations = [{"messages": [*_question(i), answers[i % len(answers)]]} for i in range(64)]
    pairs = [
        {"prompt": _question(i), "chosen": [answers[i % 9]], "rejected": [answers[9]]}
        for i in range(64)
    ]
    made = World(
        folder=folder,
        policy=folder / "policy",
        reward_model=folder / "reward" / "reward_model",
        prompts=write_rows(folder / "prompts.jsonl", [{"prompt": _question(i)} for i in range(16)]),
        pairs=write_rows(folder / "pairs.jsonl", pairs),
        demonstrations=write_rows(folder / "demonstrations.jsonl", demonstrations),
    )
    config = RewardModelConfig(
        model=ModelConfig(path=str(made.policy)),
        data=PairsConfig(path=str(made.pairs)),
        fit=FitConfig(max_steps=2, rows_per_step=16, threads=1),
    )
    train_reward_model(config, folder / "reward")
    return made


@dataclass
class Command:
    """A command that runs. `seen`: every process it has started so far, by its number and start."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path
    began: float = field(default_factory=time.monotonic)
    seen: dict[tuple[int, float], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        try:
            root = psutil.Process(self.process.pid)
            while self.process.poll() is None:
                for child in root.children(recursive=True):
                    self._note(child)
                time.sleep(0.2)
        except psutil.NoSuchProcess:
            return

    def _note(self, child: psutil.Process) -> None:
        try:
            self.seen[child.pid, child.create_time()] = " ".join(child.cmdline())[:200]
        except psutil.Error:  # it ended meanwhile, so it is not left
            return

    @property
    def stdout(self) -> str:
        return self.out.read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return self.err.read_text(encoding="utf-8")

    @property
    def used_ray(self) -> bool:
        return any(name in line for line in self.seen.values() for name in STARTED_BY_RAY)

    def wait(self, timeout_s: float) -> int:
        code = self.process.wait(timeout_s)
        self._watcher.join(5.0)
        return code

    def wait_until(self, reached: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Fails, showing what the command said, when it ends before or the time is over."""
        deadline = time.monotonic() + timeout_s
        while not reached():
            if self.process.poll() is not None or time.monotonic() > deadline:
                state = "it ended" if self.process.poll() is not None else f"{timeout_s} s passed"
                pytest.fail(f"waited for {what}: {state}\n{self.stderr}")
            time.sleep(0.02)

    def interrupt(self, number: int = signal.SIGINT) -> tuple[int, float]:
        """Ctrl-C as a terminal sends it, to all of the foreground group (SIGTERM: as `kill` does,
        to the command alone); (exit code, seconds until it had ended)."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            self._note(child)
        sent = time.monotonic()
        if number == signal.SIGINT:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        code = self.wait(30.0)
        return code, time.monotonic() - sent

    def left(self, within_s: float = 3.0) -> list[str]:
        """What it started and still runs, after a moment for what is being ended."""
        deadline = time.monotonic() + within_s
        while (alive := self._alive()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return alive

    def _alive(self) -> list[str]:
        return [line for (pid, start), line in list(self.seen.items()) if _runs(pid, start)]

    def end(self) -> None:
        """Kill what is left, and nothing else."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10.0)
        for pid, start in list(self.seen):
            if _runs(pid, start):
                os.kill(pid, signal.SIGKILL)


def _runs(pid: int, start: float) -> bool:
    try:
        process = psutil.Process(pid)
        return process.create_time() == start and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclasses.dataclass
class CommandLine:
    """Starts `accord` commands in `folder` and ends what a failed test leaves behind."""

    root: Path
    folder: Path
    commands: list[Command] = field(default_factory=list)

    def start(self, *words: object, typed: str = "") -> Command:
        """``typed``: what stands on the command's standard input."""
        number = len(self.commands)
        out, err = self.folder / f"out-{number}", self.folder / f"err-{number}"
        keys = self.folder / f"in-{number}"
        keys.write_text(typed, encoding="utf-8")
        environment = {**os.environ, "ACCORD_NO_BOOTSTRAP": "1", "OMP_NUM_THREADS": "1"}
        with keys.open("rb") as stdin, out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, str(self.root / "launch.py"), *map(str, words)],
                cwd=self.folder,
                env=environment,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        command = Command(process, out, err)
        self.commands.append(command)
        return command

    def run(self, *words: object, typed: str = "", timeout_s: float = 60.0) -> Command:
        command = self.start(*words, typed=typed)
        command.wait(timeout_s)
        return command

    def close(self) -> None:
        for command in self.commands:
            command.end()


@pytest.fixture(scope="session")
def command_lines(repo_root: Path) -> Callable[[Path], CommandLine]:
    """Folder -> command line in it; whoever asks closes it."""
    return lambda folder: CommandLine(repo_root, folder)


@pytest.fixture
def accord(repo_root: Path, tmp_path: Path) -> Iterator[CommandLine]:
    line = CommandLine(repo_root, tmp_path)
    yield line
    line.close()


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str
    seconds: float


@dataclass(frozen=True)
class CommandHere:
    """Runs `accord` commands in this process, in `folder`: each costs a second, not five."""

    folder: Path

    def run(self, *words: object) -> Outcome:
        import launch

        out, err = io.StringIO(), io.StringIO()
        argv, place, path = sys.argv, Path.cwd(), list(sys.path)
        handler = signal.getsignal(signal.SIGTERM)
        began, code = time.monotonic(), 0
        try:
            os.chdir(self.folder)
            sys.argv = ["accord", *map(str, words)]
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                launch.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            sys.argv, sys.path[:] = argv, path
            os.chdir(place)
            signal.signal(signal.SIGTERM, handler)
        return Outcome(code, out.getvalue(), err.getvalue(), time.monotonic() - began)


@pytest.fixture
def accord_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandHere:
    """Ray cannot be started by it: a cluster in the tests' own process would be in others' way."""
    import ray

    def started(*args: Any, **options: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", started)
    return CommandHere(tmp_path)
