"""`accord quickstart`: the whole loop on the embedded help-desk task.

    demonstrations ─▶ SFT ─▶ answers (vLLM) ─▶ annotators ─▶ reward model ─▶ PPO
                                                         report ◀─ gold judge ◀─┘

Every stage is the one its own command runs, on files that lie in the run directory afterwards, so
each can be repeated by hand with the configs that are there.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cluster.quickstart.helpdesk.gold as gold_module
from cluster.assembly.auto.resolve import resolve_here
from cluster.assembly.evaluation import evaluate_in_cluster, headline
from cluster.assembly.offline import run_reward_model, run_sft
from cluster.assembly.preferences import open_store, statistics
from cluster.assembly.prepare import prepare
from cluster.assembly.run_session import run_session
from cluster.assembly.sampling import Sampling, answer_row, prompts_for, sample_in_cluster
from cluster.assembly.training import new_run
from cluster.assembly.training_record import READING, Training
from cluster.assembly.training_run import publish_policy, train_in_cluster
from cluster.contracts.config.algorithm import AlgorithmConfig, BatchConfig, KLConfig
from cluster.contracts.config.base import (
    ClusterConfig,
    LoggingConfig,
    ModelConfig,
    RunConfig,
    Section,
)
from cluster.contracts.config.evaluate import EvaluateConfig
from cluster.contracts.config.learner import CheckpointConfig, LearnerConfig
from cluster.contracts.config.offline import (
    FitConfig,
    PairsConfig,
    RewardModelConfig,
    SftConfig,
    SftDataConfig,
)
from cluster.contracts.config.reward import FunctionSource, RewardConfig, RewardModelSource
from cluster.contracts.config.rollout import DataConfig, RolloutConfig
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.durable import write_json, write_text
from cluster.contracts.errors import UserError
from cluster.contracts.records import Rollout
from cluster.machine.cores import core_plan, own_cores
from cluster.machine.ray_session import ray_cluster
from cluster.runs.console import Reporter, result
from cluster.runs.run import Run
from cluster.runs.start_log import StartLog

MAX_PROMPT_TOKENS = 48
MAX_ANSWER_TOKENS = 64
ANSWERS_PER_PROMPT = 6
JUDGE_NOTE = (
    "gold is the task's own rule for a good completion. The simulated annotators imitate it with "
    "noise; training never saw it."
)


class QuickstartConfig(Section):
    """What the quickstart's size and seed decide; written to its run directory."""

    seed: int = 0
    scale: float = 1.0
    demonstrations: int = 24000
    preference_prompts: int = 1600
    rl_prompts: int = 1600
    eval_prompts: int = 400
    ppo_steps: int = 60
    kl_coef: float = 0.08

    @staticmethod
    def of(seed: int, scale: float, kl_coef: float | None) -> QuickstartConfig:
        if not 0.01 <= scale <= 10:
            raise UserError(f"--scale {scale} is not from 0.01 to 10", where="command line")
        base = QuickstartConfig()
        return QuickstartConfig(
            seed=seed,
            scale=scale,
            demonstrations=max(200, round(base.demonstrations * scale)),
            preference_prompts=max(60, round(base.preference_prompts * scale)),
            rl_prompts=max(64, min(base.rl_prompts, round(base.rl_prompts * scale))),
            eval_prompts=max(20, min(base.eval_prompts, round(base.eval_prompts * scale))),
            ppo_steps=max(3, round(base.ppo_steps * scale)),
            kl_coef=base.kl_coef if kl_coef is None else kl_coef,
        )


