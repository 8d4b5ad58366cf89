"""`accord sft`, `reward-model` and `dpo`: a run directory around the offline loops of the learner."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.contracts.config import DpoConfig, RewardModelConfig, SftConfig
from cluster.progress import Reporter, Stage
from cluster.runs import Run, write_json
from cluster.sinks import make_sinks

OfflineConfig = SftConfig | RewardModelConfig | DpoConfig
Train = Callable[[Callable[..., None], Callable[[], bool]], Path]


def run_sft(config: SftConfig, reporter: Reporter) -> Path:
    """Returns the run directory; its ``policy/`` is the result."""
    from learner.sft import train_sft

    return _run(
        "sft", "SFT", config, reporter,
        lambda run, progress, stop: train_sft(config, run.path, progress, stop),
    )  # fmt: skip


def run_reward_model(
    config: RewardModelConfig, reporter: Reporter, centre_rows: Path | None = None
) -> Path:
    """Returns the run directory; its ``reward_model/`` is the result."""
    from learner.reward_model import train_reward_model

    return _run(
        "reward-model", "reward model", config, reporter,
        lambda run, progress, stop: train_reward_model(
            config, run.path, progress, centre_rows, stop
        ),
    )  # fmt: skip


def run_dpo(config: DpoConfig, reporter: Reporter) -> Path:
    """Returns the run directory; its ``policy/`` is the result."""
    from learner.dpo import train_dpo

    return _run(
        "dpo", "DPO", config, reporter,
        lambda run, progress, stop: train_dpo(config, run.path, progress, stop),
    )  # fmt: skip


def _run(command: str, title: str, config: OfflineConfig, reporter: Reporter, train: Any) -> Path:
    """Run, with its files; an interrupt lets the step under way end, saves, and then interrupts."""
    parents = {"model": config.model.path, "data": config.data.path, **config.run.parents}
    run = Run.create(
        config.run.dir, config.run.name, command, config, seed=config.run.seed, parents=parents
    )
    sinks = make_sinks(config.logging, run.path, on_ray=False)
    try:
        with stop_on_signal() as stopped, reporter.stage(title) as stage:
            train(run, _progress(stage, sinks), stopped)
    except BaseException as problem:
        run.update_manifest(status="failed")
        run.event("run_failed", cause=str(problem))
        raise
    finally:
        for sink in sinks:
            sink.close()
    summary = json.loads((run.path / "fit.json").read_text(encoding="utf-8"))
    if not summary["finished"]:
        run.update_manifest(status="interrupted")
        raise KeyboardInterrupt
    run.update_manifest(status="finished")
    if isinstance(config, RewardModelConfig):
        write_json(run.path / "reward_model.json", reward_model_figures(run.path, summary))
    return run.path


def reward_model_figures(path: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the report shows of a reward model."""
    numbers = summary["evaluation"]
    figures = {k.removeprefix("rm/"): v for k, v in numbers.items() if k.startswith("rm/")}
    reliability = path / "reliability.json"
    if reliability.is_file():
        figures["reliability"] = json.loads(reliability.read_text(encoding="utf-8"))
    return {
        **figures,
        "pairs_trained": summary["rows"],
        "pairs_held_out": summary["rows_held_out"],
    }


def _progress(stage: Stage, sinks: list[Any]) -> Callable[[int, float, Mapping[str, float]], None]:
    """The loop tells the share done; the bar wants a total, which grows sure as the loop goes on."""

    def on_step(step: int, fraction: float, numbers: Mapping[str, float]) -> None:
        for sink in sinks:
            sink.write(step, numbers)
        stage.update(
            step, numbers, total=max(step, round(step / fraction)) if fraction > 0 else None
        )

    return on_step


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Within, SIGINT and SIGTERM set a flag instead of interrupting; a second one interrupts."""
    asked: list[int] = []

    def ask(signum: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signum)

    before = {name: signal.signal(name, ask) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
