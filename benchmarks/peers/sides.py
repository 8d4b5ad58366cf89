"""One run of either side, watched from outside: when each step ended, what it scored, CPU used."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
VENV = HERE / ".venv"
TICKS = os.sysconf("SC_CLK_TCK")
POLL_S = 0.2
LIMIT_S = 1800.0  # of one run
STOP_S = 60.0  # for Accord to end after an interrupt


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What both sides do. target: mean reward of a step, averaged over ``smooth`` steps.

    A run ends when it has done ``least_steps`` and reached the target, or done ``most_steps``.
    """

    size: str
    varied: bool
    model: str
    prompts: str
    reward: str
    lr: float
    target: float
    seed: int = 0
    prompts_per_step: int = 8
    samples_per_prompt: int = 8
    max_tokens: int = 64
    least_steps: int = 14
    most_steps: int = 120
    smooth: int = 3
    warm_up: int = 4

    @property
    def min_tokens(self) -> int:
        return 0 if self.varied else self.max_tokens

    @property
    def samples(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt


@dataclass(slots=True, kw_only=True)
class Watched:
    """began: when training started, models loaded (unix time); started_s: what that took.
    ends, rewards, lengths: one a step. cpu_s: CPU-seconds between the end of step ``warm_up`` and
    the last step, all processes of the side. by_role: those of Accord, seconds a step."""

    started_s: float
    began: float
    ends: list[float]
    rewards: list[float]
    lengths: list[float]
    cpu_s: float
    by_role: dict[str, float]
    versions: dict[str, str]


def figures(task: Task, watched: Watched) -> dict[str, Any]:
    """The numbers of one run. Steady state: from the end of step ``warm_up`` to the last step."""
    steps = len(watched.ends)
    if steps < task.warm_up + 4:
        sys.exit(f"a run ended after {steps} steps")
    spent = watched.ends[-1] - watched.ends[task.warm_up - 1]
    samples = (steps - task.warm_up) * task.samples
    length = statistics.mean(watched.lengths[task.warm_up :])
    reached = reached_at(watched.rewards, task)
    after = None if reached is None else watched.ends[reached] - watched.began
    return {
        "steps": steps,
        "samples_per_s": samples / spent,
        "tokens_per_s": samples * length / spent,
        "mean_length": length,
        "cpu_ms_per_sample": 1000 * watched.cpu_s / samples,
        "cpu_s_per_step_by_role": watched.by_role,
        "last_reward": statistics.mean(watched.rewards[-task.smooth :]),
        "start_s": watched.started_s,
        "steps_to_target": None if reached is None else reached + 1,
        "to_target_s": after,
        "to_target_with_start_s": None if after is None else after + watched.started_s,
    }


def reached_at(rewards: list[float], task: Task) -> int | None:
    """Index of the first step by which the mean of the last ``smooth`` rewards is the target's."""
    for end in range(task.smooth, len(rewards) + 1):
        if statistics.mean(rewards[end - task.smooth : end]) >= task.target:
            return end - 1
    return None


# -- TRL -------------------------------------------------------------------------------------------


def make_environment() -> Path:
    """TRL's own environment; its Python. Made once."""
    python, stamp = VENV / "bin" / "python", VENV / "ready"
    wanted = (HERE / "requirements.txt").read_text(encoding="utf-8")
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    shutil.rmtree(VENV, ignore_errors=True)
    pins = [line for line in wanted.splitlines() if line and not line.startswith("#")]
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    for part in (pins[:1], pins):  # torch first and alone, so that nothing else chooses its build
        subprocess.run([str(python), "-m", "pip", "install", "-q", *part], check=True)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def run_trl(task: Task, folder: Path, options: dict[str, Any]) -> Watched:
    """options: threads, microbatches, gradient_checkpointing, bf16."""
    settings = {**asdict(task), "min_tokens": task.min_tokens, "folder": str(folder), **options}
    folder.mkdir(parents=True)
    given, answer = folder / "settings.json", folder / "result.json"
    given.write_text(json.dumps(settings), encoding="utf-8")
    command = [str(make_environment()), str(HERE / "trl_grpo.py"), str(given), str(answer)]
    spawned = time.time()
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_S, cwd=folder, check=False
    )
    if done.returncode:
        sys.exit(f"TRL failed:\n{done.stderr[-3000:]}")
    result = json.loads(answer.read_text(encoding="utf-8"))
    cpu = result["cpu"]
    return Watched(
        started_s=result["began"] - spawned,
        began=result["began"],
        ends=result["ends"],
        rewards=result["rewards"],
        lengths=result["lengths"],
        cpu_s=cpu[-1] - cpu[task.warm_up - 1],
        by_role={},
        versions=result["versions"],
    )


