"""`accord sft`, `reward-model`, `dpo`: a run directory around the offline loops of the learner."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from cluster.assembly.auto.choices import Reason, Resolved
from cluster.assembly.auto.fits import OfflineConfig, bytes_of_rows
from cluster.assembly.auto.resolve import resolve_fit
from cluster.assembly.listeners import Listeners
from cluster.assembly.model_facts import read_model_facts
from cluster.assembly.run_session import open_run, refuse_changes, run_session, run_status
from cluster.contracts.callbacks import AnyCallback
from cluster.contracts.config.compute import ComputeConfig
from cluster.contracts.config.file import load_config
from cluster.contracts.config.offline import DpoConfig, RewardModelConfig, SftConfig
from cluster.contracts.durable import write_json
from cluster.contracts.errors import UserError
from cluster.loop.outages import Sinks
from cluster.machine.cores import own_cores
from cluster.machine.hardware import this_machine
from cluster.machine.signals import TRY_AGAIN, end_command_after, listening
from cluster.runs.console import Reporter, Stage
from cluster.runs.run import Run
from cluster.runs.sinks import make_sinks

if TYPE_CHECKING:
    from learner.compute.ranks import Ranks
    from learner.offline.companions import Command
    from learner.offline.setup import OnRows, TrainingRows

_HOW = ("threads", "checkpoint_every", "eval_every", *ComputeConfig.model_fields)
FREE_ON_RESUME = ("logging", *(f"fit.{key}" for key in _HOW if key != "optimizer"))
"""Keys that say how is trained, not what is learnt."""
OnStep = Callable[[int, float, Mapping[str, float]], None]
C = TypeVar("C", SftConfig, RewardModelConfig, DpoConfig)
P = TypeVar("P", RewardModelConfig, DpoConfig)


def resume_offline(
    command: Literal["sft", "reward-model", "dpo"],
    path: str,
    overrides: Sequence[str],
    reporter: Reporter,
    *,
    callbacks: Sequence[AnyCallback] = (),
) -> Path:
    """Continue a run that was interrupted from its newest checkpoint (from the beginning where
    there is none). Only settings that do not change what is learnt may be given anew."""
    run = open_run(path, command)
    if run_status(run) == "finished":
        raise UserError("is finished", where=path, fix="start a new run from its result")
    if command == "sft":
        sft = _config(SftConfig, run, overrides)
        return run_sft(sft, reporter, resumed=run, callbacks=callbacks)
    if command == "dpo":
        dpo = _config(DpoConfig, run, overrides)
        return run_dpo(dpo, reporter, resumed=run, callbacks=callbacks)
    config = _config(RewardModelConfig, run, overrides)
    return run_reward_model(config, reporter, resumed=run, callbacks=callbacks)


def _config(kind: type[C], run: Run, overrides: Sequence[str]) -> C:
    file = str(run.path / "config.toml")
    config = load_config(kind, file, overrides)
    refuse_changes(load_config(kind, file), config, str(run.path), FREE_ON_RESUME)
    if changed := run.changed_parents(config):
        raise UserError(
            f"not what the run began with: {', '.join(changed)}; the content has changed since",
            where=str(run.path),
            fix="put it back as it was, or start a new run",
        )
    return config


def run_sft(
    config: SftConfig,
    reporter: Reporter,
    *,
    resumed: Run | None = None,
    callbacks: Sequence[AnyCallback] = (),
) -> Path:
    """Returns the run directory; its ``policy/`` is the result."""
    resolved = resolved_here(config)
    config = resolved.config

    def prepared(run: Run) -> SftConfig:
        if not config.data.path.endswith(".db"):
            _noted(config.data.path, run)
        return config

    return _run("sft", "SFT", resolved, reporter, resumed, prepared, callbacks)


def resolved_here(config: C) -> Resolved[C]:
    """With a value for each key that is `auto`, for this machine."""
    from learner.compute.ranks import launched_processes

    return resolve_fit(
        config,
        this_machine(),
        read_model_facts(config.model),
        rows_bytes=bytes_of_rows(config.data.path),
        launched=launched_processes(),
    )


def _say_processes(chosen: Reason | None, reporter: Reporter) -> None:
    if chosen is not None and chosen.value > 1:
        reporter.say(f"training in {chosen.value} processes: {chosen.why}")


def with_pairs(config: P, run: Run) -> P:
    """With the rows that the run trains on: of a preference store, a snapshot in the run itself.
    The run's manifest names the snapshot, so that ``forget`` finds the model."""
    path = _noted(config.data.path, run)
    data = {"path": path, "split": _split_with_ties(config, Path(path))}
    return config.model_copy(update={"data": config.data.model_copy(update=data)})


