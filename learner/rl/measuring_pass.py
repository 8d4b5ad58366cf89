"""The forward passes of a step before its update, and how few of them will do.

A step of one optimiser update needs the policy's forward pass once. Where nothing before the
update asks for the policy's numbers, the training forward is the first ("inline"). Where something
does (a KL in the reward, values), the measuring pass is run with gradient and its graph waits for
the loss ("kept"), if there is memory for it. Else, and with several updates, the policy runs
without gradient first and again in training ("separate"). All three give the same step,
bit for bit where kernels are deterministic.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from learner.compute.optimizer import compute_in
from learner.compute.sharding import local
from learner.rl.forward import Microbatch, Networks, PolicyOutputs, policy_outputs
from learner.settings import LearnerSettings

Way = Literal["inline", "kept", "separate"]

_CPU_SHARE, _GPU_SHARE = 8, 4  # of the machine's memory, of what is free on the GPU


@dataclass(slots=True, eq=False)
class Kept:
    """A microbatch's forward pass with gradient, waiting for its loss. values: [b, width]."""

    out: PolicyOutputs
    values: Tensor | None


@dataclass(slots=True, eq=False)
class Passes:
    """[B, R] float32, zero where there is no token; `after` [B]: value after the last token.

    prox_logp, entropy: zeros with `way` "inline", until the update has filled them in.
    kept: one for each microbatch with `way` "kept", else None.
    """

    way: Way
    prox_logp: Tensor
    entropy: Tensor
    ref_logp: Tensor | None
    values: Tensor | None
    after: Tensor | None
    kept: list[Kept] | None


def choose_way(settings: LearnerSettings, networks: Networks, value_only: bool) -> Way:
    """How the policy's numbers of a step come about, but for the memory that "kept" needs.

    value_only: the step leaves the policy as it is, so its forward pass carries no gradient.
    """
    learner = settings.learner
    if learner.epochs > 1 or learner.minibatches > 1 or value_only:
        return "separate"
    kl_in_reward = networks.reference is not None and settings.algorithm.kl.place == "reward"
    if not networks.has_values and not kl_in_reward:
        return "inline"
    if learner.activation_memory_mb == 0 or learner.gradient_checkpointing:
        return "separate"
    if networks.sharded:
        return "separate"  # A waiting graph would keep what was gathered.
    return "kept"


def run_passes(
    way: Way,
    rows: int,
    width: int,
    micros: Sequence[Microbatch],
    networks: Networks,
    settings: LearnerSettings,
) -> Passes:
    """The passes of one step of `rows` samples, answers padded to `width`.

    micros: this rank's; the numbers of the others' samples come from them.
    """
    device = networks.device

    def zeros(wanted: bool = True) -> Tensor | None:
        return torch.zeros(rows, width, device=device) if wanted else None

    passes = Passes(
        way=way,
        prox_logp=torch.zeros(rows, width, device=device),
        entropy=torch.zeros(rows, width, device=device),
        ref_logp=zeros(networks.reference is not None),
        values=zeros(networks.has_values),
        after=torch.zeros(rows, device=device) if networks.has_values else None,
        kept=[] if way == "kept" else None,
    )
    # One context for all microbatches: autocast casts each weight once, not once a microbatch.
    with compute_in(networks.compute_dtype, device, cached=not networks.sharded):
        if way != "inline":
            _policy_passes(passes, micros, networks, settings)
        if passes.ref_logp is not None:
            _reference_passes(passes.ref_logp, micros, networks, settings)
    # Each rank has filled in its own rows, so these sums add zeros to numbers.
    found = (passes.prox_logp, passes.entropy, passes.ref_logp, passes.values, passes.after)
    networks.ranks.sum_([tensor for tensor in found if tensor is not None])
    return passes


def _policy_passes(
    passes: Passes, micros: Sequence[Microbatch], networks: Networks, settings: LearnerSettings
) -> None:
    entropy_gradient = settings.algorithm.entropy_coef > 0
    total = sum(micro.input_ids.numel() for micro in micros)
    for index, micro in enumerate(micros):
        with torch.set_grad_enabled(passes.kept is not None):
            counter = _SavedBytes(networks)
            with counter.watch(index == 0 and passes.kept is not None):
                out = policy_outputs(
                    networks.policy_root,
                    micro,
                    settings.temperature,
                    networks.compute_dtype,
                    entropy=True,
                    entropy_gradient=entropy_gradient,
                )
                values, after = None, None
                if networks.has_values:
                    values, after = networks.values(micro, out.hidden)
        micro.put(passes.prox_logp, out.logp)
        if out.entropy is not None:
            micro.put(passes.entropy, out.entropy)
        if values is not None and passes.values is not None:
            micro.put(passes.values, values)
        if after is not None and passes.after is not None and micro.counts:
            passes.after[micro.rows] = after.detach()
        if passes.kept is None:
            continue
        passes.kept.append(Kept(out, values))
        expected = counter.total * total / micro.input_ids.numel()
        if index == 0 and expected > _memory_limit(settings, networks):
            passes.way, passes.kept = "separate", None


@torch.no_grad()
def _reference_passes(
    ref_logp: Tensor, micros: Sequence[Microbatch], networks: Networks, settings: LearnerSettings
) -> None:
    for micro in micros:
        out = policy_outputs(
            networks.reference_root, micro, settings.temperature, networks.compute_dtype
        )
        micro.put(ref_logp, out.logp)


def _memory_limit(settings: LearnerSettings, networks: Networks) -> float:
    """Bytes that waiting graphs of this rank may take."""
    device = networks.device
    chosen = settings.learner.activation_memory_mb
    if chosen is not None:
        return chosen * 2.0**20
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / _GPU_SHARE
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return memory / _CPU_SHARE / networks.ranks.size


class _SavedBytes:
    """Counts the memory that autograd holds on to, each storage once, without the parameters."""

    def __init__(self, networks: Networks) -> None:
        modules = [networks.policy, *([networks.value] if networks.value is not None else [])]
        params = [local(p) for module in modules for p in module.parameters()]
        self._seen = {p.untyped_storage().data_ptr() for p in params}
        self.total = 0

    def watch(self, wanted: bool) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self._count if wanted else _same, _same)

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor
