"""Run directories as the real writers leave them, for the tests of pages: running, finished, dead,
damaged, evaluated, hostile, and long."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from cluster.contracts.config.train import TrainConfig
from cluster.contracts.durable import write_json, write_text
from cluster.contracts.live import (
    Bottleneck,
    LearnerView,
    LiveView,
    QueueView,
    RewardView,
    StalenessView,
    WeightsView,
    WorkerView,
)
from cluster.contracts.records import Completion, Prompt, Rollout, RolloutGroup, Score, VersionSpan
from cluster.contracts.rollout_table import to_table
from cluster.runs.driver import Driver
from cluster.runs.run import Run
from learner.evaluation.samples import Sample, write_samples
from learner.rl.rollout_files import RolloutWriter

HOSTILE = {
    "script": "</pre><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>",
    "link": "<a href='javascript:window.broken=1'>x</a> {{ 7 * 7 }} {% raw %}",
    "bidi": "pay \u202e001$ \u202c\u2066hidden\u2069 now\u200b\ufeff",
    "controls": "nul \x00 bell \x07 ansi \x1b[31mred\x1b[0m \x9b2J",
    "long": "x" * 1_000_000,
    "lines": "\u2028\u2029\x85" + "\n" * 50,
    "wide": "W" * 3000 + " 漢字" * 40 + " ﷽" * 20,
}


def one_of_each(folder: Path, part: str) -> None:
    """A run in each state; ``part``: name of the one inside the quickstart's folder."""
    training(folder, "live")
    finished(folder, "first", win_rate=0.61)
    finished(folder, "second", win_rate=0.74, seed=2)
    dead(folder, "gone")
    damaged(folder, "torn")
    unreadable(folder, "cut")
    hostile_events(training(folder, "hostile", texts=tuple(HOSTILE.values())))
    finished(evaluated(folder, "quick").path, part)


def training(folder: Path, name: str, *, steps: int = 40, asked: int = 60, **kw: Any) -> Run:
    """A training in progress, driven by this process, with ``texts`` among its completions."""
    run = Run.create(str(folder), name, "train", _config(asked))
    _metrics(run.path / "metrics.jsonl", steps, seed=kw.get("seed", 0))
    _events(run)
    _rollouts(run, steps, tuple(kw.get("texts", ())))
    write_text(run.path / "live.json", _live(name, steps, asked).to_json())
    write_json(run.path / "driver.lock", Driver.of_this_process().record())
    return run


def finished(folder: Path, name: str, win_rate: float = 0.7, seed: int = 1) -> Run:
    run = training(folder, name, steps=60, seed=seed)
    end(run, "finished")
    record = {"win_rate": win_rate, "ci_low": win_rate - 0.1, "ci_high": win_rate + 0.1}
    write_json(run.path / "evaluation.json", {**record, "mean_score_policy": 1.5})
    write_text(run.path / "report.html", "<!DOCTYPE html><title>r</title><p id=r>The report</p>")
    return run


def evaluated(folder: Path, name: str) -> Run:
    run = Run.create(str(folder), name, "evaluate", _config(1))
    pairs = [
        Sample(
            prompt=f"question {n}", before="old", after=text, before_score=0.0, after_score=n / 9
        )
        for n, text in enumerate(HOSTILE.values())
    ]
    write_samples(run.path / "samples.jsonl", pairs)
    end(run, "finished")
    return run


def dead(folder: Path, name: str) -> Run:
    """As kill -9 leaves it."""
    run = training(folder, name, steps=7)
    gone = Driver.of_this_process().record() | {"pid": 2**22 + 1}
    write_json(run.path / "driver.lock", gone)
    return run


def damaged(folder: Path, name: str) -> Run:
    """Torn, cut, replaced and missing files."""
    run = dead(folder, name)
    for file, content in {
        "metrics.jsonl": b'{"step": 1, "objective/scores": "\xff"}\nnull\n[1]\n' + b"[" * 90_000,
        "events.jsonl": b'{"kind": ["x"], "time": "noon"}\n{"kind": "worker_serving"}\n{"time',
        "live.json": b'{"run": 1, "workers": [{}]}',
        "evaluation.json": b"\x00\x01",
        "config.toml": b"= = =",
        "control.json": b"{",
        "timeline.json": b"[",
    }.items():
        (run.path / file).write_bytes(content)
    for file in sorted((run.path / "rollouts").iterdir()):
        file.write_bytes(b"PAR1" + b"\x07" * 100)
    return run


def unreadable(folder: Path, name: str) -> Run:
    run = Run.create(str(folder), name, "train", _config(1))
    (run.path / "manifest.json").write_bytes(b'{"status": "runn')
    return run


def end(run: Run, status: str) -> None:
    run.update_manifest(status=status)
    for file in ("live.json", "driver.lock"):
        (run.path / file).unlink(missing_ok=True)


def add_step(run: Run, step: int) -> None:
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(_row(step, time.time(), 0)) + "\n")