def _noted(data: str, run: Run) -> str:
    """Where the rows are; the run's manifest names the snapshot that they are, if they are one."""
    from cluster.assembly.preferences import training_data

    path, snapshot = training_data(data, run.path)
    if snapshot is not None:
        run.update_manifest(snapshot=snapshot)
    return path


def _split_with_ties(config: P, data: Path) -> str:
    """Of a snapshot, the split of pairs holds no ties and no whole rankings. A reward model that
    learns from these gets the split of rankings, in which every pair is, too."""
    if not isinstance(config, RewardModelConfig):
        return config.data.split
    rankings = f"{config.data.split}_rankings"
    wanted = config.tie_threshold > 0 or config.ranking_loss == "plackett-luce"
    there = (data / f"{rankings}.parquet").is_file()
    return rankings if wanted and there else config.data.split


def run_reward_model(
    config: RewardModelConfig,
    reporter: Reporter,
    *,
    resumed: Run | None = None,
    callbacks: Sequence[AnyCallback] = (),
) -> Path:
    """Returns the run directory; its ``reward_model/`` is the result."""
    resolved = resolved_here(config)
    prepared = partial(with_pairs, resolved.config)
    return _run("reward-model", "reward model", resolved, reporter, resumed, prepared, callbacks)


def run_dpo(
    config: DpoConfig,
    reporter: Reporter,
    *,
    resumed: Run | None = None,
    callbacks: Sequence[AnyCallback] = (),
) -> Path:
    """Returns the run directory; its ``policy/`` is the result."""
    resolved = resolved_here(config)
    prepared = partial(with_pairs, resolved.config)
    return _run("dpo", "DPO", resolved, reporter, resumed, prepared, callbacks)


def telling(run: Run, reporter: Reporter) -> OnRows:
    """Says which rows were left out, on the console and in events.jsonl."""

    def tell(rows: TrainingRows[Any]) -> None:
        bad = rows.left_out
        run.event(
            "rows",
            trained=len(rows.train),
            held_out=len(rows.held),
            too_long=rows.too_long,
            bad=bad.count,
            first_bad=bad.first,
        )
        if rows.too_long:
            reporter.say(f"left out {rows.too_long} rows longer than fit.max_tokens")
        if bad.count:
            reporter.say(str(bad))

    return tell


