"""Where the numbers of a run go. The one place (with placement) that talks to Ray's metrics."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.contracts.config.base import LoggingConfig
from cluster.contracts.errors import UserError
from cluster.contracts.protocols import Sink


class JsonlSink:
    """One line a step in metrics.jsonl: {"step", "time", name: number, ...}; always on."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        row = {"step": step, "time": round(time.time(), 3)}
        row |= {name: _short(value) for name, value in sorted(numbers.items())}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    def __init__(self, directory: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        directory.mkdir(parents=True, exist_ok=True)
        self._writer = EventFileWriter(str(directory))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        entries = [self._summary.Value(tag=name, simple_value=v) for name, v in numbers.items()]
        self._writer.add_event(
            self._event(wall_time=time.time(), step=step, summary=self._summary(value=entries))
        )

    def close(self) -> None:
        self._writer.close()


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