@dataclass(slots=True)
class _Job:
    """The run and where its parts lie."""

    config: QuickstartConfig
    run: Run
    reporter: Reporter
    stages: list[dict[str, Any]] = field(default_factory=list)

    def path(self, *parts: str) -> Path:
        return self.run.path.joinpath(*parts)

    def child(self, name: str, **parents: str) -> RunConfig:
        return RunConfig(name=name, dir=str(self.run.path), seed=self.config.seed, parents=parents)

    @contextmanager
    def timed(self, name: str, parents: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
        """Time a stage; what is put into the dict becomes its detail in stages.json."""
        began = time.monotonic()
        detail: dict[str, Any] = {}
        yield detail
        self.stages.append(
            {
                "name": name,
                "seconds": round(time.monotonic() - began, 1),
                "detail": ", ".join(f"{k} {v}" for k, v in detail.items()),
                "parents": list(parents),
            }
        )
        write_json(self.path("stages.json"), self.stages)


def quickstart(
    directory: str, name: str, seed: int, scale: float, kl_coef: float | None, reporter: Reporter
) -> Path:
    """Run the whole loop; prints where the report is and how to talk to the result."""
    began = time.monotonic()
    config = QuickstartConfig.of(seed, scale, kl_coef)
    if not name and not Path(directory, "quickstart").exists():
        name = "quickstart"  # the name that examples/ refer to; later runs are named by their time
    run = Run.create(directory, name, "quickstart", config, seed=seed)
    job = _Job(config, run, reporter)
    with run_session(run, reporter):
        _make_data(job)
        _fine_tune(job)
        with ray_cluster(ClusterConfig(address="local")) as ray_info:
            _collect_preferences(job)
            _learn_reward(job)
            _reinforce(job, ray_info)
            record = _evaluate(job)
    report = _report(job)
    reporter.say(headline(record))
    reporter.say(f"whole loop: {time.monotonic() - began:.0f} s")
    result(f"report: {report}")
    result(
        f"talk to it: accord chat {run.path} --no-history "  # it was trained on single questions
        f"--before {job.path('sft', 'policy')}"
    )
    return run.path


def _make_data(job: _Job) -> None:
    """Demonstrations, prompts, a tokenizer and a model with random weights."""
    from cluster.quickstart.helpdesk import demonstrations, files, questions
    from learner.models.tiny import fresh_model, train_tokenizer

    config, data = job.config, job.path("data")
    with job.timed("data") as detail, job.reporter.stage("making the task and a small model"):
        demos = demonstrations.sample_demonstrations(config.seed, config.demonstrations)
        detail["demonstrations"] = files.write_sft(data / "demonstrations.jsonl", demos)
        wanted: dict[questions.Split, int] = {
            "preference": config.preference_prompts,
            "rl": config.rl_prompts,
            "eval": config.eval_prompts,
        }
        for split, count in wanted.items():
            rows = questions.sample_questions(config.seed, count, split)
            detail[split] = files.write_prompts(data / f"{split}_prompts.jsonl", rows)
        corpus = demonstrations.corpus(config.seed, 4000)
        tokenizer = train_tokenizer(corpus, 640, job.path("base"))
        fresh_model(
            tokenizer, job.path("base"), hidden=128, layers=4, heads=4, intermediate=384,
            arch="qwen2", seed=config.seed,
        )  # fmt: skip


def _fine_tune(job: _Job) -> None:
    config = SftConfig(
        run=job.child("sft"),
        model=ModelConfig(path=str(job.path("base")), dtype="float32"),
        data=SftDataConfig(path=str(job.path("data", "demonstrations.jsonl"))),
        fit=FitConfig(
            lr=4e-3,
            rows_per_step=32,
            tokens_per_microbatch=2048,
            schedule="linear",
            warmup_ratio=0.03,
            max_tokens=128,
            eval_fraction=0.02,
            eval_every=200,
            threads=len(own_cores()),
        ),
        logging=LoggingConfig(ray_metrics=False),
    )
    with job.timed("sft", ["data"]) as detail:
        run = run_sft(config, job.reporter)
        detail |= _last_numbers(run)


def _collect_preferences(job: _Job) -> None:
    """Answers of the fine-tuned policy, by vLLM; simulated annotators compare them in pairs."""
    with job.timed("preferences", ["sft"]) as detail:
        with job.reporter.stage("sampling answers with vLLM"):
            answers = _sample(job, "preference", samples=ANSWERS_PER_PROMPT)
        rows = "".join(json.dumps(answer_row(a), ensure_ascii=False) + "\n" for a in answers)
        write_text(job.path("data", "sft_answers.jsonl"), rows)
        store = open_store(job.path("preferences.db"), must_exist=False)
        _annotate(job, store, answers)
        from reward_service.preferences.export import export_preferences

        exported = export_preferences(store, job.path("data", "pairs.jsonl"))
        write_json(job.path("preferences.json"), statistics(store))
        detail |= {"answers": len(answers), "pairs": exported.rows, "ties": exported.ties}


def _sample(job: _Job, split: str, samples: int) -> list[Rollout]:
    model = ModelConfig(path=str(job.path("sft", "policy")))
    data = DataConfig(
        prompts=str(job.path("data", f"{split}_prompts.jsonl")), max_prompt_tokens=MAX_PROMPT_TOKENS
    )
    sampling = Sampling(
        model=model,
        prompts=prompts_for(model, data, job.config.seed),
        samples=samples,
        rollout=RolloutConfig(max_tokens=MAX_ANSWER_TOKENS, workers=2, gpus=0),
        max_prompt_tokens=MAX_PROMPT_TOKENS,
        seed=job.config.seed,
    )
    return sample_in_cluster([sampling])[0]


def _pairs(answers: Sequence[Rollout], seed: int) -> Iterator[tuple[Rollout, Rollout]]:
    """Of each prompt's answers two pairs, and two answers against answers to other prompts.

    Within one prompt nearly every answer is about the question, so comparisons among them hardly
    teach a reward model to read it: it then pays for any pleasant answer to any question, and PPO
    finds that out (Liu et al. 2024, "RRM: Robust Reward Model Training"). One of the other prompts
    is like this one, of the same topic or about the same product, so that details count.
    """
    rng = random.Random(f"pairs/{seed}")
    groups = [
        answers[i : i + ANSWERS_PER_PROMPT] for i in range(0, len(answers), ANSWERS_PER_PROMPT)
    ]
    alike: dict[str, list[Sequence[Rollout]]] = {}
    for group in groups:
        for key in ("topic", "product"):
            alike.setdefault(f"{key}/{group[0].prompt.metadata[key]}", []).append(group)
    for own in groups:
        yield own[0], own[1]
        yield own[2], own[3]
        key = rng.choice(("topic", "product"))
        yield own[4], rng.choice(alike[f"{key}/{own[0].prompt.metadata[key]}"])[5]
        yield own[5], rng.choice(groups)[4]


def _mismatched(first: Rollout, second: Rollout) -> bool:
    return first.prompt.id != second.prompt.id


def _annotate(job: _Job, store: Any, answers: Sequence[Rollout]) -> None:
    """Each pair goes to one annotator, every fifth to two (so that agreement can be measured)."""
    from cluster.quickstart.helpdesk.annotators import ANNOTATORS, label_pair
    from reward_service.preferences.records import (
        PAIR_RANKS,
        Candidate,
        Item,
        Judgement,
        derived_id,
        utc_now,
    )

    rng, now = random.Random(job.config.seed), utc_now()
    items, labels = [], []
    for number, (first, second) in enumerate(_pairs(answers, job.config.seed)):
        if first.text == second.text:
            continue
        item = Item(
            id=derived_id(first.prompt.id, number),
            messages=first.prompt.messages,
            completions=tuple(
                Candidate(text=text, policy_version="sft", sampling={"temperature": 1.0})
                for text in (first.text, second.text)
            ),
            topic=str(first.prompt.metadata.get("topic", "")),
            source="quickstart/mismatched" if _mismatched(first, second) else "quickstart/sft",
            license="Apache-2.0",
            created_at=now,
        )
        items.append(item)
        for annotator in rng.sample(ANNOTATORS, 2 if number % 5 == 0 else 1):
            order = "ab" if rng.random() < 0.5 else "ba"
            label = label_pair(annotator, first.prompt.metadata, first.text, second.text, rng)
            labels.append(
                Judgement(
                    id=derived_id(item.id, annotator.name),
                    item_id=item.id,
                    annotator_id=annotator.name,
                    answer="all_bad" if label.choice == "both_bad" else "ranking",
                    ranks=PAIR_RANKS.get(label.choice, ()),
                    source="simulated",
                    strength=float(label.strength),
                    duration_s=label.duration_s,
                    shown_order=order,
                    consent="simulated",
                    guideline_version="helpdesk-1",
                    created_at=now,
                )
            )
    store.add(items, labels)


def _learn_reward(job: _Job) -> None:
    config = RewardModelConfig(
        run=job.child("reward_model", preferences=str(job.path("preferences.db"))),
        model=ModelConfig(path=str(job.path("sft", "policy")), dtype="float32"),
        data=PairsConfig(path=str(job.path("data", "pairs.jsonl"))),
        policy_samples=str(job.path("data", "sft_answers.jsonl")),
        fit=FitConfig(
            lr=7e-4,
            epochs=2,
            rows_per_step=32,
            tokens_per_microbatch=2048,
            schedule="linear",
            max_tokens=128,
            eval_fraction=0.15,
            eval_every=100,
            weight_decay=0.01,
            threads=len(own_cores()),
        ),
        logging=LoggingConfig(ray_metrics=False),
    )
    with job.timed("reward model", ["sft", "preferences"]) as detail:
        run = run_reward_model(config, job.reporter)
        shutil.copy(run / "reward_model.json", job.path("reward_model.json"))
        detail |= _last_numbers(run)


def ppo_config(job: _Job) -> TrainConfig:
    reward_model = str(job.path("reward_model", "reward_model"))
    return TrainConfig(
        run=job.child("ppo"),
        model=ModelConfig(path=str(job.path("sft", "policy"))),
        data=DataConfig(
            prompts=str(job.path("data", "rl_prompts.jsonl")), max_prompt_tokens=MAX_PROMPT_TOKENS
        ),
        reward=RewardConfig(sources=[RewardModelSource(path=reward_model)]),
        batch=BatchConfig(prompts_per_step=32, samples_per_prompt=4, steps=job.config.ppo_steps),
        rollout=RolloutConfig(max_tokens=MAX_ANSWER_TOKENS, gpus=0),
        algorithm=AlgorithmConfig(missing_eos_penalty=1.0, kl=KLConfig(coef=job.config.kl_coef)),
        learner=LearnerConfig(
            gpus=0,
            lr=4e-4,
            warmup_steps=8,
            minibatches=4,
            value_path=reward_model,
            reference_path=str(job.path("sft", "policy")),
        ),
        checkpoint=CheckpointConfig(every=20),
    )


def _reinforce(job: _Job, ray_info: dict[str, Any]) -> None:
    config = resolve_here(ppo_config(job)).config
    with job.timed("ppo", ["sft", "reward model"]) as detail:
        start = StartLog(job.reporter, time.monotonic())
        with start.part(READING):
            prepared = prepare(config)
        run = new_run(config)
        cores = core_plan(config, own_cores())
        with run_session(run, job.reporter, start=start) as session:
            train_in_cluster(Training(prepared=prepared, session=session, cores=cores), ray_info)
        detail |= {"steps": config.batch.steps}
        publish_policy(run.path / "policy", job.path("policy"))
        for name in ("metrics.jsonl", "events.jsonl", "timeline.json"):
            shutil.copy(run.path / name, job.path(name))


def _evaluate(job: _Job) -> dict[str, Any]:
    """The gold judge, which nothing before has seen, on prompts nothing before has seen."""
    judge = FunctionSource(path=f"{gold_module.__file__}:gold", name="gold")
    config = EvaluateConfig(
        run=job.child("evaluation"),
        policy=ModelConfig(path=str(job.path("policy"))),
        baseline=ModelConfig(path=str(job.path("sft", "policy"))),
        data=DataConfig(
            prompts=str(job.path("data", "eval_prompts.jsonl")), max_prompt_tokens=MAX_PROMPT_TOKENS
        ),
        judge=RewardConfig(sources=[judge]),
        tie_margin=0.01,
        rollout=RolloutConfig(max_tokens=MAX_ANSWER_TOKENS, gpus=0),
    )
    with job.timed("evaluation", ["ppo", "sft"]) as detail, job.reporter.stage("evaluation"):
        record = evaluate_in_cluster(config, job.run.path)
        write_json(job.run.path / "evaluation.json", {**record, "judge_note": JUDGE_NOTE})
        detail["win rate"] = f"{record['win_rate']:.3f}"
    return record


def _report(job: _Job) -> Path:
    from learner.evaluation.report import write_report

    return write_report(job.run.path)


def _last_numbers(run: Path) -> dict[str, str]:
    numbers = json.loads((run / "fit.json").read_text(encoding="utf-8"))["evaluation"]
    return {name: f"{value:.3f}" for name, value in numbers.items()}
