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

from cluster.weights.low_precision import pieces
from learner.compute.optimizer import compute_in
from learner.compute.sharding import local
from learner.rl.forward import Networks, PolicyOutputs, policy_outputs
from learner.rl.microbatch import Microbatch
from learner.settings import LearnerSettings

PassPlan = Literal["inline", "kept", "separate"]

_CPU_SHARE, _GPU_SHARE = 8, 4  # of the machine's memory, of what is free on the GPU


@dataclass(frozen=True, slots=True, eq=False)
class WaitingForward:
    """A microbatch's forward pass with gradient, waiting for its loss. values: [b, width]."""

    out: PolicyOutputs
    values: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PolicyPass:
    """What the policy's weights of now give for the tokens of this process's rows: float32 [B, R],
    zero where there is no token."""

    logp: Tensor
    entropy: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeasuredPasses:
    """What was measured before the update; [B, R] float32, zero where there is no token.

    policy: None with the plan "inline", whose update measures it. ref_logp, values: None without a
    reference or a value network. after: [B] values of the states after the last token, as values.
    waiting: one for each of this rank's microbatches where "kept" found the memory, else None.
    """

    policy: PolicyPass | None
    ref_logp: Tensor | None
    values: Tensor | None
    after: Tensor | None
    waiting: tuple[WaitingForward, ...] | None


def plan_passes(settings: LearnerSettings, networks: Networks, value_only: bool) -> PassPlan:
    """How the policy's numbers of a step come about, but for the memory that "kept" needs.

    value_only: the step leaves the policy as it is, so its forward pass carries no gradient.
    """
    learner = settings.learner
    # The first of several updates changes the weights: what is measured has to be older than it.
    if learner.epochs > 1 or learner.minibatches > 1 or value_only:
        return "separate"
    kl_in_reward = networks.reference is not None and settings.algorithm.kl.place == "reward"
    if not networks.has_values and not kl_in_reward:
        return "inline"
    # Checkpointing throws away what a waiting graph would hold, so waiting would gain nothing.
    if learner.activation_memory_mb == 0 or learner.gradient_checkpointing:
        return "separate"
    if networks.sharded:
        return "separate"  # A waiting graph would keep what was gathered.
    return "kept"


def run_passes(
    plan: PassPlan,
    rows: int,
    width: int,
    micros: Sequence[Microbatch],
    networks: Networks,
    settings: LearnerSettings,
) -> MeasuredPasses:
    """The passes of this process's `rows` samples of a step, answers padded to `width`."""
    device = networks.device

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, device=device)

    policy = None
    if plan != "inline":
        policy = PolicyPass(logp=zeros(rows, width), entropy=zeros(rows, width))
    valued = networks.has_values and policy is not None
    values, after = (zeros(rows, width), zeros(rows)) if valued else (None, None)
    ref_logp = zeros(rows, width) if networks.reference is not None else None
    waiting: tuple[WaitingForward, ...] | None = None
    # One context for all microbatches: autocast casts each weight once, not once a microbatch.
    with compute_in(networks.compute_dtype, device, cached=not networks.sharded):
        if policy is not None:
            into = _PolicyTensors(policy, values, after)
            waiting = _policy_passes(plan == "kept", into, micros, networks, settings)
        if ref_logp is not None:
            _reference_passes(ref_logp, micros, networks, settings)
    return MeasuredPasses(
        policy=policy, ref_logp=ref_logp, values=values, after=after, waiting=waiting
    )


@dataclass(frozen=True, slots=True, eq=False)
class _PolicyTensors:
    """Where the policy's passes write their numbers."""

    policy: PolicyPass
    values: Tensor | None
    after: Tensor | None

    def put(
        self, micro: Microbatch, out: PolicyOutputs, values: Tensor | None, after: Tensor | None
    ) -> None:
        micro.put(self.policy.logp, out.logp)
        if out.entropy is not None:
            micro.put(self.policy.entropy, out.entropy)
        if values is not None and self.values is not None:
            micro.put(self.values, values)
        if after is not None and self.after is not None and micro.counts:
            self.after[micro.rows] = after.detach()


def _policy_passes(
    keep: bool,
    into: _PolicyTensors,
    micros: Sequence[Microbatch],
    networks: Networks,
    settings: LearnerSettings,
) -> tuple[WaitingForward, ...] | None:
    """Fill `into`; with `keep`, the passes themselves, unless they would take too much memory."""
    total = sum(micro.input_ids.numel() for micro in micros)
    waiting: list[WaitingForward] = []
    for index, micro in enumerate(micros):
        counter = _SavedBytes(networks)
        with torch.set_grad_enabled(keep), counter.watch(index == 0 and keep):
            out = policy_outputs(
                networks.policy_root,
                micro,
                settings.temperature,
                networks.compute_dtype,
                entropy=True,
                entropy_gradient=settings.algorithm.entropy_coef > 0,
            )
            values, after = None, None
            if networks.has_values:
                values, after = networks.values(micro, out.hidden)
        into.put(micro, out, values, after)
        if keep:
            waiting.append(WaitingForward(out, values))
        # The first microbatch is the longest; memory grows with tokens, so it tells of them all.
        expected = counter.total * total / micro.input_ids.numel()
        if keep and index == 0 and _any(expected > _memory_limit(settings, networks), networks):
            keep, waiting = False, []
    return tuple(waiting) if keep else None


def _any(said: bool, networks: Networks) -> bool:
    """Whether any process of this one's replica says so: they run the same passes together."""
    mesh, device = networks.mesh, networks.device
    return mesh.sequence.total(mesh.tensor.total(float(said), device), device) > 0


@torch.no_grad()
def _reference_passes(
    ref_logp: Tensor, micros: Sequence[Microbatch], networks: Networks, settings: LearnerSettings
) -> None:
    with networks.as_reference() as reference:
        for micro in micros:
            out = policy_outputs(reference, micro, settings.temperature, networks.compute_dtype)
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
        held = [local(p.detach()) for module in modules for p in module.parameters()]
        params = [piece for tensor in held for piece in pieces(tensor)]
        self._seen = {p.untyped_storage().data_ptr() for p in params}
        self.total = 0

    def watch(self, wanted: bool) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self._count if wanted else _same, _same)

    def _count(self, tensor: Tensor) -> Tensor:
        for piece in pieces(tensor):
            storage = piece.untyped_storage()
            if storage.data_ptr() not in self._seen:
                self._seen.add(storage.data_ptr())
                self.total += storage.nbytes()
        return tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor
