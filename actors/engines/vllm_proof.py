"""What a vLLM model computes with is what was published, shown in three links.

published = loaded   the sum over all numbers is the same, before anything is packed
loaded = packed      a packed kernel carries the sums of the weights it was packed from
staged = in force    after the swap every tensor and kernel that the model which decodes holds is
                     compared with what was noted when it was staged

vLLM fuses tensors (q, k and v into one) and on CPU packs each layer's weight into a kernel, so the
published bytes themselves are nowhere to be found.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from actors.engines.proof import fingerprint
from cluster.contracts.errors import Fatal

log = logging.getLogger("accord.engine")

KERNEL = "cpu_linear"  # vLLM's name for the closure over a layer's packed weight
HANDLER = "dnnl_handler"  # the same of a layer in 8 bits, in its scheme's kernel
_ORIGIN = "accord_packed_from"  # our mark on such a kernel: the sums of what it was packed from


class LoaderCheck:
    """published = loaded: compares the sums over all numbers, update after update."""

    def __init__(self) -> None:
        self.keeps_numbers: bool | None = None  # whether vLLM loads this model's numbers unchanged

    def compare(self, published: int, loaded: int) -> None:
        """Raise Fatal when the loader changed the numbers of a model whose numbers it keeps.

        Whether it keeps them is learnt from the first update. It does not for a few architectures
        (Mamba's logarithms) and where each process holds a part of the model.
        """
        if self.keeps_numbers is None:
            self.keeps_numbers = published == loaded
            if not self.keeps_numbers:
                log.warning(
                    "vLLM changes or divides the weights of this model as it loads them: after a "
                    "swap they are proven to be those it loaded, not those that were published"
                )
        elif self.keeps_numbers and published != loaded:
            raise Fatal("vLLM's loader did not load the numbers that were published")


def kernels(module: torch.nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a layer holds packed weights that are none of its tensors: (attributes, name)."""
    if KERNEL in vars(module):
        yield vars(module), KERNEL
    eight_bits = getattr(getattr(module, "scheme", None), "kernel", None)
    if HANDLER in getattr(eight_bits, "__dict__", {}):
        yield vars(eight_bits), HANDLER


def mark_kernels(weights: Iterable[tuple[torch.nn.Module, str, int]]) -> None:
    """Loaded = packed: each packed kernel carries the sums of its layer's weights, as the packed
    memory itself belongs to a library that does not show it.

    weights: (layer, name of a weight, sum over its numbers before it was packed).
    """
    held: dict[torch.nn.Module, list[str]] = {}
    for module, name, total in weights:
        held.setdefault(module, []).append(f"{name}:{total:016x}")
    for module, sums in held.items():
        for holder, name in kernels(module):
            kernel = holder[name]
            # A function without a closure reads the layer's own tensors.
            if name == HANDLER or getattr(kernel, "__closure__", None):
                setattr(kernel, _ORIGIN, " ".join(sums))


def digests(modules: Iterable[tuple[str, torch.nn.Module]]) -> dict[str, str]:
    """Of every tensor and kernel that these modules (by name) compute with."""
    tensors: dict[str, torch.Tensor] = {}
    origins: dict[str, str] = {}
    for name, module in modules:
        for holder in (module._parameters, module._buffers, vars(module)):
            held: dict[str, Any] = dict(holder)
            tensors |= {f"{name}.{key}": held[key] for key in held if is_weight(key, held[key])}
        for holder, kind in kernels(module):
            kernel = holder[kind]
            origins[f"{name}.{kind}"] = getattr(kernel, _ORIGIN, "unknown")
            # Some kernels hold their packed weight as a tensor: then that is looked at as well.
            for place, cell in enumerate(getattr(kernel, "__closure__", None) or ()):
                if isinstance(cell.cell_contents, torch.Tensor):
                    tensors[f"{name}.{kind}.{place}"] = cell.cell_contents
    return fingerprint(tensors) | origins


def is_weight(name: str, held: Any) -> bool:
    """Whether what a module holds under `name` belongs to its weights; the cache does not."""
    return isinstance(held, torch.Tensor) and name != "kv_cache"