def hostile_events(run: Run) -> None:
    for name, text in HOSTILE.items():
        run.event("worker_lost", worker=f"w {name} {text[:60]}", cause=text)
        run.event(f"kind {text[:40]}", detail={"nested": [text[:200], {"a": text[:50]}]})
    run.event("alarm", alarm="a", change="start", step=3, text=HOSTILE["script"])
    run.event("cluster", dashboard="javascript:window.broken=1")


def _config(steps: int) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": {"path": "tiny"},
            "data": {"prompts": "prompts.jsonl"},
            "batch": {"steps": steps},
            "reward": {"sources": [{"type": "rules", "name": "brief", "max_words": 9}]},
        }
    )


def _row(step: int, moment: float, seed: int) -> dict[str, float]:
    wave = math.sin(step / 5 + seed)
    return {
        "step": step,
        "time": moment,
        "objective/scores": step / 50 + 0.1 * wave,
        "objective/kl": step / 30,
        "completions/mean_length": 40 + 3 * wave,
        "policy/entropy": 2.0 - step / 100,
        "async/staleness_mean": 0.5 + 0.2 * wave,
        "async/staleness_max": 1.0,
        "perf/throughput": 900 + 50 * wave,
        "rollout/tokens_per_s": 950 + 60 * wave,
        "rewards/std": 0.4,
    }


def _metrics(path: Path, steps: int, seed: int) -> None:
    now = time.time()
    rows = [_row(step, now - 2.0 * (steps - step), seed) for step in range(1, steps + 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _events(run: Run) -> None:
    run.event("cluster", address="127.0.0.1:6379", dashboard="127.0.0.1:8265")
    run.event("loop_started", step=0)
    for worker in ("worker-0", "worker-1", "worker-2"):
        run.event("worker_serving", worker=worker, version=0)
    run.event("worker_lost", worker="worker-1", cause="its process was killed", requeued=3)
    run.event("worker_serving", worker="worker-1", version=3)
    run.event("alarm", alarm="kl-budget", change="start", step=9, text="KL is above its budget.")
    # Written within a second: spread over some minutes, so that a timeline shows something.
    path = run.path / "events.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for at, row in enumerate(rows):
        row["time"] += 40.0 * (at - len(rows))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _rollouts(run: Run, steps: int, texts: tuple[str, ...]) -> None:
    writer = RolloutWriter(run.path / "rollouts")
    for step in {0, steps - 1}:
        writer.write(step, to_table([_group(n, step, texts) for n in range(8)]))
    writer.close()


def _group(number: int, step: int, texts: tuple[str, ...]) -> RolloutGroup:
    question = texts[number % len(texts)] if texts else f"Why is the sky blue, part {number}?"
    prompt = Prompt(
        id=f"row-{number}",
        messages=({"role": "user", "content": question},),
        token_ids=(1, 2, 3),
    )
    versions = (
        VersionSpan(version=max(0, step - 1), start=0, end=2),
        VersionSpan(version=step, start=2, end=4),
    )
    samples = []
    for sample in range(2):
        text = texts[(number + sample) % len(texts)] if texts else f"Because of answer {sample}."
        completion = Completion(
            token_ids=(4, 5, 6, 7),
            logprobs=(-0.1, -0.2, -0.3, -0.4),
            versions=versions,
            finish_reason="length" if sample else "stop",
        )
        rollout = Rollout(prompt=prompt, sample_index=sample, completion=completion, text=text)
        value = number / 8 - sample
        samples.append(
            (rollout, Score(value=value, parts={"brief": value, "kind": 0.5}, scorer_version="1"))
        )
    return RolloutGroup(group_id=number, samples=tuple(samples))


def _live(name: str, steps: int, asked: int) -> LiveView:
    workers = tuple(
        WorkerView(
            name=f"worker-{n}",
            status="serving",
            tokens_per_s=310.0 + n,
            running=8,
            version=steps,
            busy=0.9,
            heartbeat_age_s=0.4 if n < 2 else 31.0,
            silent=n == 2,
        )
        for n in range(3)
    )
    return LiveView(
        run=name,
        time=time.time(),
        step=steps,
        steps=asked,
        elapsed_s=80.0,
        tokens_per_s=931.0,
        trained_tokens_per_s=900.0,
        reward=0.5,
        workers=workers,
        workers_by_status={"serving": 3, "lost": 1},
        learner=LearnerView(state="waiting", state_s=1.5, step=steps + 1),
        rewards=RewardView(waiting=4),
        queue=QueueView(in_flight=6, ready=2, missing=6, per_step=8),
        weights=WeightsView(published=steps, held=steps),
        staleness=StalenessView(bound=1, mean=0.6, max=1.0),
        bottleneck=Bottleneck(
            stage="rollout",
            shares={"rollout": 0.8, "reward": 0.05, "learner": 0.1, "weights": 0.05},
            why="The learner waited 80 % of the last minute for completions.",
            advice="Add workers: accord scale RUN 4.",
        ),
        addresses={"dashboard": "http://127.0.0.1:8265"},
    )


def touch(path: Path, seconds_ago: float) -> None:
    moment = time.time() - seconds_ago
    os.utime(path, (moment, moment))
