"""`accord pipeline`: a run directory around the rounds, and going on with one that was stopped.

runs/NAME/  pipeline.json  preferences.db  sft/  policy/ (the newest promoted one)
            round-1/{completions/, labels/, reward_model/, policy/, evaluation/}  round-2/ ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.assembly.cards.write import write_cards
from cluster.assembly.run_session import made_by, refuse_changes, run_session
from cluster.contracts.config.file import load_config
from cluster.contracts.config.pipeline import PipelineConfig
from cluster.contracts.errors import UserError
from cluster.machine.cores import own_cores
from cluster.pipeline.record import PipelineRecord
from cluster.pipeline.rounds import go_round, newest_promoted
from cluster.pipeline.simulated import Annotate
from cluster.pipeline.work import Afresh, Work
from cluster.runs.console import Reporter
from cluster.runs.run import Run
from reward_service.sources.function import user_function

FREE = ("rounds", "choice", "label", "snapshot", "quality", "promote", "cluster")
"""Sections that may change when a pipeline goes on: they decide about stages to come."""


Prepare = Callable[[Run], None]
"""Makes what the stages read, where it is not there yet; called at each start."""


def begin_pipeline(
    config: PipelineConfig,
    reporter: Reporter,
    *,
    command: str = "pipeline",
    prepare: Prepare | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> Path:
    """A new run; or, where ``run.name`` is that of a pipeline by the same config, on with that one.
    ``manifest``: more entries of it. Returns the run directory. Raises Afresh."""
    config = resolved(config)
    known = Path(config.run.dir, config.run.name)
    if command == "pipeline" and config.run.name and (known / "manifest.json").is_file():
        return resume_pipeline(str(known), config, reporter)
    _check(config)
    parents = {"model": config.model.path, "prompts": config.sample.data.prompts}
    run = Run.create(
        config.run.dir, config.run.name, command, config, seed=config.run.seed,
        parents={**parents, **config.run.parents}, **(manifest or {}),
    )  # fmt: skip
    return _drive(run, config, reporter, prepare, resumed=False)


def resume_pipeline(
    path: str,
    given: PipelineConfig | Sequence[str],
    reporter: Reporter,
    *,
    prepare: Prepare | None = None,
) -> Path:
    """Go on with a pipeline. ``given``: the settings to change, or its config, as it is asked for
    now. Returns the run directory. Raises Afresh."""
    run = open_pipeline(path)
    file = str(run.path / "config.toml")
    before = load_config(PipelineConfig, file)
    config = (
        given if isinstance(given, PipelineConfig) else load_config(PipelineConfig, file, given)
    )
    refuse_changes(before, config, path, FREE)
    _check(config)
    return _drive(run, config, reporter, prepare, resumed=True)


def resolved(config: PipelineConfig) -> PipelineConfig:
    """Sampling has as many workers as there are cores, unless the file says how many."""
    rollout = config.sample.rollout
    if "workers" in rollout.model_fields_set:
        return config
    rollout = rollout.model_copy(update={"workers": max(1, len(own_cores()))})
    sample = config.sample.model_copy(update={"rollout": rollout})
    return config.model_copy(update={"sample": sample})


def open_pipeline(path: str) -> Run:
    """Raises UserError for what is no pipeline's run."""
    run = Run.open(path)
    if not is_pipeline(path):
        raise UserError(
            f"is a run of `accord {made_by(run)}`, not of `accord pipeline`",
            where=path,
            fix="choose another run.name, or give the run directory of a pipeline",
        )
    return run


def is_pipeline(path: str) -> bool:
    """Raises UserError for what is no run directory."""
    return made_by(Run.open(path)) in ("pipeline", "quickstart")


def _drive(
    run: Run,
    config: PipelineConfig,
    reporter: Reporter,
    prepare: Prepare | None,
    *,
    resumed: bool,
) -> Path:
    afresh: Afresh | None = None
    with run_session(run, reporter, resumed=config if resumed else None) as session:
        if prepare is not None:
            prepare(run)
            run.hash_parents(config)  # what it has just made
        check_inputs(config)
        record = PipelineRecord(run.path, config.rounds)
        work = Work(config, run, reporter)
        try:
            go_round(config, record, work)
        except Afresh as waits:
            afresh, session.outcome = waits, "stopped"
        finally:
            work.close()
    if afresh is not None:
        raise afresh
    _describe(run.path, reporter)
    return run.path


def _describe(run: Path, reporter: Reporter) -> None:
    """The cards of what the stages made, and the report over the rounds."""
    from learner.evaluation.report import write_report

    with reporter.stage("cards and report"):
        write_cards(run)
        write_report(run)


def _check(config: PipelineConfig) -> None:
    """What can be known before the first stage: a mistake should not show hours later."""
    if config.reward_model is None or config.choice.reward_model is not None:
        from cluster.assembly.choosing import check_choice

        check_choice(config.choice)  # else the reward models of earlier rounds are asked
    if config.label.annotate is not None:
        Annotate(config.label.annotate)


FILES = (
    *("sft.data.path", "sample.data.prompts", "train.data.prompts"),
    *("best_of_n.data.prompts", "evaluate.data.prompts"),
)
FUNCTIONS = ("train.reward.sources", "best_of_n.reward.sources", "evaluate.judge.sources")


def check_inputs(config: PipelineConfig) -> None:
    """Raise UserError for a file or a function that a later stage would miss. Whether each row can
    be read, the stage says."""
    tree = config.model_dump()
    for key in FILES:
        path = at(tree, key)
        if isinstance(path, str) and ":" not in path and not Path(path).exists():
            raise UserError(
                f"there is no file {path}",
                where=key,
                fix="a relative path starts from the directory the command is run in",
            )
    for key in FUNCTIONS:
        for number, source in enumerate(at(tree, key) or []):
            if source.get("type") == "function":
                user_function(source["path"], f"{key}.{number}.path")


def at(tree: Any, key: str) -> Any:
    """What a dotted key names; None where it is not there."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def closing_lines(run: Path) -> list[str]:
    """What the command prints when it ends well."""
    promoted = newest_promoted(PipelineRecord(run, 0))
    if promoted is None:
        return [str(run), "no round was promoted: there is no policy/"]
    return [str(run), f"talk to it: accord chat {run}"]
