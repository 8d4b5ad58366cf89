"""The learner on one core against a bare torch loop, and where its time goes.

bare     forward, loss, backward, clipping and AdamW on the same microbatches, in forty lines
grpo     the whole learner step (rollouts in, weights of the next version out) without a KL
ppo      the same with a shared value head and a reference model

Figures are of the process's CPU time, for the machine may be shared. Efficiency is the bare loop's
time over that of grpo, the median of steps measured in turn in one process.
"""

from __future__ import annotations

from typing import Any

from cluster.measure.bench.children import run
from cluster.measure.bench.common import BenchOptions, BenchResult

# parameters -> (vocabulary, hidden, layers, heads, intermediate)
SIZES = {
    "1M": (2048, 128, 4, 4, 384),
    "5M": (4096, 256, 5, 4, 768),
    "19M": (8192, 384, 8, 6, 1152),
}
CASES = [(size, dtype) for size in SIZES for dtype in ("float32", "bfloat16")]
QUICK_CASES = [("1M", "float32"), ("1M", "bfloat16"), ("5M", "bfloat16")]
PROMPTS, SAMPLES, MAX_TOKENS = 32, 4, 96
EFFICIENT = 0.97


def measure(options: BenchOptions) -> BenchResult:
    """A row for each size, dtype and way of training; the efficiency of each size and dtype."""
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for size, dtype in QUICK_CASES if options.quick else CASES:
        steps = max(3, options.repeats)
        task = {"shape": SIZES[size], "dtype": dtype, "steps": steps, "padded": size == "5M"}
        found = run("cluster.measure.bench.learner_child", task, f"{size} in {dtype}")
        rows += [{"": f"{size} {dtype} {row.pop('kind')}", **row} for row in found["rows"]]
        ratios[f"efficiency {size} {dtype}"] = found["efficiency"]
        if "packed_over_padded" in found:
            ratios[f"packed over padded {size} {dtype}"] = found["packed_over_padded"]
    settings = {"samples": PROMPTS * SAMPLES, "tokens a sample": "about 64", "microbatch": 2048}
    floor = (EFFICIENT, float("inf"))
    tolerances = {name: floor for name in ratios if name.startswith("efficiency")}
    return BenchResult(
        name="learner", settings=settings, rows=rows, ratios=ratios, tolerances=tolerances
    )
