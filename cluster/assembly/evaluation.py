"""`accord evaluate`: two policies answer the same prompts, a judge scores both."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.assembly.ai_evaluation import Compared, compare_policies
from cluster.assembly.ai_judge import make_asker
from cluster.assembly.auto.resolve import resolve_evaluation
from cluster.assembly.judging import scores_of
from cluster.assembly.model_facts import read_model_facts
from cluster.assembly.red_team import check_safety, red_team_line, red_team_report
from cluster.assembly.rewards import check_rewards
from cluster.assembly.run_session import run_session
from cluster.assembly.sampling import Sampling, prompts_for, sample_in_cluster
from cluster.assembly.shipping import sampled_models
from cluster.contracts.config.evaluate import EvaluateConfig
from cluster.contracts.config.file import read_toml
from cluster.contracts.durable import write_json
from cluster.contracts.errors import UserError
from cluster.contracts.records import Prompt, Rollout
from cluster.contracts.samples import prompt_text
from cluster.machine.hardware import this_machine
from cluster.machine.ray_session import ray_cluster
from cluster.machine.resources import Need, require_resources
from cluster.machine.shipment import Shipment
from cluster.runs.console import Reporter
from cluster.runs.run import Run


def run_evaluation(config: EvaluateConfig, reporter: Reporter) -> Path:
    """Returns the run directory: evaluation.json, samples.jsonl, report.html."""
    from learner.evaluation.report import write_report
    from learner.models.hub import pinned

    models = {"policy": pinned(config.policy), "baseline": pinned(config.baseline)}
    config = config.model_copy(update=models)
    config = resolve_evaluation(config, this_machine(), read_model_facts(config.policy)).config
    prompts = _prompts(config, reporter.say)
    _check_judge(config, prompts[0])
    run = Run.create(
        config.run.dir,
        config.run.name,
        "evaluate",
        config,
        seed=config.run.seed,
        parents={
            "policy": config.policy.path,
            "baseline": config.baseline.path,
            "prompts": config.data.prompts,
            **config.run.parents,
        },
    )
    with run_session(run, reporter), reporter.stage("evaluation"):
        with ray_cluster(config.cluster) as ray_info:
            # One worker or more per policy.
            gpus = Need("a worker", {"GPU": config.rollout.gpus}, 2, keys={"GPU": "rollout.gpus"})
            require_resources([gpus], ray_info, reporter.say)
            with sampled_models([config.policy, config.baseline], ray_info) as files:
                after, before = sample_both(config, prompts, files)
        record = judge_and_write(config, after, before, run.path)
    write_report(run.path)
    reporter.say(headline(record))
    if config.safety is not None:
        reporter.say(red_team_line(record["safety"]))
    if record["judge_was_reward"]:
        reporter.say(
            f"the judge ({', '.join(record['judge_was_reward'])}) is what the policy was trained "
            "on: this win rate says nothing about how good the policy is"
        )
    return run.path


def headline(record: dict[str, Any]) -> str:
    return (
        f"win rate {record['win_rate']:.1%} (95 % interval {record['ci_low']:.1%} to "
        f"{record['ci_high']:.1%}; {record['wins']} wins, {record['ties']} ties, "
        f"{record['losses']} losses)"
    )


def _prompts(
    config: EvaluateConfig, say: Callable[[str], None] | None = None
) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts that both models take, tokenised for each. ``say`` is told what is left out."""
    most, seed, answer = config.max_prompts, config.run.seed, config.rollout.max_tokens
    policy = prompts_for(config.policy, config.data, seed, most, answer, say)
    baseline = prompts_for(config.baseline, config.data, seed, most, answer)
    shared = {prompt.id for prompt in policy} & {prompt.id for prompt in baseline}
    if not shared:
        raise UserError(
            "no prompt is short enough for both models",
            where=config.data.prompts,
            fix="give shorter prompts, or raise data.max_prompt_tokens",
        )
    alone = len(policy) + len(baseline) - 2 * len(shared)
    if alone and say is not None:
        say(f"left out {alone} prompts that only one of the two models takes")
    return [p for p in policy if p.id in shared], [p for p in baseline if p.id in shared]


def evaluate_in_cluster(config: EvaluateConfig, directory: Path) -> dict[str, Any]:
    """Sample both policies, judge, write evaluation.json and samples.jsonl; needs Ray running."""
    after, before = sample_both(config, _prompts(config))
    return judge_and_write(config, after, before, directory)


def sample_both(
    config: EvaluateConfig,
    prompts: tuple[list[Prompt], list[Prompt]],
    files: Sequence[Shipment] = (Shipment(), Shipment()),
) -> tuple[list[Rollout], list[Rollout]]:
    """Completions of policy and baseline, sampled side by side; needs Ray running."""
    policy_prompts, baseline_prompts = prompts
    longest = max(len(p.token_ids) for p in (*policy_prompts, *baseline_prompts))
    jobs = [
        Sampling(
            model=model,
            prompts=own,
            samples=config.samples,
            rollout=config.rollout,
            max_prompt_tokens=longest,
            # The same seed for both: a policy compared with itself then ties everywhere.
            seed=config.run.seed,
            files=sent,
        )
        for model, own, sent in (
            (config.policy, policy_prompts, files[0]),
            (config.baseline, baseline_prompts, files[1]),
        )
    ]
    after, before = sample_in_cluster(jobs)
    return after, before


def judges_trained_with(config: EvaluateConfig) -> list[str]:
    """Names of the judge's sources, or of the AI judge, that were the reward of the policy's own
    training, as the run that the policy lies in says: scores of these say how far they were
    optimised, not more."""
    sources = _rewards_of(Path(config.policy.path))
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
            return [
                source for tree in trees for source in tree.get("reward", {}).get("sources", [])
            ]
    return []


def _identity(source: Mapping[str, Any]) -> tuple[str, str]:
    """Kind and place; a path is the same however it is written."""
    path = str(source.get("path") or "")
    file, colon, name = path.partition(".py:")
    where = str(Path(file + colon.rstrip(":")).absolute()) + name if path else ""
    rules = {k: v for k, v in source.items() if k not in ("name", "weight", "path") and v}
    return where, "" if path else json.dumps(rules, sort_keys=True, default=str)


def judge_and_write(
    config: EvaluateConfig, after: Sequence[Rollout], before: Sequence[Rollout], directory: Path
) -> dict[str, Any]:
    from learner.evaluation.samples import Sample, write_samples
    from learner.evaluation.win_rate import length_controlled, outcomes, win_rate

    judged = _judged(config, after, before)
    pairs = judged.scores
    ids = [rollout.prompt.id for rollout in before]
    rate = win_rate(pairs, ids, tie_margin=config.tie_margin, seed=config.run.seed)
    lengths = [[len(r.text.split()) for r in answers] for answers in (after, before)]
    record: dict[str, Any] = {
        **rate.as_record(),
        **judged.record,
        "judge_was_reward": judges_trained_with(config),
        "policy": config.policy.path,
        "baseline": config.baseline.path,
        "mean_score_policy": statistics.fmean(policy for policy, _ in pairs),
        "mean_score_baseline": statistics.fmean(baseline for _, baseline in pairs),
        "mean_length_policy": statistics.fmean(lengths[0]),
        "mean_length_baseline": statistics.fmean(lengths[1]),
    }
    differences = [float(a - b) for a, b in zip(*lengths, strict=True)]
    controlled = length_controlled(outcomes(pairs, config.tie_margin), differences)
    if controlled is not None:
        record["length_controlled_win_rate"] = controlled.rate
    if config.safety is not None:
        record["safety"] = red_team_report(config.safety, {"baseline": before, "policy": after})
    write_json(directory / "evaluation.json", record)
    write_samples(
        directory / "samples.jsonl",
        [
            Sample(prompt=_question(b), before=b.text, after=a.text, before_score=y, after_score=x)
            for a, b, (x, y) in zip(after, before, pairs, strict=True)
        ],
    )
    return record


def _check_judge(config: EvaluateConfig, prompts: Sequence[Prompt]) -> None:
    """Raises UserError for a judge that cannot be used, before anything is sampled."""
    if config.judge is not None:
        check_rewards(config.judge, prompts)
    if config.ai_judge is not None:
        make_asker(config.ai_judge, config.cluster).close()
    if config.safety is not None:
        check_safety(config.safety)


def _judged(
    config: EvaluateConfig, after: Sequence[Rollout], before: Sequence[Rollout]
) -> Compared:
    if config.ai_judge is not None:
        return compare_policies(config.ai_judge, config.criteria, config.cluster, after, before)
    rewards = config.judge
    assert rewards is not None  # the config has one of the two
    judged = scores_of(rewards, [(config.policy, after), (config.baseline, before)])
    scores = [(a.value, b.value) for a, b in zip(*judged, strict=True)]
    return Compared(scores, {"judge": ", ".join(source.name for source in rewards.sources)})


def _question(rollout: Rollout) -> str:
    return prompt_text(rollout.prompt.messages)
