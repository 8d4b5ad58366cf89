"""A frozen base in 8 or 4 bits under adapters that are trained (QLoRA, arXiv:2305.14314).

Only layers with an adapter are quantised: embeddings, norms and output heads stay as they are.
Run on CPU; the same torchao tensors exist on CUDA, where Accord has not run them.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from cluster.weights.low_precision import Precision, held_bytes, quantised


def quantise_base(model: Any, precision: Precision) -> None:
    """Hold the weights under the model's adapters in `precision`, in place; the adapters stay.

    Raises UserError for a weight that has no 4-bit form.
    """
    if precision == "full":
        return
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Linear):
            base.weight = nn.Parameter(quantised(base.weight, precision), requires_grad=False)


def base_bytes(model: Any) -> int:
    """Bytes of all parameters but the adapters', a tied one once."""
    return sum(held_bytes(p) for name, p in model.named_parameters() if ".lora_" not in name)
