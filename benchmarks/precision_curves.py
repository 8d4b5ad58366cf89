"""Learning curves in bfloat16 beside float32: does the cheaper number type cost reward?

    python benchmarks/precision_curves.py [--quick] [--seeds 8] [--lag 0] [--out FILE.json]

The task, the loop and the pairing are those of `staleness_curves.py`: one process, prompts and
sampling seeds are the same for both number types of a seed. Sampler and learner both compute in the
type that is measured, so the mismatch between the two takes part. The weights that the optimiser
updates, logits and losses are float32 in both; so is the reward model.

Finished runs are kept, one JSON line each, in runs/precision_curves/; what is there already is not
run again (`--fresh` throws it away).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from staleness_curves import QUICK, Regime, Variant, run_all  # noqa: E402
from staleness_summary import statements, summarise, write_results  # noqa: E402

ROWS = {
    "objective": "objective on held-out prompts, at the end",
    "objective_over_training": "objective on held-out prompts, over training",
    "gold": "gold judge, at the end",
    "gold_over_training": "gold judge, over training",
    "reward": "learned reward, at the end",
    "kl": "KL to the starting policy, nats per completion",
    "ess": "effective share of the samples",
}


def variants(lag: int) -> tuple[Variant, ...]:
    return (
        Variant(name=f"float32, lag {lag}", lag=lag, correction="decoupled"),
        Variant(name=f"bfloat16, lag {lag}", lag=lag, correction="decoupled", dtype="bfloat16"),
    )


def table(summary: Mapping[str, Any]) -> str:
    """Markdown: a measure a row, with the paired difference; errors are standard errors."""
    first, second = summary["variants"].values()
    lines = [
        "| mean over seeds | float32 | bfloat16 | bfloat16 minus float32, paired |",
        "|---|---|---|---|",
    ]
    for key, title in ROWS.items():
        cells = [first[key], second[key], second[key]["minus_first"]]
        shown = (f"{c['mean']:{'+' if c is cells[2] else ''}.4f} ± {c['se']}" for c in cells)
        lines.append(f"| {title} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two seeds of a tiny task")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--lag", type=int, default=0, help="of every token, in learner steps")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "precision_curves")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--fresh", action="store_true", help="forget what was run before")
    args = parser.parse_args()
    regime, count = (QUICK, 2) if args.quick else (Regime(), 8)
    work = args.work / "quick" if args.quick else args.work
    work.mkdir(parents=True, exist_ok=True)
    if args.fresh:
        (work / "runs.jsonl").unlink(missing_ok=True)
    import torch

    torch.set_num_threads(1)  # so that a run's numbers do not depend on the machine's cores
    records = run_all(regime, variants(args.lag), range(args.seeds or count), work)
    summary = summarise(records, asdict(regime))
    print(table(summary))
    for sentence in statements(summary):
        print(sentence)
    if args.out:
        write_results(args.out, records, asdict(regime), summary)


if __name__ == "__main__":
    main()
