"""How fast this machine multiplies matrices in each number type.

It is measured, because the name of a processor does not tell: the same instructions exist in units
of very different speed, and a virtual machine may hide them.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.machine.torch_state import on_one_core

if TYPE_CHECKING:
    import torch

LARGEST = 1024
"""Of each dimension that is measured. Larger products are as fast as these, and take longer."""
ROUNDS = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Products:
    """GFLOP per second of one core in products of [rows, inner] with [inner, outer]. That of
    bfloat16 includes the rounding of the [rows, inner] activations, which autocast does each time.
    """

    rows: int
    inner: int
    outer: int
    float32: float
    bfloat16: float

    @property
    def gain(self) -> float:
        """How many times as fast bfloat16 is."""
        return self.bfloat16 / self.float32

    def describe(self) -> str:
        return (
            f"bfloat16 is {self.gain:.2f} times as fast on a core ([{self.rows}, {self.inner}] x "
            f"[{self.inner}, {self.outer}]: {self.bfloat16:.0f} GFLOP/s, {self.float32:.0f} in "
            "float32)"
        )


@functools.cache
def measure_products(rows: int, inner: int, outer: int) -> Products:
    """The best of some products in each type; takes about 0.1 s, once a process and shape.

    It is the CPU time of this thread that counts, so other work on the machine matters little.
    """
    import torch

    rows, inner, outer = (max(1, min(size, LARGEST)) for size in (rows, inner, outer))
    with on_one_core():
        x, weight = torch.ones(rows, inner), torch.ones(outer, inner)
        short = weight.bfloat16()
        best = {"float32": float("inf"), "bfloat16": float("inf")}
        # By turns: a pause of the machine then falls on both. The first of each is not counted: it
        # chooses kernels and touches the memory.
        for turn in range(ROUNDS + 1):
            for name, took in (
                ("float32", _seconds(x, weight)),
                ("bfloat16", _seconds(x, short)),
            ):
                best[name] = min(best[name], took if turn else float("inf"))
    work = 2e-9 * rows * inner * outer
    speeds = {name: work / seconds for name, seconds in best.items()}
    return Products(rows=rows, inner=inner, outer=outer, **speeds)


def _seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
    """CPU seconds of one product; small ones are repeated until the clock can resolve them."""
    import torch

    repeats, linear = 1, torch.nn.functional.linear
    while True:
        began = time.thread_time()
        for _ in range(repeats):
            linear(x.to(weight.dtype), weight)
        took = time.thread_time() - began
        if took > 5e-4:
            return took / repeats
        repeats *= 4
