"""Model FLOPs utilisation: the arithmetic a step has to do, over what the machine could have done.

F = 6 N per trained token (2 forward, 4 backward; N: weights of matrix products) plus
6 L d len^2 per sample for causal attention; a pass without gradient counts a third (PaLM, Chowdhery
et al. 2022, appendix B, with the causal half). Padding and recomputation earn nothing, and the
output head counts at answer tokens only, for it runs nowhere else.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cluster.contracts.devices import PROBED_SIDE
from learner.models.heads import lm_head
from learner.rl.forward import Networks
from learner.rl.rollouts import RolloutBatch
from learner.settings import LearnerSettings

_PROBE_S = 0.05


@dataclass(frozen=True, slots=True)
class TrunkFlops:
    """weights: of a trunk's matrix products. attention: layers * heads * head size."""

    weights: int
    attention: int

    @classmethod
    def of(cls, trunk: nn.Module, config: Any) -> TrunkFlops:
        text = config.get_text_config()
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        # Norms, biases and rotary tables are left out: they are below one percent of the work.
        linear = (m.weight.numel() for m in trunk.modules() if isinstance(m, nn.Linear))
        return cls(sum(linear), text.num_hidden_layers * text.num_attention_heads * size)

    def forward(self, batch: RolloutBatch) -> float:
        """FLOPs of one forward pass over all samples."""
        # A causal token attends to half of its row on average: 4 * l^2 / 2 for both products.
        lengths = batch.lengths.astype(float)
        return float(2 * self.weights * lengths.sum() + 2 * self.attention * (lengths**2).sum())


def step_flops(
    networks: Networks, settings: LearnerSettings, batch: RolloutBatch, value_only: bool
) -> float:
    """Model FLOPs of one step: each epoch, the reference, and the measuring pass where several
    updates need one (with a single update it is a recomputation at most)."""
    learner = settings.learner
    trunk = TrunkFlops.of(networks.policy.base_model, networks.policy.config)
    answers = float(batch.response_ids.lengths.sum())
    policy = trunk.forward(batch) + 2.0 * lm_head(networks.policy).weight.numel() * answers
    # Backward costs twice the forward pass: gradients of inputs and of weights. Of frozen weights,
    # with adapters, only the first.
    both = 3.0 if settings.lora is None else 2.0
    trained = 1.0 if value_only else both
    measured = float(learner.epochs * learner.minibatches > 1)
    passes = trained * learner.epochs + measured
    if value_only and not networks.shared:
        passes = 1.0
    total = passes * policy + (policy if networks.reference is not None else 0.0)
    if networks.value is not None and not networks.shared:
        total += (both * learner.epochs + measured) * trunk.forward(batch)
    return total


def matrix_peak(compute_dtype: str, device: torch.device) -> float:
    """FLOP/s of the best of some large matrix products in `compute_dtype`; takes about 50 ms.

    On a CPU taken from the process's CPU time: what others use of the machine is no smaller peak.
    """
    side = PROBED_SIDE.on(device)
    dtype = getattr(torch, compute_dtype)
    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    _timed(a, b)
    # After one that is not counted: the first call chooses kernels and touches the memory.
    took, until = [_timed(a, b)], time.perf_counter() + _PROBE_S
    while time.perf_counter() < until:
        took.append(_timed(a, b))
    return 2.0 * side**3 / min(took)


def _timed(a: Tensor, b: Tensor) -> float:
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
        began = time.perf_counter()
        torch.mm(a, b)
        torch.cuda.synchronize(a.device)
        return time.perf_counter() - began
    cpu_began = time.process_time()
    torch.mm(a, b)
    return (time.process_time() - cpu_began) / torch.get_num_threads()
