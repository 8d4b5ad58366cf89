"""Accord from Python: ``import accord`` in a script or a notebook.

Every function here does what the command of its name does, through the same code; models, rows and
rewards may be objects of the session instead of files. docs/python.md shows each in use.

A model is a directory, a hub id, or a loaded transformers model together with its tokenizer. Rows
are a path, ``datasets:NAME``, or a list. ``config`` is a TOML file, a tree whose keys may be dotted
(``{"learner.lr": 1e-5}``) or a config object; arguments of the call go over it. Each training
function returns a ``Run``. A mistake raises ``UserError``; Ctrl-C raises ``KeyboardInterrupt`` when
a checkpoint is on disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.assembly.from_python import AnyConfig, draft, put_algorithm
from cluster.assembly.user_objects import reward_sources
from cluster.contracts.callbacks import STOP, AnyCallback, Callback, StepInfo
from cluster.contracts.config.evaluate import EvaluateConfig
from cluster.contracts.config.file import check_config, tree_of
from cluster.contracts.config.offline import DpoConfig, RewardModelConfig, SftConfig
from cluster.contracts.config.reward import (
    FunctionSource,
    GrpcSource,
    RewardConfig,
    RewardModelSource,
    RulesSource,
)
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import AccordError, BadReward, UserError
from cluster.contracts.registry import (
    advantage_estimator,
    command,
    policy_loss,
    preference_loss,
    reward_kind,
    weight_transport,
)
from cluster.contracts.samples import SampleInfo, unscored
from cluster.machine.environment import prepare_environment
from cluster.runs.console import Reporter
from cluster.runs.view import RunView as Run

__all__ = [
    "STOP",
    "AccordError",
    "BadReward",
    "Callback",
    "DpoConfig",
    "EvaluateConfig",
    "FunctionSource",
    "GrpcSource",
    "RewardConfig",
    "RewardModelConfig",
    "RewardModelSource",
    "RulesSource",
    "Run",
    "SampleInfo",
    "SftConfig",
    "StepInfo",
    "TrainConfig",
    "UserError",
    "advantage_estimator",
    "command",
    "dpo",
    "evaluate",
    "generate",
    "load_policy",
    "load_run",
    "plan",
    "policy_loss",
    "preference_loss",
    "resume",
    "reward_kind",
    "reward_model",
    "sft",
    "train",
    "weight_transport",
]  # fmt: skip

Model = Any  # str | Path | transformers.PreTrainedModel, which is not imported here
Rows = str | Path | Iterable[Any]
Reward = Any  # one of, or a sequence of: function, object, path, config source


def train(
    model: Model = None,
    prompts: Rows | None = None,
    reward: Reward = None,
    *,
    tokenizer: Any = None,
    algorithm: str | None = None,
    steps: int | None = None,
    config: AnyConfig = None,
    callbacks: Sequence[AnyCallback] = (),
    name: str | None = None,
    runs_dir: str | Path | None = None,
    seed: int | None = None,
    quiet: bool = False,
) -> Run:
    """Train a policy on-line, as `accord train` does.

    ``prompts``: texts, conversations (lists of messages), or rows whose columns reach the reward.
    ``reward``: a function or callable object ``reward(prompts, completions, **columns) -> list of
    numbers``, ``"file.py:function"``, a reward model's directory, a config source such as
    ``RulesSource``, or several of these, which are added up. A function runs in another process:
    it is sent there as it is now, and what it prints or changes stays there.
    ``algorithm``: ppo, grpo, rloo, reinforce++, reinforce-baseline, gspo or cispo.
    ``callbacks``: functions called after each step, or instances of ``Callback``.
    """
    prepare_environment()
    with draft("train", config, name=name, runs_dir=runs_dir, seed=seed) as new:
        put_algorithm(new.tree, algorithm)
        new.put_model("model", model, tokenizer)
        new.put_rows("data.prompts", prompts, "prompts", "prompt")
        if reward is not None:
            new.put("reward.sources", reward_sources(reward, new.inputs))
        new.put("batch.steps", steps)
        checked = new.checked(TrainConfig)
        from cluster.assembly.training import train_policy

        return Run(train_policy(checked, Reporter(quiet=quiet), callbacks=callbacks))


def sft(
    model: Model = None,
    data: Rows | None = None,
    *,
    tokenizer: Any = None,
    config: AnyConfig = None,
    callbacks: Sequence[AnyCallback] = (),
    name: str | None = None,
    runs_dir: str | Path | None = None,
    seed: int | None = None,
    quiet: bool = False,
) -> Run:
    """Supervised fine-tuning, as `accord sft` does. ``data``: texts, conversations, or rows with
    messages, prompt and completion, or text."""
    prepare_environment()
    with draft("sft", config, name=name, runs_dir=runs_dir, seed=seed) as new:
        new.put_model("model", model, tokenizer)
        new.put_rows("data.path", data, "data", "text")
        checked = new.checked(SftConfig)
        from cluster.assembly.offline import run_sft

        return Run(run_sft(checked, Reporter(quiet=quiet), callbacks=callbacks))


def reward_model(
    model: Model = None,
    pairs: Rows | None = None,
    *,
    tokenizer: Any = None,
    config: AnyConfig = None,
    callbacks: Sequence[AnyCallback] = (),
    name: str | None = None,
    runs_dir: str | Path | None = None,
    seed: int | None = None,
    quiet: bool = False,
) -> Run:
    """A reward model from comparisons, as `accord reward-model` does. ``pairs``: rows with prompt,
    chosen and rejected, or a preference store."""
    prepare_environment()
    with draft("reward-model", config, name=name, runs_dir=runs_dir, seed=seed) as new:
        new.put_model("model", model, tokenizer)
        new.put_rows("data.path", pairs, "pairs", "chosen")
        checked = new.checked(RewardModelConfig)
        from cluster.assembly.offline import run_reward_model

        return Run(run_reward_model(checked, Reporter(quiet=quiet), callbacks=callbacks))


def dpo(
    model: Model = None,
    pairs: Rows | None = None,
    *,
    tokenizer: Any = None,
    config: AnyConfig = None,
    callbacks: Sequence[AnyCallback] = (),
    name: str | None = None,
    runs_dir: str | Path | None = None,
    seed: int | None = None,
    quiet: bool = False,
) -> Run:
    """A policy trained directly on preferences, as `accord dpo` does. ``pairs``: as for
    ``reward_model``; with ``{"loss": "kto"}`` also rows with prompt, completion and label."""
    prepare_environment()
    with draft("dpo", config, name=name, runs_dir=runs_dir, seed=seed) as new:
        new.put_model("model", model, tokenizer)
        new.put_rows("data.path", pairs, "pairs", "chosen")
        checked = new.checked(DpoConfig)
        from cluster.assembly.offline import run_dpo

        return Run(run_dpo(checked, Reporter(quiet=quiet), callbacks=callbacks))


def resume(
    run: Run | str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    callbacks: Sequence[AnyCallback] = (),
    quiet: bool = False,
) -> Run:
    """Continue a run from its newest checkpoint, as `--resume` does. ``overrides``: settings that
    do not change what is learnt, such as ``{"batch.steps": 200}``."""
    prepare_environment()
    from cluster.assembly.resume import resume_run

    found = load_run(run)
    return Run(resume_run(found, overrides or {}, Reporter(quiet=quiet), callbacks))


def generate(
    model: Model,
    prompts: Rows,
    *,
    tokenizer: Any = None,
    samples: int = 1,
    max_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    quiet: bool = False,
    **limits: Any,
) -> list[SampleInfo]:
    """Completions of each prompt, ``samples`` of each, in the order of the prompts, as
    `accord generate` samples them. Their scores are None. ``limits``: ``top_k``, ``top_p``,
    ``min_p``, ``min_tokens``, ``allowed_tokens``, ``banned_tokens`` and ``stop`` of [rollout]."""
    prepare_environment()
    from cluster.assembly.generate import generate_completions
    from cluster.assembly.user_objects import temporary_inputs

    with temporary_inputs() as inputs:
        rollouts = generate_completions(
            inputs.model(model, tokenizer, "model"),
            inputs.rows(prompts, "prompts", "prompt"),
            samples=samples, max_tokens=max_tokens, temperature=temperature, seed=seed,
            reporter=Reporter(quiet=quiet), limits=limits,
        )  # fmt: skip
    return unscored(rollouts, samples)


def evaluate(
    policy: Model = None,
    baseline: Model = None,
    prompts: Rows | None = None,
    judge: Reward = None,
    *,
    tokenizer: Any = None,
    config: AnyConfig = None,
    name: str | None = None,
    runs_dir: str | Path | None = None,
    seed: int | None = None,
    quiet: bool = False,
) -> Run:
    """Compare two policies on the same prompts, as `accord evaluate` does; the win rate is in
    ``Run.evaluation``. ``judge``: as ``reward`` of ``train``, and not the one trained with.
    ``tokenizer``: of every policy that is given as a loaded model."""
    prepare_environment()
    with draft("evaluate", config, name=name, runs_dir=runs_dir, seed=seed) as new:
        for key, model in (("policy", policy), ("baseline", baseline)):
            own = None if isinstance(model, str | Path) else tokenizer
            new.put_model(key, model, own)
        new.put_rows("data.prompts", prompts, "prompts", "prompt")
        if judge is not None:
            new.put("judge.sources", reward_sources(judge, new.inputs))
        checked = new.checked(EvaluateConfig)
        from cluster.assembly.evaluation import run_evaluation

        return Run(run_evaluation(checked, Reporter(quiet=quiet)))


def plan(config: AnyConfig, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Check a training config without starting anything, as `accord plan` does.

    ``config``: every value in force; ``auto``: what was chosen for this machine, and why;
    ``derived``: what follows from them.
    """
    from cluster.measure.plan import checked_plan

    checked = check_config(
        TrainConfig, tree_of({**tree_of(config), **(overrides or {})}), where="accord.plan"
    )
    return checked_plan(checked)[1]


def load_run(path: Run | str | Path) -> Run:
    """A run directory, also one that the command line made or that goes on."""
    return path if isinstance(path, Run) else Run.open(path)


def load_policy(run: Run | str | Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a run's policy, as transformers loads them."""
    from cluster.assembly.user_objects import load_trained

    return load_trained(load_run(run).policy_path)
