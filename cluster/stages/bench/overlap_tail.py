"""The benchmark `overlap` with answers of very different lengths."""

from __future__ import annotations

from cluster.stages.bench.common import BenchOptions, BenchResult
from cluster.stages.bench.overlap import measure_variant


def measure(options: BenchOptions) -> BenchResult:
    """As ``cluster.stages.bench.overlap.measure``."""
    return measure_variant("overlap-tail", options, tail=True)
