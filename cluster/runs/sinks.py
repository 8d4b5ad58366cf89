"""Where the numbers of a run go. The one place (with placement) that talks to Ray's metrics."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.contracts.config.base import LoggingConfig
from cluster.contracts.errors import UserError
from cluster.contracts.live import STAGES, LiveView
from cluster.contracts.protocols import Sink
from cluster.runs.lines import Lines, write_whole

WORKER_GAUGES = (
    *("tokens_per_s", "running", "waiting", "groups"),
    *("version", "busy", "heartbeat_age_s"),
)  # fields of WorkerView


class JsonlSink:
    """One line a step in metrics.jsonl: {"step", "time", name: number, ...}; always on. Lines that
    do not fit on the disk wait in memory; ``write`` and ``close`` raise OSError meanwhile."""

    def __init__(self, path: Path) -> None:
        self._lines = Lines(path)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        row = {"step": step, "time": round(time.time(), 3)}
        row |= {name: _short(value) for name, value in sorted(numbers.items())}
        self._require(self._lines.add(json.dumps(row)))

    def close(self) -> None:
        self._require(self._lines.flush())

    def _require(self, written: bool) -> None:
        if not written:
            waiting = f"{len(self._lines.waiting)} lines wait in memory"
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}; {waiting}", self._lines.path)


class TensorBoardSink:
    """One file of records. TensorBoard's own writer never works again after a full disk, and the
    half of a record that it leaves hides all that follow; here the half is cut off again."""

    def __init__(self, directory: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._record_writer = Event, Summary, RecordWriter
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}"
        self._file = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        entries = [self._summary.Value(tag=name, simple_value=v) for name, v in numbers.items()]
        end = os.lseek(self._file, 0, os.SEEK_END)
        events = [] if end else [self._event(wall_time=time.time(), file_version="brain.Event:2")]
        events.append(
            self._event(wall_time=time.time(), step=step, summary=self._summary(value=entries))
        )
        records = io.BytesIO()
        for event in events:
            self._record_writer(records).write(event.SerializeToString())
        try:
            write_whole(self._file, records.getvalue())
        except OSError:
            os.ftruncate(self._file, end)
            raise

    def close(self) -> None:
        os.close(self._file)


class WandbSink:
    def __init__(self, project: str, name: str, directory: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "logging.wandb is on, but the package wandb is not installed",
                where="logging.wandb",
                fix="install wandb into the environment, or set logging.wandb=false",
            ) from None
        self._run = wandb.init(project=project, name=name, dir=str(directory))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class RayMetricsSink:
    """Gauges ``accord_<group>_<name>``, tagged ``run``; Ray exports them as ``ray_accord_...``."""

    def __init__(self, run_name: str) -> None:
        from ray.util import metrics

        self._metrics = metrics
        self._gauges: dict[str, Any] = {}
        self._tags = {"run": run_name}

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in {**numbers, "run/step": float(step)}.items():
            gauge = self._gauges.get(name)
            if gauge is None:
                label = "accord_" + name.replace("/", "_").replace("-", "_")
                gauge = self._metrics.Gauge(label, description=name, tag_keys=("run",))
                self._gauges[name] = gauge
            gauge.set(value, tags=self._tags)

    def close(self) -> None:
        self._gauges.clear()


class RayLiveGauges:
    """A live view as gauges ``accord_live_...``, tagged ``run`` and, where they have one,
    ``worker``, ``status`` or ``stage``; Ray exports them as ``ray_accord_live_...``."""

    def __init__(self, run_name: str) -> None:
        from ray.util import metrics

        self._metrics = metrics
        self._gauges: dict[str, Any] = {}
        self._run = run_name
        self._workers: set[str] = set()

    def __call__(self, view: LiveView) -> None:
        now = {worker.name: worker for worker in view.workers}
        for name in self._workers - now.keys():  # Ray keeps on exporting what was set last
            for gauge in WORKER_GAUGES:
                self._set(f"worker_{gauge}", 0.0, worker=name)
        self._workers = set(now)
        for worker in view.workers:
            for gauge in WORKER_GAUGES:
                value = getattr(worker, gauge)
                self._set(f"worker_{gauge}", 0.0 if value is None else value, worker=worker.name)
        for status, count in view.workers_by_status.items():
            self._set("workers", count, status=status)
        for stage, share in view.bottleneck.shares.items():
            self._set("wait_share", share, stage=stage)
        for stage in STAGES:
            self._set("bottleneck", float(view.bottleneck.stage == stage), stage=stage)
        for name, value in live_numbers(view).items():
            if value is not None:
                self._set(name, value)

    def _set(self, name: str, value: float, **tags: str) -> None:
        gauge = self._gauges.get(name)
        if gauge is None:
            gauge = self._gauges[name] = self._metrics.Gauge(
                f"accord_live_{name}", description=name, tag_keys=("run", *tags)
            )
        gauge.set(float(value), tags={"run": self._run, **tags})


def live_numbers(view: LiveView) -> dict[str, float | None]:
    """Gauges of the whole run, by name without prefix."""
    return {
        "tokens_per_s": view.tokens_per_s,
        "learner_step": view.learner.step,
        "learner_state_s": view.learner.state_s,
        "learner_busy": view.learner.busy,
        "learner_heartbeat_age_s": view.learner.heartbeat_age_s,
        "reward_waiting": view.rewards.waiting,
        "reward_seconds_per_group": view.rewards.seconds_per_group,
        "reward_failures": view.rewards.failures,
        "queue_unplaced": view.queue.unplaced,
        "queue_in_flight": view.queue.in_flight,
        "queue_ready": view.queue.ready,
        "queue_missing": view.queue.missing,
        "version_published": view.weights.published,
        "version_held": view.weights.held,
        "staleness_mean": view.staleness.mean,
        "staleness_max": view.staleness.max,
    }


def make_sinks(config: LoggingConfig, run_path: Path, *, on_ray: bool) -> list[Sink]:
    sinks: list[Sink] = [JsonlSink(run_path / "metrics.jsonl")]
    if config.tensorboard:
        sinks.append(TensorBoardSink(run_path / "tensorboard"))
    if config.wandb:
        sinks.append(WandbSink(config.wandb_project, run_path.name, run_path))
    if config.ray_metrics and on_ray:
        sinks.append(RayMetricsSink(run_path.name))
    return sinks


def _short(value: float) -> float:
    """Six significant digits: enough for curves, and short lines."""
    return float(f"{value:.6g}") if math.isfinite(value) else value
