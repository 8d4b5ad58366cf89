"""The stages of a pipeline that compute: SFT, sampling, reward model, policy, evaluation. Each is
the function that its own command runs. Importing this module takes torch; who waits for people does
without it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.assembly.auto.resolve import resolve_here
from cluster.assembly.best_of_n import BEST, run_best_of_n
from cluster.assembly.evaluation import run_evaluation
from cluster.assembly.offline import (
    resume_offline,
    run_dpo,
    run_reward_model,
    run_sft,
)
from cluster.assembly.training import train_policy
from cluster.assembly.training_resume import resume_training
from cluster.contracts.config.base import ClusterConfig, ModelConfig
from cluster.contracts.config.best_of_n import BestOfNConfig
from cluster.contracts.config.evaluate import EvaluateConfig
from cluster.contracts.config.offline import DpoConfig, RewardModelConfig, SftConfig
from cluster.contracts.config.pipeline import PipelineConfig
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import UserError
from cluster.contracts.registry import ADVANTAGE_ESTIMATORS
from cluster.pipeline.completions import COMPLETIONS
from cluster.pipeline.rounds import STORE, Outcome, Round
from cluster.pipeline.sampling import sample_round
from cluster.runs.console import Reporter

RATES = ("win_rate", "ci_low", "ci_high")


class Trainings:
    """Of one pipeline. A run that an earlier attempt has left continues from its checkpoint."""

    def __init__(self, config: PipelineConfig, run: Path, reporter: Reporter) -> None:
        self._config = config
        self._run = run
        self._reporter = reporter

    def do(self, name: str, at: Round) -> Outcome:
        stage: Callable[[Round], Outcome] = getattr(self, f"_{name}")
        return stage(at)

    def cluster(self, at: Round) -> ClusterConfig:
        """Of the stages from here on. Ray is told how many cores it may deal out when it starts, so
        the stage that needs the most decides."""
        if self._config.train is None:
            return self._config.cluster
        return resolve_here(self._train_config(at)).config.cluster

    # -- the stages --------------------------------------------------------------------------------

    def _sft(self, at: Round) -> Outcome:
        config = self._config.of_stage(
            SftConfig, "sft", {"run": self._child(at, "sft"), "model": self._config.model}
        )
        run = self._fit("sft", at.path("sft"), lambda: run_sft(config, self._reporter))
        return Outcome(
            run=run,
            made=(run / "policy",),
            came_from=(config.model.path, config.data.path),
            detail=last_figures(run),
        )

    def _sample(self, at: Round) -> Outcome:
        folder = fresh(at.path("completions"))
        counts = sample_round(self._config, at, self._model(at.before), folder, self._reporter)
        return Outcome(made=(folder,), came_from=(_run_of(at.before),), detail=counts)

    def _reward_model(self, at: Round) -> Outcome:
        values = self._learnt(at, "reward_model") | {
            "policy_samples": str(at.path("completions", COMPLETIONS))
        }
        config = self._config.of_stage(RewardModelConfig, "reward_model", values)
        run = self._fit(
            "reward-model",
            at.path("reward_model"),
            lambda: run_reward_model(config, self._reporter),
        )
        return Outcome(
            run=run,
            made=(run / "reward_model",),
            came_from=(_run_of(at.before), at.path("labels"), at.path("completions")),
            detail=last_figures(run),
        )

    def _policy(self, at: Round) -> Outcome:
        by = self._config.policy_stage
        run, came_from = {
            "train": self._trained, "dpo": self._from_labels, "best_of_n": self._from_the_best
        }[by](at)  # fmt: skip
        return Outcome(
            run=run, made=(at.policy,), came_from=(_run_of(at.before), *came_from),
            detail={"by": by, **last_figures(run)},
        )  # fmt: skip

    def _evaluate(self, at: Round) -> Outcome:
        """Against the policy before the round, and, where that is another one, the start's."""
        folder = at.path("evaluation")
        before = self._evaluated(at, folder, at.before)
        made: tuple[Path, ...] = (folder / "evaluation.json",)
        detail: dict[str, Any] = {"against_before": before, "against_start": before}
        if at.before != at.start:
            another = at.path("evaluation-start")
            detail["against_start"] = self._evaluated(at, another, at.start)
            made += (another / "evaluation.json",)
        return Outcome(
            run=folder,
            made=made,
            came_from=(at.path("policy"), _run_of(at.before), _run_of(at.start)),
            detail={**detail["against_start"], **detail},
        )

    # -- how a round's policy is made --------------------------------------------------------------

    def _trained(self, at: Round) -> tuple[Path, tuple[Path, ...]]:
        config = self._train_config(at)
        run = self._begun_or_continued(
            at.path("policy"),
            lambda: train_policy(config, self._reporter),
            lambda path: resume_training(path, [], self._reporter),
        )
        return run, (at.path("reward_model"),)

    def _from_labels(self, at: Round) -> tuple[Path, tuple[Path, ...]]:
        config = self._config.of_stage(DpoConfig, "dpo", self._learnt(at, "policy"))
        run = self._fit("dpo", at.path("policy"), lambda: run_dpo(config, self._reporter))
        return run, (at.path("labels"),)

    def _from_the_best(self, at: Round) -> tuple[Path, tuple[Path, ...]]:
        folder = at.path("best_of_n")
        if _status(folder) != "finished":
            shutil.rmtree(folder, ignore_errors=True)
            values = {**self._of_model(at, "best_of_n"), "cluster": self._config.cluster}
            run_best_of_n(
                self._config.of_stage(BestOfNConfig, "best_of_n", values, _reward_of(at)),
                self._reporter,
            )
        values = {**self._of_model(at, "policy"), "data.path": str(folder / BEST)}
        config = self._config.of_stage(SftConfig, "best_of_n_sft", values)
        run = self._fit("sft", at.path("policy"), lambda: run_sft(config, self._reporter))
        return run, (at.path("reward_model"), folder)

    def _train_config(self, at: Round) -> TrainConfig:
        values = {**self._of_model(at, "policy"), "cluster": self._config.cluster}
        config = self._config.of_stage(TrainConfig, "train", values, _reward_of(at))
        if ADVANTAGE_ESTIMATORS[config.algorithm.advantage].needs_values:
            learner = config.learner.model_copy(update={"value_path": _reward_of(at)})
            config = config.model_copy(update={"learner": learner})
        return config

    def _evaluated(self, at: Round, folder: Path, baseline: str) -> dict[str, float]:
        shutil.rmtree(folder, ignore_errors=True)
        values = {
            "run": {"dir": str(folder.parent), "name": folder.name, "seed": self._config.run.seed},
            "cluster": self._config.cluster,
            "policy": self._model(str(at.policy)),
            "baseline": self._model(baseline),
        }
        config = self._config.of_stage(EvaluateConfig, "evaluate", values)
        run_evaluation(config, self._reporter)
        found = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        return {name: found[name] for name in RATES}

    # -- what they share ---------------------------------------------------------------------------

    def _fit(self, command: Any, folder: Path, begin: Callable[[], Path]) -> Path:
        return self._begun_or_continued(
            folder, begin, lambda path: resume_offline(command, path, [], self._reporter)
        )

    def _begun_or_continued(
        self, folder: Path, begin: Callable[[], Path], go_on: Callable[[str], Path]
    ) -> Path:
        """A run with checkpoints, by what an earlier attempt has left in its folder."""
        status = _status(folder)
        if status == "finished":
            return folder
        if status is not None:
            return go_on(str(folder))
        shutil.rmtree(folder, ignore_errors=True)
        return begin()

    def _child(self, at: Round, name: str) -> dict[str, Any]:
        seed = self._config.run.seed + 1000 * max(0, at.number - 1)
        return {"dir": str(at.folder), "name": name, "seed": seed}

    def _model(self, path: str) -> ModelConfig:
        if path == self._config.model.path:
            return self._config.model
        return self._config.model.model_copy(update={"path": path, "revision": None})

    def _of_model(self, at: Round, name: str) -> dict[str, Any]:
        return {"run": self._child(at, name), "model": self._model(at.before)}

    def _learnt(self, at: Round, name: str) -> dict[str, Any]:
        """Of a stage that learns from the labels."""
        values = self._of_model(at, name)
        values["run"]["parents"] = {"preferences": str(self._run / STORE)}
        return {**values, "data.path": str(at.path("labels"))}


def fresh(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def last_figures(run: Path) -> dict[str, float]:
    """Of the held-out rows of an offline run; nothing for other runs."""
    file = run / "fit.json"
    if not file.is_file():
        return {}
    found: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))["evaluation"]
    return found


def _reward_of(at: Round) -> str:
    return str(at.path("reward_model", "reward_model"))


def _run_of(policy: str) -> str:
    """The run that made a policy; what is no run's is named itself."""
    folder = Path(policy).parent
    return str(folder) if (folder / "manifest.json").is_file() else policy


def _status(folder: Path) -> str | None:
    """Of a run; None where there is none that could go on."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return str(manifest["status"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise UserError(
            f"is damaged: {problem!r}",
            where=str(folder / "manifest.json"),
            fix="restore it, or remove the folder; the stage is then done again",
        ) from None
