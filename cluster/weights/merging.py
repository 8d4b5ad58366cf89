"""LoRA's merge, which the learner and the workers compute with one function.

Merged weights never replace the base in place: adding and subtracting a change again moves a weight
by a rounding error, and a run could not be replayed bit for bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from cluster.contracts.devices import NUMBERS_MERGED
from cluster.contracts.errors import WeightMismatch
from cluster.weights.manifest import checksum

PEFT_PREFIX = "base_model.model."
"""Of every name in an adapter's file, as peft writes it."""
_A = ".lora_A.weight"


@torch.no_grad()
def merged_weight(base: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """base + scale * b @ a as a new float32 tensor.

    base: [out, in], bfloat16 or float32; a: [rank, in]; b: [out, rank]. The caller rounds the
    result, once, to the type that is computed in.

    Sums are taken in float64 and rounded to float32 at the end. So their order, which changes with
    the kernel, the number of threads and the device, does not show in the result.
    """
    merged = torch.empty(base.shape, device=base.device)
    rows = max(1, NUMBERS_MERGED.on(base.device) // base.shape[1])
    wide = a.double()
    # Outside any autocast of the caller, which would round the factors.
    with torch.autocast(base.device.type, enabled=False):
        for start in range(0, base.shape[0], rows):
            part = slice(start, start + rows)
            merged[part] = torch.addmm(base[part].double(), b[part].double(), wide, alpha=scale)
    return merged


def adapted_name(module: str) -> str:
    """Name of the weight that the adapter of a layer changes, as the base model calls it."""
    return f"{module}.weight"


def factor_names(module: str) -> tuple[str, str]:
    """Names of a layer's A and B, as in the file of a peft adapter."""
    return f"{PEFT_PREFIX}{module}.lora_A.weight", f"{PEFT_PREFIX}{module}.lora_B.weight"


def factors_by_weight(tensors: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Name of each weight that an adapter changes -> its (A, B), of tensors under peft's names.

    Raises WeightMismatch for a tensor that is no factor, or that lacks the other one.
    """
    left, found = set(tensors), {}
    for name in tensors:
        if name.endswith(_A):
            module = name.removeprefix(PEFT_PREFIX).removesuffix(_A)
            a, b = factor_names(module)
            if b not in tensors:
                raise WeightMismatch(f"the adapter of {module} has an A and no B")
            found[adapted_name(module)] = (tensors[a], tensors[b])
            left -= {a, b}
    if left:
        raise WeightMismatch(f"the adapter holds {min(left)!r}, which belongs to no layer")
    return found


def base_fingerprint(tensors: Iterable[tuple[str, Tensor]], dtype: str) -> str:
    """Hex SHA-256 over name, shape and checksum of every tensor of a base in `dtype`, ordered by
    name: learner and workers merge into the same numbers, or do not merge."""
    rows = []
    for name, tensor in tensors:
        held = tensor.detach().to("cpu", getattr(torch, dtype)).contiguous()
        rows.append((name, list(held.shape), checksum(held.view(-1).view(torch.uint8).numpy())))
    return hashlib.sha256(json.dumps([dtype, sorted(rows)]).encode()).hexdigest()