def _run(
    command: Command,
    title: str,
    resolved: Resolved[Any],
    reporter: Reporter,
    resumed: Run | None,
    prepared: Callable[[Run], OfflineConfig],
    callbacks: Sequence[AnyCallback],
) -> Path:
    """Run, with its files; an interrupt lets the step under way end, saves, and then interrupts.

    prepared: the config whose rows are those that the run trains on.
    """
    from learner.compute.optimizer import release_memory
    from learner.offline.companions import Work, lead

    config: OfflineConfig = resolved.config
    launched = _launched(config)
    run = resumed or _created(command, config)
    with run_session(run, reporter, resumed=config if resumed else None) as session:
        session.event("auto", **{key: asdict(why) for key, why in resolved.reasons.items()})
        session.sinks += make_sinks(config.logging, run.path, on_ray=False)
        try:
            _say_processes(resolved.reasons.get("fit.processes"), reporter)
            with stop_on_signal() as stopped, reporter.stage(title) as stage:
                listeners = Listeners(callbacks, run.path, steps=None)

                def should_stop() -> bool:
                    return stopped() or listeners.stopped or listeners.problem is not None

                sinks = Sinks([*session.sinks, listeners], session.event)
                with _processes(config, run, launched) as (meet, threads):
                    work = Work(command, _with_threads(prepared(run), threads), run.path)
                    lead(
                        work,
                        meet,
                        progress=_progress(stage, sinks),
                        should_stop=should_stop,
                        on_rows=telling(run, reporter),
                    )
        finally:
            release_memory()
        summary = json.loads((run.path / "fit.json").read_text(encoding="utf-8"))
        if listeners.problem is not None:
            raise listeners.problem
        if listeners.stopped:
            run.event("stopped_by_callback", step=summary["steps"])
        elif not summary["finished"]:
            raise KeyboardInterrupt
        if isinstance(config, RewardModelConfig):
            write_json(run.path / "reward_model.json", reward_model_figures(run.path, summary))
    return run.path


def _launched(config: OfflineConfig) -> Ranks | None:
    """The processes that torchrun started, None without it. Returns in the first of them only: the
    others train here, and end."""
    from learner.offline.companions import check_processes, follow, joined_by_torchrun

    check_processes(config.fit)
    ranks = joined_by_torchrun()
    if ranks is None or ranks.first:
        return ranks
    with listening(lambda: None, patient=True):  # the first process hears the same signal
        follow(ranks)
        ranks.leave()
    raise SystemExit(0)


@contextmanager
def _processes(
    config: OfflineConfig, run: Run, launched: Ranks | None
) -> Iterator[tuple[Callable[[], Ranks], int]]:
    """(what waits for the processes of this fit, the compute threads of each)."""
    from learner.offline.companions import companions

    fit = config.fit
    if launched is not None:
        there = launched
        yield lambda: there, fit.threads
        launched.leave()
        return
    threads = fit.threads
    if fit.processes > 1 and not threads:
        threads = max(1, len(own_cores()) // fit.processes)
    lost = partial(end_command_after, 0.0, code=TRY_AGAIN)
    with companions(fit.processes, threads, run.path, lost) as meet:
        yield meet, threads


def _with_threads(config: OfflineConfig, threads: int) -> OfflineConfig:
    fit = config.fit.model_copy(update={"threads": threads})
    return config.model_copy(update={"fit": fit})


def _created(command: str, config: OfflineConfig) -> Run:
    parents = {"model": config.model.path, "data": config.data.path, **config.run.parents}
    return Run.create(
        config.run.dir, config.run.name, command, config, seed=config.run.seed, parents=parents
    )


def reward_model_figures(path: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the report shows of a reward model."""
    numbers = summary["evaluation"]
    figures = {k.removeprefix("rm/"): v for k, v in numbers.items() if k.startswith("rm/")}
    measured = path / "figures.json"
    more = json.loads(measured.read_text(encoding="utf-8")) if measured.is_file() else {}
    return {
        **figures,
        **more,
        "pairs_trained": summary["rows"],
        "pairs_held_out": summary["rows_held_out"],
    }


def _progress(stage: Stage, sinks: Sinks) -> OnStep:
    """The loop tells the share done; the bar wants a total, surer as the loop goes on."""

    def on_step(step: int, fraction: float, numbers: Mapping[str, float]) -> None:
        sinks.write(step, numbers)
        stage.update(
            step, numbers, total=max(step, round(step / fraction)) if fraction > 0 else None
        )

    return on_step


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Yields whether to stop. From when that is first asked, SIGINT and SIGTERM set it instead of
    interrupting at once; before, there is nothing to be saved."""
    asked = threading.Event()
    with ExitStack() as from_now_on:

        def stopped() -> bool:
            if not watched:
                watched.append(True)
                from_now_on.enter_context(listening(asked.set, patient=True))
            return asked.is_set()

        watched: list[bool] = []
        yield stopped
