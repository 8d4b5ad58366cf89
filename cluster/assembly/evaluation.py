"""`accord evaluate`: policies answer the same prompts, and a judge compares their completions.

The judge scores each completion (rewards), or compares two at a time (an AI judge, people).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.assembly.adapted import adapted
from cluster.assembly.ai_evaluation import judge_by_ai
from cluster.assembly.ai_judge import make_asker
from cluster.assembly.auto.resolve import resolve_evaluation
from cluster.assembly.contest import (
    COMPLETIONS,
    Comparison,
    Written,
    comparisons,
    pairings,
    read_completions,
    write_completions,
)
from cluster.assembly.contest_sampling import AT_ONCE, prompts_of, sample_all
from cluster.assembly.judged_comparisons import Judged, evaluation_record, result_line
from cluster.assembly.judging import scores_of
from cluster.assembly.local_workers import sampling_cluster
from cluster.assembly.model_facts import read_model_facts
from cluster.assembly.people_evaluation import judge_by_people
from cluster.assembly.red_team import check_safety, red_team_line, red_team_report
from cluster.assembly.rewards import check_rewards
from cluster.assembly.run_frontier import Frontier, frontier_rows
from cluster.assembly.run_session import run_session
from cluster.assembly.shipping import sampled_models
from cluster.contracts.config.evaluate import BASELINE, EvaluateConfig, name_of
from cluster.contracts.config.file import read_toml
from cluster.contracts.config.reward import is_learnt_from
from cluster.contracts.durable import write_json
from cluster.contracts.errors import Resumable
from cluster.contracts.records import Prompt
from cluster.contracts.samples import prompt_text
from cluster.machine.hardware import this_machine
from cluster.machine.resources import Need, require_resources
from cluster.runs.artefacts import artefact_hash
from cluster.runs.console import Reporter
from cluster.runs.policies import policy_directory
from cluster.runs.run import Run
from reward_service.preferences.store import PreferenceStore

KEY = "evaluation_key"


def run_evaluation(
    config: EvaluateConfig, reporter: Reporter, frontier: Frontier | None = None
) -> Path:
    """Returns the run directory: evaluation.json, completions.jsonl, samples.jsonl, report.html.
    ``frontier``: the policies are checkpoints of a run; say also how far they have moved.

    An evaluation of the same policies, prompts and settings that has its completions and waits for
    its judge goes on. Raises Resumable where people have not judged all pairs and nobody waits.
    """
    from learner.evaluation.report import write_report

    config = _ready(config)
    key = evaluation_key(config)
    run = _unfinished(config, key)
    prompts = None if run is not None else prompts_of(config, reporter.say)
    _check_judge(config, prompts[0] if prompts else None)
    resumed = config if run is not None else None
    if run is None:
        run = Run.create(
            config.run.dir,
            config.run.name,
            "evaluate",
            config,
            seed=config.run.seed,
            parents={
                **{name: model.path for name, model in config.contestants.items()},
                "prompts": config.data.prompts,
                **config.run.parents,
            },
            **{KEY: key},
        )
    waiting: Resumable | None = None
    with run_session(run, reporter, resumed=resumed) as session, reporter.stage("evaluation"):
        if prompts is None:
            reporter.say(f"goes on with the completions in {run.path}")
            written = read_completions(run.path, list(config.contestants))
        else:
            written = _sampled(config, prompts, run.path, reporter)
        try:
            record = judge_and_write(config, written, run.path, key=key, reporter=reporter)
            if frontier is not None:
                record |= frontier_rows(config, frontier, written, record)
                write_json(run.path / "evaluation.json", record)
        except Resumable as problem:
            waiting, session.outcome = problem, "waiting"
    if waiting is not None:
        raise waiting
    write_report(run.path)
    reporter.say(result_line(record))
    if "safety" in record:
        reporter.say(red_team_line(record["safety"]))
    if record["judge_was_reward"]:
        reporter.say(
            f"the judge ({', '.join(record['judge_was_reward'])}) is what the policy was trained "
            "on: this win rate says nothing about how good the policy is"
        )
    return run.path


# -- one evaluation, and how it is found again -----------------------------------------------------


def _ready(config: EvaluateConfig) -> EvaluateConfig:
    """With policies of run directories and hub ids at their commit, and every value settled."""
    from learner.models.hub import pinned

    def placed(model: Any, **changed: str) -> Any:
        path = policy_directory(model.path)
        return pinned(model.model_copy(update={"path": path, **changed}))

    update: dict[str, Any] = {
        # A name that was not given follows from the path that was given.
        "policies": [placed(one, name=one.name or name_of(one.path)) for one in config.policies]
    }
    for side in ("policy", "baseline"):
        if (model := getattr(config, side)) is not None:
            update[side] = placed(model)
    config = config.model_copy(update=update)
    first = next(iter(config.contestants.values()))
    return resolve_evaluation(config, this_machine(), read_model_facts(adapted(first))).config


def evaluation_key(config: EvaluateConfig) -> str:
    """Hex SHA-256 of what the completions and the comparisons follow from: the settings, and the
    content of policies and prompts."""
    settings = config.model_dump(mode="json", exclude={"run": True, "cluster": True})
    if config.people is not None:
        settings["people"] = {"store": config.people.store}
    paths = [model.path for model in config.contestants.values()]
    hashes = [
        artefact_hash(Path(path)) if Path(path).exists() else path
        for path in (*paths, config.data.prompts)
    ]
    text = json.dumps([settings, config.run.seed, hashes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _unfinished(config: EvaluateConfig, key: str) -> Run | None:
    """The evaluation with this key that has its completions and no result, the newest one."""
    pattern = f"{config.run.name or '*'}/manifest.json"
    found = []
    for file in Path(config.run.dir).glob(pattern):
        try:
            manifest = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError):
            continue  # of another run, which says so itself
        mine = isinstance(manifest, dict) and manifest.get(KEY) == key
        ended = (file.parent / "evaluation.json").exists()
        if mine and not ended and (file.parent / COMPLETIONS).is_file():
            found.append((str(manifest.get("created")), file.parent))
    return Run(max(found)[1]) if found else None


def _sampled(
    config: EvaluateConfig, prompts: list[list[Prompt]], directory: Path, reporter: Reporter
) -> Written:
    """Ray and the engines are ended before anybody judges."""
    with sampling_cluster(config.cluster, config.rollout) as ray_info:
        # One worker or more per policy.
        gpus = Need("a worker", {"GPU": config.rollout.gpus}, AT_ONCE, keys={"GPU": "rollout.gpus"})
        require_resources([gpus], ray_info, reporter.say)
        with sampled_models(list(config.contestants.values()), ray_info) as files:
            written = sample_all(config, prompts, files, reporter.say)
    write_completions(directory, written)
    return written


# -- judging ---------------------------------------------------------------------------------------


def judge_and_write(
    config: EvaluateConfig,
    written: Written,
    directory: Path,
    *,
    key: str = "",
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    pairs = pairings(
        len(written.names), against_last=bool(config.policies) and config.baseline is not None
    )
    compared = comparisons(written, pairs)
    judged = _judged(config, written, compared, key, reporter or Reporter(quiet=True))
    record = evaluation_record(config, written, compared, judged)
    record["judge_was_reward"] = judges_trained_with(config)
    if config.safety is not None:
        record["safety"] = red_team_report(
            config.safety,
            {name: written.of(n) for n, name in reversed(list(enumerate(written.names)))},
        )
    write_json(directory / "evaluation.json", record)
    if not config.policies:
        _write_samples(directory, written, judged)
    return record


def _write_samples(directory: Path, written: Written, judged: Judged) -> None:
    from learner.evaluation.samples import Sample, write_samples

    both = zip(written.of(0), written.of(1), judged.scores, strict=True)
    write_samples(
        directory / "samples.jsonl",
        [
            Sample(
                prompt=prompt_text(before.prompt.messages),
                before=before.text,
                after=after.text,
                before_score=None if scores is None else scores[1],
                after_score=None if scores is None else scores[0],
            )
            for after, before, scores in both
        ],
    )


def _judged(
    config: EvaluateConfig,
    written: Written,
    compared: list[Comparison],
    key: str,
    reporter: Reporter,
) -> Judged:
    if config.people is not None:
        return judge_by_people(config, key, written, compared, reporter)
    if config.ai_judge is not None:
        return judge_by_ai(config.ai_judge, config.criteria, config.cluster, compared)
    rewards = config.judge
    assert rewards is not None  # the config has one of the three
    models = config.contestants
    scored = scores_of(
        rewards, [(models[name], written.of(n)) for n, name in enumerate(written.names)]
    )
    scores = [(scored[c.left][c.place].value, scored[c.right][c.place].value) for c in compared]
    return Judged(scores, {"judge": ", ".join(source.name for source in rewards.sources)})


def _check_judge(config: EvaluateConfig, prompts: list[Prompt] | None) -> None:
    """Raises UserError for a judge that cannot be used, before anything is sampled. ``prompts``:
    None where the completions are there."""
    if config.judge is not None and prompts is not None:
        check_rewards(config.judge, prompts)
    if config.ai_judge is not None:
        make_asker(config.ai_judge, config.cluster).close()
    if config.people is not None:
        PreferenceStore(config.people.store)
    if config.safety is not None:
        check_safety(config.safety)


def judges_trained_with(config: EvaluateConfig) -> list[str]:
    """Names of the judge's sources, or of the AI judge, that were the reward of a policy's own
    training, as the run that the policy lies in says: scores of these say how far they were
    optimised, not more. The baseline's training does not count."""
    names = [name for name in config.contestants if name != BASELINE]
    sources = [
        source for name in names for source in _rewards_of(Path(config.contestants[name].path))
    ]
    if config.ai_judge is not None:
        own = (config.ai_judge.base_url or "vllm", config.ai_judge.model)
        trained = any((source.get("base_url"), source.get("model")) == own for source in sources)
        return [config.ai_judge.model] if trained else []
    rewards = {_identity(source) for source in sources}
    judges = config.judge.sources if config.judge is not None else []
    return [s.name for s in judges if _identity(s.model_dump()) in rewards]


def _rewards_of(policy: Path) -> list[Mapping[str, Any]]:
    """``reward.sources`` of the training run that ``policy`` (or a checkpoint's) belongs to."""
    for folder in list(policy.absolute().parents)[:3]:
        if (folder / "manifest.json").is_file():  # a run; a pipeline's holds runs of its own
            inner = (p for place in ("*", "round-*/*") for p in folder.glob(f"{place}/config.toml"))
            configs = [folder / "config.toml", *inner]
            trees = [read_toml(str(file)) for file in configs if file.is_file()]
            rewards = [tree.get("reward", {}) for tree in trees]
            return [
                source
                for reward in rewards
                for source in reward.get("sources", [])
                if is_learnt_from(source, reward.get("combine", "sum"))
            ]
    return []


def _identity(source: Mapping[str, Any]) -> tuple[str, str]:
    """Kind and place; a path is the same however it is written."""
    path = str(source.get("path") or "")
    file, colon, name = path.partition(".py:")
    where = str(Path(file + colon.rstrip(":")).absolute()) + name if path else ""
    rules = {k: v for k, v in source.items() if k not in ("name", "weight", "path") and v}
    return where, "" if path else json.dumps(rules, sort_keys=True, default=str)
