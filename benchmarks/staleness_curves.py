"""Learning curves under staleness: what a lag costs, and what the correction buys back.

    python benchmarks/staleness_curves.py [--quick] [--seeds 8] [--out FILE.json] [--plot FILE.svg]

One process, so that the lag is exact: the answers of step t are sampled from the weights of version
max(0, t - lag), every token of them. That is the worst case a staleness bound of `lag` permits; a
real run is fresher. Sampling is `TransformersEngine`, training `PPOLearner.step` on the Arrow table
a worker would send, rewards those of a reward model. Prompts and sampling seeds are the same in all
variants of a seed, so that differences are paired.

Finished runs are kept, one JSON line each, in runs/staleness_curves/; what is there already is not
run again (`--fresh` throws it away).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from helpdesk_base import (  # noqa: E402
    MAX_ANSWER_TOKENS,
    BaseSize,
    Sampler,
    ensure_base,
    prompts_of,
)
from record import commit  # noqa: E402
from staleness_summary import (  # noqa: E402
    statements,
    summarise,
    table,
    write_plot,
    write_results,
)

LARGE_LAG = 16
DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """Everything the variants share. Rates are high and minibatches many, or no lag would show."""

    steps: int = 50
    prompts_per_step: int = 16
    samples_per_prompt: int = 4
    lr: float = 2e-4
    schedule: str = "linear"
    minibatches: int = 4
    epochs: int = 1
    kl_coef: float = 0.1
    eos_penalty: float = 1.0
    cap: float = 5.0
    evaluate_every: int = 10
    eval_prompts: int = 100
    base: BaseSize = field(default_factory=BaseSize)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """name: as in the table. lag: of every token, in learner steps. dtype: what sampler and learner
    compute in."""

    name: str
    lag: int
    correction: str
    dtype: DType = "float32"


VARIANTS = (
    Variant(name="lag 0", lag=0, correction="decoupled"),
    Variant(name="lag 4, decoupled", lag=4, correction="decoupled"),
    Variant(name=f"lag {LARGE_LAG}, none", lag=LARGE_LAG, correction="none"),
    Variant(name=f"lag {LARGE_LAG}, decoupled", lag=LARGE_LAG, correction="decoupled"),
)
"""Token-tis is not among them: it computes the very weights of decoupled (`off_policy`)."""

QUICK = Regime(
    steps=10,
    prompts_per_step=8,
    eval_prompts=24,
    evaluate_every=5,
    base=BaseSize(
        hidden=48, layers=2, intermediate=96, demonstrations=3000, preference_prompts=80,
        rl_prompts=64, eval_prompts=24,
    ),
)  # fmt: skip


class _History:
    """A publisher that keeps the newest versions: the learner's way out, the sampler's way in."""

    on_device = False

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self.versions: dict[int, dict[str, Any]] = {}

    def open(self, version: int) -> Any:
        from cluster.weights.update import Update

        self._newest = version
        self.versions[version] = {}
        self.versions.pop(version - self._keep, None)
        return Update(version, "memory", self)

    def put(self, arrays: Mapping[str, Any]) -> None:
        copied = {name: array.copy() for name, array in arrays.items()}
        self.versions[self._newest].update(copied)

    def finish(self) -> None:
        """They are where the sampler looks."""

    def discard(self) -> None:
        self.versions.pop(self._newest)

    def retain(self, versions: Collection[int]) -> None:
        """Nothing is held."""

    def close(self) -> None:
        self.versions.clear()


class Run:
    """One variant at one seed."""

    def __init__(self, regime: Regime, variant: Variant, seed: int, base: Path) -> None:
        from cluster.contracts.config.base import ModelConfig
        from cluster.contracts.config.reward import RewardModelSource
        from learner.models.load import load_policy
        from learner.models.reward_artifact import tokenizer_fingerprint
        from learner.rl.learner import PPOLearner
        from reward_service.sources.model import ModelScorer

        self.regime, self.variant, self.seed = regime, variant, seed
        self.history = _History(keep=variant.lag + 1)
        rows = regime.prompts_per_step * regime.samples_per_prompt
        running = max(rows, regime.eval_prompts)
        self.sampler = Sampler(base / "policy", running, variant.dtype)
        self.scorer = ModelScorer(RewardModelSource(path=str(base / "reward_model")))
        self.reference = load_policy(ModelConfig(path=str(base / "policy"))).requires_grad_(False)
        self.tokenizer = tokenizer_fingerprint(self.sampler.tokenizer)
        self.prompts = prompts_of(base, "rl", seed, shuffle=True)
        held_out = prompts_of(base, "eval")
        self.held_out = [held_out.prompt(n) for n in range(regime.eval_prompts)]
        self.learner = PPOLearner(settings(regime, variant, seed, base), publisher=self.history)

    def train(self) -> dict[str, Any]:
        """The record of the run: evaluations by step, training numbers, CPU seconds."""
        began = time.process_time()
        self.learner.start()
        curve, trained = [self.evaluate(0)], []
        for step in range(self.regime.steps):
            trained.append(self.step(step))
            if (step + 1) % self.regime.evaluate_every == 0:
                curve.append(self.evaluate(step + 1))
        self.learner.close()
        return {
            "variant": self.variant.name,
            "seed": self.seed,
            "commit": commit(),
            "curve": curve,
            "training": {name: [row[name] for row in trained] for name in trained[0]},
            "cpu_s": round(time.process_time() - began, 1),
        }

    def step(self, step: int) -> dict[str, float]:
        from cluster.contracts.metrics import values
        from cluster.contracts.records import StepInput

        count = self.regime.prompts_per_step
        ids = range(step * count, (step + 1) * count)
        self._load(max(0, step - self.variant.lag))
        table = self._rollouts(ids)
        payload = StepInput(step=step, group_ids=tuple(ids), payloads=(table,))
        numbers = values(self.learner.step(payload).metrics)
        wanted = {
            "score": "objective/scores",
            "kl": "objective/kl",
            "ess": "async/ess",
            "age": "async/staleness_max",
            "clipped": "sampling/is_clipped_frac",
            "entropy": "objective/entropy",
        }
        return {short: round(numbers[name], 5) for short, name in wanted.items()}

    def evaluate(self, step: int) -> dict[str, float]:
        """One answer to each held-out prompt by the newest weights: the gold judge, which nothing
        trains on, the reward model, and the KL to the starting policy, all means."""
        from cluster.quickstart.helpdesk.judge import gold_score

        self._load(step)
        done = self.sampler.answers(self.held_out, 1, "evaluate", self.seed, step)
        pairs = list(zip(self.held_out, done, strict=True))
        texts = [self.sampler.text(completion) for completion in done]
        judged = zip(self.held_out, texts, strict=True)
        gold = [gold_score(prompt.metadata, text).score for prompt, text in judged]
        count = len(pairs)
        return {
            "step": step,
            "gold": round(sum(gold) / count, 4),
            "reward": round(sum(self._scores(pairs)) / count, 4),
            "kl": round(self._kl(pairs) / count, 4),
            "length": round(sum(len(c.token_ids) for c in done) / count, 2),
            "ended": round(sum(c.finish_reason == "stop" for c in done) / count, 3),
        }

    def _load(self, version: int) -> None:
        self.sampler.engine.stage(self.history.versions[version].items(), version)
        self.sampler.engine.swap(version)

    def _rollouts(self, ids: range) -> Any:
        from cluster.contracts.records import Rollout, RolloutGroup, Score
        from cluster.contracts.rollout_table import to_table

        samples = self.regime.samples_per_prompt
        prompts = [self.prompts.prompt(group) for group in ids]
        done = self.sampler.answers(prompts, samples, "train", self.seed, ids.start)
        rows = [(prompts[i // samples], completion) for i, completion in enumerate(done)]
        scores = self._scores(rows)
        groups = []
        for place, group in enumerate(ids):
            own = []
            for s in range(samples):
                at = place * samples + s
                text = self.sampler.text(done[at])
                rollout = Rollout(
                    prompt=prompts[place], completion=done[at], sample_index=s, text=text
                )
                value = scores[at]
                own.append((rollout, Score(value=value, parts={"m": value}, scorer_version="1")))
            groups.append(RolloutGroup(group_id=group, samples=tuple(own)))
        return to_table(groups)

    def _scores(self, rows: list[tuple[Any, Any]]) -> list[float]:
        from reward_service.source import ScoreItem

        items = [
            ScoreItem(
                id=str(number),
                messages=prompt.messages,
                response="",
                prompt_ids=prompt.token_ids,
                response_ids=completion.token_ids,
                finish_reason=completion.finish_reason,
                tokenizer=self.tokenizer,
            )
            for number, (prompt, completion) in enumerate(rows)
        ]
        return [part.value for part in self.scorer.score(items)]

    def _kl(self, rows: list[tuple[Any, Any]]) -> float:
        """Sum over rows of log pi - log ref of the sampled tokens, nats."""
        import torch

        from learner.compute.microbatches import pad_rows, token_row
        from learner.models.heads import token_logprobs

        encoded = [
            token_row(
                [*p.token_ids, *c.token_ids],
                [*(False for _ in p.token_ids), *(True for _ in c.token_ids)],
            )
            for p, c in rows
        ]
        with torch.no_grad():
            reference, _, _ = token_logprobs(self.reference, pad_rows(encoded, 0))
        return sum(sum(c.logprobs) for _, c in rows) - float(reference.sum())


def settings(regime: Regime, variant: Variant, seed: int, base: Path) -> Any:
    from cluster.contracts.config.algorithm import (
        AlgorithmConfig,
        BatchConfig,
        KLConfig,
        StalenessConfig,
    )
    from cluster.contracts.config.base import ModelConfig
    from cluster.contracts.config.learner import LearnerConfig, WeightsConfig
    from learner.settings import LearnerSettings

    return LearnerSettings(
        model=ModelConfig(path=str(base / "policy"), dtype=variant.dtype),
        learner=LearnerConfig.model_validate(
            {
                "lr": regime.lr,
                "schedule": regime.schedule,
                "minibatches": regime.minibatches,
                "epochs": regime.epochs,
            }
        ),
        algorithm=AlgorithmConfig(
            advantage="reinforce-baseline",
            missing_eos_penalty=regime.eos_penalty,
            kl=KLConfig(coef=regime.kl_coef),
        ),
        staleness=StalenessConfig.model_validate(
            {"bound": variant.lag, "correction": variant.correction, "cap": regime.cap}
        ),
        batch=BatchConfig(
            prompts_per_step=regime.prompts_per_step,
            samples_per_prompt=regime.samples_per_prompt,
            steps=regime.steps,
        ),
        weights=WeightsConfig(),
        rollout_dtype=variant.dtype,
        temperature=1.0,
        max_tokens=MAX_ANSWER_TOKENS,
        seed=seed,
        canary_prompt=(1, 2, 3),
    )


def run_all(regime: Regime, variants: tuple[Variant, ...], seeds: range, work: Path) -> list[Any]:
    """Records of all runs, seed by seed; those that were finished before are read from the disk."""
    base = ensure_base(work / "base", regime.base)
    settled = json.loads(json.dumps(asdict(regime)))
    log = work / "runs.jsonl"
    kept = (
        [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.exists() else []
    )
    done = {(r["variant"], r["seed"]): r for r in kept if r["regime"] == settled}
    for seed in seeds:
        for variant in variants:
            if (variant.name, seed) in done:
                continue
            record = {**Run(regime, variant, seed, base).train(), "regime": settled}
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            done[variant.name, seed] = record
            end = record["curve"][-1]
            print(f"seed {seed}  {variant.name:24s} {end}  {record['cpu_s']} CPU s", flush=True)
    return [done[variant.name, seed] for seed in seeds for variant in variants]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two seeds of a tiny task")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--lr", type=float, help="another learning rate")
    parser.add_argument("--schedule", choices=["constant", "linear", "cosine"])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "staleness_curves")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--plot", type=Path, help="write the curves as SVG")
    parser.add_argument("--fresh", action="store_true", help="forget what was run before")
    args = parser.parse_args()
    regime, count = (QUICK, 2) if args.quick else (Regime(), 8)
    other = {"lr": args.lr, "schedule": args.schedule}
    regime = replace(regime, **{name: value for name, value in other.items() if value is not None})
    work = args.work / "quick" if args.quick else args.work
    work.mkdir(parents=True, exist_ok=True)
    if args.fresh:
        (work / "runs.jsonl").unlink(missing_ok=True)
    import torch

    torch.set_num_threads(1)  # so that a run's numbers do not depend on the machine's cores
    records = run_all(regime, VARIANTS, range(args.seeds or count), work)
    settled = asdict(regime)
    summary = summarise(records, settled)
    print(table(summary))
    for sentence in statements(summary):
        print(sentence)
    if args.out:
        write_results(args.out, records, settled, summary)
    if args.plot:
        write_plot(args.plot, records, settled)


if __name__ == "__main__":
    main()
