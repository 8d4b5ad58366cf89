"""What the quickstart's size and seed decide, and the pipeline that follows from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cluster.quickstart.helpdesk.annotate as annotate_module
import cluster.quickstart.helpdesk.gold as gold_module
from cluster.contracts.config.base import Section
from cluster.contracts.config.file import check_config
from cluster.contracts.config.pipeline import PipelineConfig
from cluster.contracts.errors import UserError

MAX_PROMPT_TOKENS = 48
MAX_TOKENS = 64  # of a completion


class QuickstartConfig(Section):
    """What the quickstart's size and seed decide; kept in its run's manifest."""

    seed: int = 0
    scale: float = 1.0
    demonstrations: int = 16000
    preference_prompts: int = 1600
    rl_prompts: int = 1600
    eval_prompts: int = 400
    ppo_steps: int = 40
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


def pipeline_config(settings: QuickstartConfig, directory: str, name: str) -> PipelineConfig:
    """One round: SFT, completions, simulated annotators, reward model, PPO, the gold judge."""
    run = Path(directory, name)
    tree = {
        "run": {"dir": directory, "name": name, "seed": settings.seed},
        "model": {"path": str(run / "base")},
        "sft": _sft(run),
        **_labels(run),
        "reward_model": _reward_model(),
        "train": _ppo(run, settings),
        "evaluate": {
            "data": _prompts(run, "eval"),
            # Nothing before has seen this judge, or these prompts.
            "judge": {
                "sources": [
                    {"type": "function", "path": f"{gold_module.__file__}:gold", "name": "gold"}
                ]
            },
            "tie_margin": 0.01,
            "rollout": {"max_tokens": MAX_TOKENS, "gpus": 0},
        },
        "promote": {"min_win_rate": 0.0},
        "cluster": {"address": "local"},
    }
    return check_config(PipelineConfig, tree, where="accord quickstart")


def _sft(run: Path) -> dict[str, Any]:
    fit = {
        "lr": 4e-3,
        "rows_per_step": 32,
        "tokens_per_microbatch": 2048,
        "schedule": "linear",
        "warmup_ratio": 0.03,
        "max_tokens": 128,
        "eval_fraction": 0.02,
        "eval_every": 200,
    }
    path = str(run / "data" / "demonstrations.jsonl")
    return {"data": {"path": path}, "fit": fit, "logging": {"ray_metrics": False}}


def _labels(run: Path) -> dict[str, Any]:
    """Of each prompt's six completions two pairs, and two against completions of other prompts;
    every fifth pair is judged twice, so that agreement can be measured."""
    return {
        "sample": {
            "data": _prompts(run, "preference"),
            "samples": 6,
            "rollout": {"max_tokens": MAX_TOKENS, "workers": 2, "gpus": 0},
        },
        "choice": {"pairs_per_prompt": 4, "mismatched": 0.5, "overlap_share": 0.2},
        "label": {
            "by": "simulated",
            "annotate": f"{annotate_module.__file__}:annotate",
            "data": {"license": "Apache-2.0"},
        },
    }


def _reward_model() -> dict[str, Any]:
    fit = {
        "lr": 7e-4,
        "rows_per_step": 16,
        "tokens_per_microbatch": 2048,
        "schedule": "linear",
        "max_tokens": 128,
        "eval_fraction": 0.15,
        "eval_every": 200,
        "weight_decay": 0.01,
    }
    return {"fit": fit, "logging": {"ray_metrics": False}}


def _ppo(run: Path, settings: QuickstartConfig) -> dict[str, Any]:
    return {
        "data": _prompts(run, "rl"),
        "batch": {"prompts_per_step": 32, "samples_per_prompt": 4, "steps": settings.ppo_steps},
        "rollout": {"max_tokens": MAX_TOKENS, "gpus": 0},
        "algorithm": {"missing_eos_penalty": 1.0, "kl": {"coef": settings.kl_coef}},
        "learner": {
            "gpus": 0,
            "lr": 6e-4,
            "schedule": "linear",
            "warmup_steps": 5,
            "minibatches": 4,
        },
        "checkpoint": {"every": 20},
    }


def _prompts(run: Path, split: str) -> dict[str, Any]:
    path = str(run / "data" / f"{split}_prompts.jsonl")
    return {"prompts": path, "max_prompt_tokens": MAX_PROMPT_TOKENS}
