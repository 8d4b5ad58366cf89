"""LoRA's merge, which the learner and the workers compute with one function.

Merged weights never replace the base in place: adding and subtracting a change again moves a weight
by a rounding error, and a run could not be replayed bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

PEFT_PREFIX = "base_model.model."
"""Of every name in an adapter's file, as peft writes it."""


@torch.no_grad()
def merged_weight(base: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """base + scale * b @ a as a new float32 tensor.

    base: [out, in], bfloat16 or float32; a: [rank, in]; b: [out, rank]. The caller rounds the
    result, once, to the type that is computed in.
    """
    # Outside any autocast of the caller: the product has to be float32 at the learner, too.
    with torch.autocast(base.device.type, enabled=False):
        change = b.float() @ a.float()
    return change.mul_(scale).add_(base)


def adapted_name(module: str) -> str:
    """Name of the weight that the adapter of a layer changes, as the base model calls it."""
    return f"{module}.weight"


def factor_names(module: str) -> tuple[str, str]:
    """Names of a layer's A and B, as in the file of a peft adapter."""
    return f"{PEFT_PREFIX}{module}.lora_A.weight", f"{PEFT_PREFIX}{module}.lora_B.weight"


def adapted_modules(names: object) -> list[str]:
    """The layers whose A is among `names` of an adapter's tensors, in order."""
    end = ".lora_A.weight"
    found = [str(name) for name in names if str(name).endswith(end)]  # type: ignore[attr-defined]
    return [name.removeprefix(PEFT_PREFIX).removesuffix(end) for name in found]
