"""Learning at equal wall time, with pacing and without: real runs of `accord train` in pairs.

    python benchmarks/pacing_curves.py [--seeds 8] [--out FILE.json]

Both runs of a pair have one seed and `staleness.bound = 2`. One has `staleness.lead = "auto"`
(groups are admitted when the learner needs them), the other `lead = 2` (as early as the bound
allows). The task is that of `staleness_curves.py`, with three heads in place of four, because vLLM
has no kernel for heads of 24. The learner is the slower side, or pacing would change nothing. The
runs of a pair follow each other, and which comes first alternates, so that other load on the
machine meets both. Finished runs are kept in
runs/pacing_curves/ and not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from helpdesk_base import MAX_ANSWER_TOKENS, MAX_PROMPT_TOKENS, BaseSize, ensure_base  # noqa: E402
from record import provenance  # noqa: E402

LEADS = {"paced": '"auto"', "as early as allowed": "2"}
STEPS = 60
LAST = 10  # steps before the common end that the final objective is the mean of
OBJECTIVE = "objective/rlhf_reward"  # score - 0.1 KL - 1 for a completion that was cut off
LIMIT_S = 1200.0  # of one run


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One run. seconds: from the loop's start to the end of each step; the other lists as long."""

    seconds: tuple[float, ...]
    objective: tuple[float, ...]
    staleness: tuple[float, ...]

    def until(self, seconds: float) -> tuple[float, ...]:
        """The objective of the steps that had ended by then."""
        return tuple(o for s, o in zip(self.seconds, self.objective, strict=True) if s <= seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "pacing_curves")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--before", nargs="*", default=[], help="a command to start each run with")
    given = parser.parse_args()
    base = ensure_base(given.work.resolve() / "base", BaseSize(heads=3))
    pairs = []
    for seed in range(given.seeds):
        names = list(LEADS) if seed % 2 == 0 else list(LEADS)[::-1]
        runs = {name: run(given.work, base, seed, name, given.before) for name in names}
        pairs.append(compare(runs))
        print(f"seed {seed}: {json.dumps(pairs[-1])}", flush=True)
    summary = {key: mean_se([pair[key] for pair in pairs]) for key in pairs[0]}
    for key, (mean, error) in summary.items():
        print(f"{key:44s} {mean:8.3f}" + ("" if error is None else f" +- {error:.3f}"))
    if given.out:
        result = {"benchmark": "pacing_curves", **provenance(), "pairs": pairs, "mean_se": summary}
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def run(work: Path, base: Path, seed: int, name: str, before: Sequence[str]) -> Curve:
    folder = work.resolve() / f"{seed}-{name.replace(' ', '-')}"
    done = folder / "done"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "config.toml"
        config.write_text(toml(folder, base, seed, name), encoding="utf-8")
        command = [*before, sys.executable, str(ROOT / "launch.py"), "train", str(config)]
        with (folder / "output").open("w", encoding="utf-8") as output:
            subprocess.run(
                command, stdout=output, stderr=output, timeout=LIMIT_S, check=True, cwd=folder
            )
        done.touch()
    return curve_of(folder / "run")


def curve_of(folder: Path) -> Curve:
    events = _rows(folder / "events.jsonl")
    began = next(event["time"] for event in events if event["kind"] == "loop_started")
    rows = _rows(folder / "metrics.jsonl")
    return Curve(
        seconds=tuple(row["time"] - began for row in rows),
        objective=tuple(row[OBJECTIVE] for row in rows),
        staleness=tuple(row["async/staleness_mean"] for row in rows),
    )


def compare(runs: Mapping[str, Curve]) -> dict[str, float]:
    """Differences are paced minus not, at the moment when the faster of the two had ended."""
    paced, early = (runs[name] for name in LEADS)
    end = min(paced.seconds[-1], early.seconds[-1])
    mine, theirs = paced.until(end), early.until(end)
    found = {
        "objective at the end, paced": fmean(mine[-LAST:]),
        "objective at the end, not paced": fmean(theirs[-LAST:]),
        "objective at the end, difference": fmean(mine[-LAST:]) - fmean(theirs[-LAST:]),
        "objective over training, difference": fmean(mine) - fmean(theirs),
        "equal steps, at the end, difference": fmean(paced.objective[-LAST:])
        - fmean(early.objective[-LAST:]),
        "equal steps, over training, difference": fmean(paced.objective) - fmean(early.objective),
        "staleness, paced": fmean(paced.staleness[LAST:]),
        "staleness, not paced": fmean(early.staleness[LAST:]),
        "step time, paced over not": step_time(paced) / step_time(early),
    }
    return {key: round(value, 4) for key, value in found.items()}


def step_time(curve: Curve) -> float:
    """Seconds, median."""
    return median(after - before for before, after in pairwise(curve.seconds))


def mean_se(numbers: Sequence[float]) -> tuple[float, float | None]:
    error = stdev(numbers) / len(numbers) ** 0.5 if len(numbers) > 1 else None
    return round(fmean(numbers), 4), None if error is None else round(error, 4)


def toml(folder: Path, base: Path, seed: int, name: str) -> str:
    return f"""
[run]
dir = "{folder}"
name = "run"
seed = {seed}
[model]
path = "{base / "policy"}"
dtype = "float32"
[data]
prompts = "{base / "rl_prompts.jsonl"}"
max_prompt_tokens = {MAX_PROMPT_TOKENS}
[[reward.sources]]
type = "model"
path = "{base / "reward_model"}"
[batch]
prompts_per_step = 16
samples_per_prompt = 4
steps = {STEPS}
[rollout]
max_tokens = {MAX_ANSWER_TOKENS}
[staleness]
bound = 2
lead = {LEADS[name]}
[algorithm]
missing_eos_penalty = 1.0
kl.coef = 0.1
[learner]
lr = 2e-4
schedule = "linear"
minibatches = 4
epochs = 2
[checkpoint]
every = 100000
"""


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