# -- Accord ----------------------------------------------------------------------------------------


def run_accord(task: Task, folder: Path, overrides: list[str]) -> Watched:
    """``accord train``, interrupted when it has done what was wanted."""
    folder.mkdir(parents=True)
    config = folder / "config.toml"
    config.write_text(toml(task, folder), encoding="utf-8")
    spawned = time.time()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), "train", str(config), *overrides],
        stdout=subprocess.DEVNULL,
        stderr=(folder / "stderr").open("w"),
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    rows: list[dict[str, Any]] = []
    warm: dict[str, float] = {}
    try:
        while process.poll() is None:
            time.sleep(POLL_S)
            rows = read_rows(folder / "run" / "metrics.jsonl")
            if len(rows) >= task.warm_up and not warm:
                warm, warm_step = cpu_by_role(process.pid), len(rows)
            if enough(task, rows) or time.time() - spawned > LIMIT_S:
                break
        used = cpu_by_role(process.pid)
        process.send_signal(signal.SIGINT)
        process.wait(STOP_S)
    finally:
        if process.poll() is None:
            process.kill()
    events = read_rows(folder / "run" / "events.jsonl")
    began = [event["time"] for event in events if event["kind"] == "loop_started"]
    if not began or not warm or len(rows) <= task.warm_up:
        sys.exit(f"accord train failed:\n{(folder / 'stderr').read_text()[-3000:]}")
    steps = len(rows) - warm_step
    roles = {name: (used.get(name, 0.0) - warm[name]) / max(1, steps) for name in warm}
    return Watched(
        started_s=began[0] - spawned,
        began=began[0],
        ends=[row["time"] for row in rows],
        rewards=[row["objective/scores"] for row in rows],
        lengths=[row["perf/throughput"] * row["time/step"] / task.samples for row in rows],
        cpu_s=sum(roles.values()) * (len(rows) - task.warm_up),
        by_role=roles,
        versions={"accord": "this commit"},
    )


def enough(task: Task, rows: list[dict[str, Any]]) -> bool:
    rewards = [row["objective/scores"] for row in rows]
    done = len(rewards) >= task.least_steps and reached_at(rewards, task) is not None
    return done or len(rewards) >= task.most_steps


def read_rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def toml(task: Task, folder: Path) -> str:
    # More steps than are wanted: the last ones, with nothing left to generate, would be faster.
    return f"""
[run]
dir = "{folder}"
name = "run"
seed = {task.seed}
[model]
path = "{task.model}"
[data]
prompts = "{task.prompts}"
max_prompt_tokens = 64
[[reward.sources]]
type = "function"
path = "{HERE / "reward.py"}:{task.reward}"
[batch]
prompts_per_step = {task.prompts_per_step}
samples_per_prompt = {task.samples_per_prompt}
steps = {task.most_steps + 20}
[algorithm]
advantage = "grpo"
kl.coef = 0.0
[checkpoint]
every = 100000
[rollout]
max_tokens = {task.max_tokens}
min_tokens = {task.min_tokens}
engine = "vllm"
[learner]
lr = {task.lr}
"""


def cpu_by_role(pid: int) -> dict[str, float]:
    """CPU-seconds used so far by a process and all that descend from it, by what they are."""
    parents: dict[int, int] = {}
    stats: dict[int, tuple[str, float]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            name, rest = (entry / "stat").read_text().split("(", 1)[1].rsplit(")", 1)
            command = (entry / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError, IndexError):
            continue  # it ended meanwhile
        fields = rest.split()
        parents[int(entry.name)] = int(fields[1])
        stats[int(entry.name)] = (command or name, (int(fields[11]) + int(fields[12])) / TICKS)
    found: dict[str, float] = {}
    for child, (command, seconds) in stats.items():
        at = child
        while at not in (pid, 0) and at in parents:
            at = parents[at]
        if at == pid:
            role = "controller" if child == pid else role_of(command)
            found[role] = found.get(role, 0.0) + seconds
    return found


def role_of(command: str) -> str:
    for mark, role in (
        ("RolloutActor", "worker"),
        ("LearnerActor", "learner"),
        ("Reward", "rewards"),
    ):
        if mark in command:
            return role
    return "ray"
