"""The forward passes of a step before its update, and how few of them will do.

A step of one optimiser update needs the policy's forward pass once. Where nothing before the
update asks for the policy's numbers, the training forward is the first ("inline"). Where something
does (a KL in the reward, values), the measuring pass is run with gradient and its graph waits for
the loss ("kept"), if there is memory for it. Else, and with several updates, the policy runs
without gradient first and again in training ("separate"). All three give the same step,
bit for bit where kernels are deterministic.

A part of a step can be measured before the others are there (`early`). A pass of the plan "inline"
waits then too.
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
class _OfPolicy:
    """What the policy and the value network give for a microbatch, without gradient but in
    `waiting`. logp, entropy, values: [b, width]. after: [b]."""

    logp: Tensor
    entropy: Tensor | None
    values: Tensor | None
    after: Tensor | None
    waiting: WaitingForward | None

    @classmethod
    def of(
        cls, out: PolicyOutputs, values: Tensor | None, after: Tensor | None, *, waits: bool
    ) -> _OfPolicy:
        return cls(
            logp=out.logp.detach(),
            entropy=None if out.entropy is None else out.entropy.detach(),
            values=None if values is None else values.detach(),
            after=None if after is None else after.detach(),
            waiting=WaitingForward(out, values) if waits else None,
        )


@dataclass(frozen=True, slots=True, eq=False)
class MicrobatchPasses:
    """What was measured of a microbatch. policy: None where the update measures it. ref_logp:
    [b, width]; None without a reference."""

    policy: _OfPolicy | None
    ref_logp: Tensor | None


PartPasses = tuple[MicrobatchPasses, ...]
"""One for each microbatch of a part of a step, in their order."""


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
    waiting: one for each of this rank's microbatches, None for one that does not wait; None where
    none does.
    """

    policy: PolicyPass | None
    ref_logp: Tensor | None
    values: Tensor | None
    after: Tensor | None
    waiting: tuple[WaitingForward | None, ...] | None


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
    return "kept" if graphs_may_wait(settings, networks) else "separate"


def graphs_may_wait(settings: LearnerSettings, networks: Networks) -> bool:
    """Whether a forward pass may wait for its loss, if there is memory for it."""
    learner = settings.learner
    # Checkpointing throws away what a waiting graph would hold, so waiting would gain nothing.
    if learner.activation_memory_mb == 0 or learner.gradient_checkpointing:
        return False
    return not networks.sharded  # A waiting graph would keep what was gathered.


def run_passes(
    plan: PassPlan,
    parts: Sequence[Sequence[Microbatch]],
    networks: Networks,
    settings: LearnerSettings,
    graphs: GraphMemory | None = None,
    *,
    early: bool = False,
) -> list[PartPasses]:
    """The passes of some parts of a step, each part for itself: nothing of one depends on another.

    graphs: what waiting graphs may take, of all parts of the step; None: this is all of it. early:
    the step is yet to come, so that the policy's pass is run also where the plan is "inline", and
    waits, if there is memory.
    """
    graphs = graphs or GraphMemory(networks, settings)
    keep = plan == "kept" or (plan == "inline" and early and graphs_may_wait(settings, networks))
    # One context for all microbatches: autocast casts each weight once, not once a microbatch.
    with compute_in(networks.compute_dtype, networks.device, cached=not networks.sharded):
        return [_run_part(plan, keep, micros, networks, settings, graphs) for micros in parts]


def _run_part(
    plan: PassPlan,
    keep: bool,
    micros: Sequence[Microbatch],
    networks: Networks,
    settings: LearnerSettings,
    graphs: GraphMemory,
) -> PartPasses:
    policy: list[_OfPolicy] | list[None] = [None] * len(micros)
    if micros and (keep or plan != "inline"):
        policy = _policy_passes(keep, micros, networks, settings, graphs)
        # One of the plan "inline" that may not wait is run by the update, with all of its part.
        if plan == "inline" and policy[0].waiting is None:
            policy = [None] * len(micros)
    reference: list[Tensor] | list[None] = [None] * len(micros)
    if networks.reference is not None:
        reference = _reference_passes(micros, networks, settings)
    return tuple(MicrobatchPasses(*pair) for pair in zip(policy, reference, strict=True))


def measured(
    plan: PassPlan,
    rows: int,
    width: int,
    micros: Sequence[Microbatch],
    passes: Sequence[MicrobatchPasses],
    networks: Networks,
) -> MeasuredPasses:
    """The passes of this process's `rows` samples of a step, completions padded to `width`."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, device=networks.device)

    policy = None
    if plan != "inline":
        policy = PolicyPass(logp=zeros(rows, width), entropy=zeros(rows, width))
    valued = networks.has_values and policy is not None
    values, after = (zeros(rows, width), zeros(rows)) if valued else (None, None)
    ref_logp = zeros(rows, width) if networks.reference is not None else None
    for micro, done in zip(micros, passes, strict=True):
        found = done.policy
        if found is not None and policy is not None:
            micro.put(policy.logp, found.logp)
            if found.entropy is not None:
                micro.put(policy.entropy, found.entropy)
            if values is not None and found.values is not None:
                micro.put(values, found.values)
            if after is not None and found.after is not None and micro.counts:
                after[micro.rows] = found.after
        if ref_logp is not None and done.ref_logp is not None:
            micro.put(ref_logp, done.ref_logp)
    waiting = tuple(None if done.policy is None else done.policy.waiting for done in passes)
    return MeasuredPasses(
        policy=policy,
        ref_logp=ref_logp,
        values=values,
        after=after,
        waiting=waiting if any(waiting) else None,
    )


def _policy_passes(
    keep: bool,
    micros: Sequence[Microbatch],
    networks: Networks,
    settings: LearnerSettings,
    graphs: GraphMemory,
) -> list[_OfPolicy]:
    """With `keep`, the passes themselves too, unless they would take too much memory."""
    total = sum(micro.input_ids.numel() for micro in micros)
    done: list[_OfPolicy] = []
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
        if keep and index == 0:
            # It is the longest; memory grows with tokens, so it tells of all of its part.
            keep = graphs.takes(counter.total * total / micro.input_ids.numel())
        done.append(_OfPolicy.of(out, values, after, waits=keep))
    return done


def _any(said: bool, networks: Networks) -> bool:
    """Whether any process of this one's replica says so: they run the same passes together."""
    mesh, device = networks.mesh, networks.device
    return mesh.sequence.total(mesh.tensor.total(float(said), device), device) > 0


@torch.no_grad()
def _reference_passes(
    micros: Sequence[Microbatch], networks: Networks, settings: LearnerSettings
) -> list[Tensor]:
    with networks.as_reference() as reference:
        return [
            policy_outputs(reference, micro, settings.temperature, networks.compute_dtype).logp
            for micro in micros
        ]


class GraphMemory:
    """The memory that the waiting graphs of a step may take, of all its parts together."""

    def __init__(self, networks: Networks, settings: LearnerSettings) -> None:
        self._networks, self._settings = networks, settings
        self._left: float | None = None  # bytes, as soon as the first has asked

    def takes(self, expected: float) -> bool:
        """Whether there is room for graphs of so many bytes, which is then theirs."""
        if self._left is None:
            self._left = _memory_limit(self._settings, self._networks)
        if _any(expected > self._left, self._networks):
            return False
        self._left -= expected
        return True


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
