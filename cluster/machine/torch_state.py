"""How torch computes in this process: the one place that sets its global state.

Every process that computes calls `prepare_torch` before it loads a model: the learner, the reward
model's scorer, `accord chat`, the engine on transformers. Two processes that set different
states would compute different numbers from the same weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from cluster.contracts.devices import FAST_PRODUCTS

Precision = Literal["highest", "medium"]

_FAST_ERROR_LIMIT = 1e-5
"""Relative error above which a fast float32 product is no longer float32 (bfloat16 gives 2e-3)."""


_KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Of oneDNN, and of torch above it. Each is read at the first product of a process."""
_KEPT_KERNELS = "64"
"""oneDNN compiles a kernel for each shape of a product; both caches keep 1024 of them, half a
megabyte each. Microbatches of text hardly ever have a shape again, while the layers of one have the
same few: 64 are found nearly as often, in a twentieth of the memory."""


def prepare_torch(threads: int = 0, *, deterministic: bool = False) -> Precision:
    """Set compute threads (0: leave them), deterministic kernels, and the precision of products.

    The precision is the fastest that is still float32. On CPU "medium" moves float32 products from
    MKL to oneDNN, up to twice as fast on AMD. On a processor with AMX "medium" rounds to bfloat16,
    so it is tried out and taken back where it rounds. Returns the precision in force.
    """
    import torch  # takes seconds, and not every process of a role computes

    if threads:
        set_threads(threads)
    # Only where it changes something: the call imports torch's compiler, which takes a second.
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision("highest")
    if not FAST_PRODUCTS.on(torch.cuda.is_available()):
        return "highest"
    torch.set_float32_matmul_precision("medium")
    with _few_kernels_kept():
        error = product_error()
    if error <= _FAST_ERROR_LIMIT:
        return "medium"
    torch.set_float32_matmul_precision("highest")
    return "highest"


@contextmanager
def _few_kernels_kept() -> Iterator[None]:
    """For this process, unless the user has said how many; engines that it starts decode the same
    shapes again and again."""
    ours = [name for name in _KERNEL_CACHES if name not in os.environ]
    os.environ.update(dict.fromkeys(ours, _KEPT_KERNELS))
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


@contextmanager
def on_one_core() -> Iterator[None]:
    """torch computes as in a role with one thread, without gradients; afterwards as before."""
    import torch

    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        prepare_torch(1, deterministic=torch.are_deterministic_algorithms_enabled())
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def set_threads(threads: int) -> None:
    """Of torch, and of the kernels that the calling thread runs from now on."""
    import torch

    torch.set_num_threads(threads)


def product_error() -> float:
    """Largest relative error of float32 products under the state in force, of each kind of product
    a model makes: one of matrices, a linear layer with a bias, one of batches of matrices."""
    import torch

    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, 128, 512, generator=generator)
    b = torch.randn(4, 512, 256, generator=generator)
    exact = a.double() @ b.double()
    weight, bias = b[0].T.contiguous(), torch.zeros(256)
    pairs = (
        (a[0] @ b[0], exact[0]),
        (torch.nn.functional.linear(a[0], weight, bias), exact[0]),
        (torch.bmm(a, b), exact),
    )
    return max(float((found.double() - true).norm() / true.norm()) for found, true in pairs)
