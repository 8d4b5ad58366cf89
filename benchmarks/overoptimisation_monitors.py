"""An over-optimised reward, without and with monitors that act: which policy is better by the gold
rule?

    accord quickstart --scale 0.2 --name task
    python benchmarks/overoptimisation_monitors.py --task runs/task --out monitors.json

The task is that of the quickstart. Its reward model is trained again on few pairs, so that PPO
without a KL penalty finds completions that it scores high and the gold rule scores low. Every run
has the same seed and differs only in `[monitors]`. The gold rule is a reward source of weight 0:
the policy does not learn from it, and the monitor `second-judge-gap` watches it. At the end the
gold rule judges each final policy on prompts that no training saw.

The run that only warns also tells what `stop` would have left: its checkpoints are those of a run
with the same seed until the alarm, and `MonitorActions` names the one that becomes `policy/`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from helpdesk_base import Sampler  # noqa: E402

from cluster.contracts.config.algorithm import AlgorithmConfig, BatchConfig, KLConfig  # noqa: E402
from cluster.contracts.config.base import ModelConfig, RunConfig  # noqa: E402
from cluster.contracts.config.file import dump_toml, load_config  # noqa: E402
from cluster.contracts.config.learner import CheckpointConfig, LearnerConfig  # noqa: E402
from cluster.contracts.config.monitors import ActionsConfig, MonitorsConfig  # noqa: E402
from cluster.contracts.config.offline import RewardModelConfig  # noqa: E402
from cluster.contracts.config.reward import (  # noqa: E402
    FunctionSource,
    RewardConfig,
    RewardModelSource,
)
from cluster.contracts.config.rollout import DataConfig, RolloutConfig  # noqa: E402
from cluster.contracts.config.train import TrainConfig  # noqa: E402
from cluster.quickstart.helpdesk.gold import gold_score  # noqa: E402
from cluster.runs.monitor_actions import MonitorActions  # noqa: E402
from cluster.runs.monitors import Watch  # noqa: E402

GOLD = str(ROOT / "cluster" / "quickstart" / "helpdesk" / "gold.py") + ":gold"
MAX_TOKENS, MAX_PROMPT_TOKENS = 64, 48
VARIANTS = ("warn", "stop", "rollback", "raise_kl")
RUNNING = 80  # completions sampled at a time for the gold rule
LAST = 5  # steps whose mean is a run's last proxy reward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--task", type=Path, required=True, help="run directory of a quickstart")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=120, help="that the reward model learns from")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=16, help="per step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["warn", "rollback"])
    given = parser.parse_args()
    folder = given.out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    reward_model = _reward_model(given, folder)
    found = {
        "task": {"pairs": given.pairs, "steps": given.steps, "prompts_per_step": given.prompts}
        | {"samples_per_prompt": 4, "kl_coef": 0.0, "seed": given.seed},
        "start": _gold(given, given.task / "sft" / "policy"),
        "runs": {},
    }
    for variant in given.variants:
        found["runs"][variant] = _run(given, folder, variant, reward_model)
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(
            variant, json.dumps({k: v for k, v in found["runs"][variant].items() if k != "steps"})
        )


def _accord(command: str, config: Any, folder: Path) -> None:
    file = folder / f"{config.run.name}.toml"
    file.write_text(dump_toml(config), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "launch", command, str(file)]
    subprocess.run(words, check=True, env=environment, stdout=sys.stderr)


def _reward_model(given: argparse.Namespace, folder: Path) -> Path:
    made = folder / "reward_model" / "reward_model"
    if not made.is_dir():
        lines = (given.task / "data" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
        pairs = folder / "pairs.jsonl"
        pairs.write_text("\n".join(lines[: given.pairs]) + "\n", encoding="utf-8")
        tree = load_config(RewardModelConfig, str(given.task / "reward_model" / "config.toml"))
        run = {"name": "reward_model", "dir": str(folder), "seed": given.seed}
        data = {**tree.data.model_dump(), "path": str(pairs)}
        fit = {**tree.fit.model_dump(), "epochs": 6}
        model = {"path": str(given.task / "sft" / "policy")}
        config = RewardModelConfig.model_validate(
            {
                "run": run,
                "data": data,
                "fit": fit,
                "model": model,
                "logging": {"ray_metrics": False},
            }
        )
        _accord("reward-model", config, folder)
    return made


def _run(given: argparse.Namespace, folder: Path, variant: str, reward_model: Path) -> Any:
    config = _train_config(given, folder, variant, reward_model)
    run = folder / variant
    if not (run / "policy").is_dir():
        _accord("train", config, folder)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    names = {"proxy": "rewards/model/mean", "gold": "rewards/gold/mean", "kl": "objective/kl"}
    names |= {"kl_coef": "objective/kl_coef", "length": "completions/mean_length"}
    steps = [
        {"step": row["step"], **{key: round(row.get(name, 0.0), 4) for key, name in names.items()}}
        for row in rows
    ]
    told = ("step", "alarm", "change", "action", "checkpoint", "kl_coef", "dropped", "text")
    return {
        "proxy_last": statistics.fmean(step["proxy"] for step in steps[-LAST:]),
        "gold_in_training_best": max(step["gold"] for step in steps),
        "gold_in_training_last": statistics.fmean(step["gold"] for step in steps[-LAST:]),
        "gold_final_policy": _gold(given, run / "policy"),
        **({"stop_would_have": _stopped(given, rows, run)} if variant == "warn" else {}),
        "events": [
            {"kind": event["kind"], **{key: event[key] for key in told if key in event}}
            for event in events
            if event["kind"] in ("alarm", "gone_back")
        ],
        "steps": steps,
    }


def _train_config(
    given: argparse.Namespace, folder: Path, variant: str, reward_model: Path
) -> TrainConfig:
    start = str(given.task / "sft" / "policy")
    return TrainConfig(
        run=RunConfig(name=variant, dir=str(folder), seed=given.seed),
        model=ModelConfig(path=start),
        data=DataConfig(
            prompts=str(given.task / "data" / "rl_prompts.jsonl"),
            max_prompt_tokens=MAX_PROMPT_TOKENS,
        ),
        reward=RewardConfig(
            sources=[
                RewardModelSource(path=str(reward_model), name="model"),
                FunctionSource(path=GOLD, name="gold", weight=0.0),
            ]
        ),
        batch=BatchConfig(prompts_per_step=given.prompts, samples_per_prompt=4, steps=given.steps),
        rollout=RolloutConfig(max_tokens=MAX_TOKENS, gpus=0),
        algorithm=AlgorithmConfig(missing_eos_penalty=1.0, kl=KLConfig(coef=0.0)),
        # A reference without a penalty: the KL is measured in all runs alike.
        learner=LearnerConfig(gpus=0, lr=4e-4, warmup_steps=8, minibatches=4, reference_path=start),
        checkpoint=CheckpointConfig(every=5, keep=20),
        monitors=_monitors(variant),
    )


def _monitors(action: str) -> MonitorsConfig:
    actions = ActionsConfig.model_validate({"second_judge_gap": action})
    return MonitorsConfig(second_judge="gold", kl_least=0.1, actions=actions)


def _stopped(given: argparse.Namespace, rows: list[Any], run: Path) -> dict[str, Any]:
    """At which step the monitor would have stopped this run, and the policy it would have left."""
    config = _monitors("stop")
    watch = Watch(config)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "checkpoints").symlink_to((run / "checkpoints").absolute())
        actions = MonitorActions(config, Path(folder), steps=given.steps)
        for row in rows:
            actions.act(watch.check(row["step"], row), row)
            if actions.result is not None:
                policy = run / "checkpoints" / actions.result.name / "policy"
                left = {"at_step": row["step"], "policy_of": actions.result.name}
                return {**left, "gold_final_policy": _gold(given, policy)}
    return {}


def _gold(given: argparse.Namespace, policy: Path) -> dict[str, float]:
    """Mean gold score of a policy's completions of held-out prompts, and its standard error."""
    from actors.prompts import load_prompts

    sampler = Sampler(policy, RUNNING)
    file = str(given.task / "data" / "eval_prompts.jsonl")
    data = DataConfig(prompts=file, max_prompt_tokens=MAX_PROMPT_TOKENS)
    source = load_prompts(data, sampler.tokenizer, given.seed)
    prompts = [source.prompt(place) for place in range(len(source))]
    completions = sampler.answers(prompts, 1, given.seed, "gold")
    scores = [
        gold_score(dict(prompt.metadata), sampler.text(completion)).score
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    error = statistics.stdev(scores) / len(scores) ** 0.5
    return {
        "mean": round(statistics.fmean(scores), 3),
        "standard_error": round(error, 3),
        "prompts": len(scores),
    }


if __name__ == "__main__":
    main()
