"""Weight updates into a worker that generates: what each part takes, and what generation loses.

publish, fetch, verify, stage    beside generation (through files: no network in between)
pause (median, p99, largest)     from the end of one decode step to the start of the next, the swap
                                 between them; to be compared with one decode step
lost                             tokens of the CPU time that an update costs the worker: fetching,
                                 checking, staging and packing, the canary, and the cache of the
                                 requests in flight (none with `kv_on_swap = "keep"`)

Each row is a process on core 0, with 32 requests in flight. "next step" is the one after a swap:
with `recompute` it fills the caches of all requests again. A pause is in wall time, so on a busy
machine its p99 holds what the machine gave to others (as does the step's); the CPU time of the same
swaps stands beside. In the ratios a step counts as 5 ms at least.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from cluster.measure.bench.children import run
from cluster.measure.bench.common import BenchOptions, BenchResult

# parameters -> (hidden, layers, heads, intermediate) with a vocabulary of 640
SIZES = {"1M": (128, 4, 4, 384), "5M": (256, 6, 4, 768), "19M": (512, 6, 8, 1408)}
CASES = [
    (size, dtype, kv)
    for size in SIZES
    for dtype in ("float32", "bfloat16")
    for kv in ("recompute", "keep")
]
QUICK_CASES = [("1M", "float32", "recompute"), ("5M", "bfloat16", "recompute")]
LIMIT_MS = 5.0  # a pause shorter than this is none, however short a step is
SWAPS, QUICK_SWAPS = 60, 50
RUNNING, PROMPT_TOKENS, NEW_TOKENS = 32, 32, 64


def measure(options: BenchOptions) -> BenchResult:
    """Rows of every size, dtype and policy for the cache; the worst pauses against a step."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cases = QUICK_CASES if options.quick else CASES
        for size in dict.fromkeys(case[0] for case in cases):
            _make_model(Path(folder) / size, size)
        for size, dtype, kv in cases:
            task = {"model": str(Path(folder) / size), "dtype": dtype, "kv": kv,
                    "swaps": QUICK_SWAPS if options.quick else SWAPS}  # fmt: skip
            found = run("cluster.measure.bench.weights_child", task, f"{size} in {dtype}")
            rows.append({"": f"{size} {dtype} {kv}", **found})
    return _result(rows)


def _make_model(folder: Path, size: str) -> None:
    from cluster.measure.bench.corpus import corpus
    from learner.models.tiny import fresh_model, train_tokenizer

    folder.mkdir()
    hidden, layers, heads, intermediate = SIZES[size]
    tokenizer = train_tokenizer(corpus(0, 500), 640, folder)
    fresh_model(
        tokenizer, folder, hidden=hidden, layers=layers, heads=heads, intermediate=intermediate
    )


def _result(rows: list[dict[str, Any]]) -> BenchResult:
    def worst(column: str, step: str) -> float:
        return max(row[column] / max(row[step], LIMIT_MS) for row in rows)

    infinite = float("inf")
    return BenchResult(
        name="weights",
        settings={"running": RUNNING, "prompt_tokens": PROMPT_TOKENS, "answer_tokens": NEW_TOKENS,
                  "transport": "disk", "times": "ms", "limit_ms": LIMIT_MS},
        rows=rows,
        ratios={
            "pause / step": worst("pause", "step"),
            "pause p99 / step": worst("pause p99", "step"),
            "swap cpu p99 / step": worst("swap cpu p99", "step"),
            "canary difference / tolerance": max(row["canary"] for row in rows),
        },
        tolerances={
            "pause / step": (-infinite, 0.5),
            "pause p99 / step": (-infinite, 1.0),
            "swap cpu p99 / step": (-infinite, 0.5),
            "canary difference / tolerance": (-infinite, 1.0),
        },
    )  # fmt: skip
