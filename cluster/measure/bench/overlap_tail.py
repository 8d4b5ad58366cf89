"""The benchmark `overlap` with answers of very different lengths."""

from __future__ import annotations

from cluster.measure.bench.common import BenchOptions, BenchResult
from cluster.measure.bench.overlap import measure_variant


def measure(options: BenchOptions) -> BenchResult:
    """As ``cluster.measure.bench.overlap.measure``."""
    return measure_variant("overlap-tail", options, tail=True)
