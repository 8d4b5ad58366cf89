"""From settings to networks and optimisers."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from cluster.contracts.config.base import ModelConfig
from cluster.contracts.config.learner import LearnerConfig
from cluster.contracts.errors import UserError
from cluster.contracts.registry import ADVANTAGE_ESTIMATORS
from learner.algorithms.kl import AdaptiveKL, FixedKL
from learner.compute.mesh import Mesh
from learner.compute.optimizer import make_optimizer
from learner.compute.ranks import SINGLE, Ranks
from learner.models.halved import halve_frozen
from learner.models.heads import SharedValueHead
from learner.models.load import ValueModel, load_policy, load_tokenizer
from learner.models.placement import Placement
from learner.models.reward_artifact import require_same_tokenizer
from learner.rl.forward import Networks
from learner.rl.policies import adapter_of
from learner.rl.update import Optimizers
from learner.settings import LearnerSettings


def build_networks(settings: LearnerSettings, ranks: Ranks = SINGLE) -> tuple[Networks, Any]:
    """(networks, tokenizer), all trainable but the reference; sharded over `ranks` if there are
    several and `learner.sharding` says so. With `settings.lora` only adapters and value heads are
    trained, and the reference is the policy's own base.

    Raises UserError for settings that do not fit together or files that are not as they say.
    """
    learner = settings.learner
    device = _device(learner)
    mesh = Mesh.of(
        ranks,
        tensor=learner.tensor_parallel,
        sequence=learner.sequence_parallel,
        device=device,
    )
    tokenizer = load_tokenizer(settings.model)
    place = Placement(
        compute=learner,
        device=device,
        dtype=settings.model.dtype,
        mesh=mesh,
        packing=learner.packing,
        lora=settings.lora,
        seed=settings.seed,
        adapters=tuple(adapter_of(name) for name in settings.policies or ("",)),
    )
    make = _in_parts if place.in_parts else _whole
    return make(settings, place, tokenizer), tokenizer


def _whole(settings: LearnerSettings, place: Placement, tokenizer: Any) -> Networks:
    learner, device = settings.learner, place.device
    policy = load_policy(settings.model).to(device)
    # The reference is copied before anything is wrapped or compiled: copies of those would share
    # state with the policy.
    reference = None
    if _wants_reference(settings):
        reference = _reference(settings, policy)
    value: nn.Module | None = None
    kind = _value_kind(settings, tokenizer)
    if kind == "shared":
        value = SharedValueHead(policy.config.get_text_config().hidden_size)
    elif kind == "own" and learner.value_path is None:
        # Under LoRA both have the same frozen base, which is held once.
        value = ValueModel.from_policy(policy, shared=settings.lora is not None)
    elif kind == "own":
        value = ValueModel.from_reward_model(str(learner.value_path))
    if isinstance(value, ValueModel):
        place.adapt_value(value)
        place.ready(value.trunk)
    place.adapt(policy)
    place.ready(policy)
    if reference is not None and reference is not policy:
        reference = reference.to(device).requires_grad_(False)
        if settings.model.dtype == "bfloat16":
            halve_frozen(reference)
        place.ready(reference, frozen=True)
    # In place, after checkpointing is switched on: what is compiled is what will run.
    if learner.compile:
        _compile(policy, reference, value)
    return Networks(
        policy=policy,
        reference=reference,
        value=None if value is None else value.to(device),
        shared=kind == "shared",
        compute_dtype=settings.model.dtype,
        device=device,
        packed=bool(place.packed),
        mesh=place.mesh,
    )


def _in_parts(settings: LearnerSettings, place: Placement, tokenizer: Any) -> Networks:
    """Each model is made without memory, sharded, and then filled from its files: no process ever
    holds a whole one."""
    roots, learner = {}, settings.learner
    gathered_short = learner.sharding == "fsdp2" and settings.model.dtype == "bfloat16"
    if gathered_short and settings.rollout_dtype == "float32":
        raise UserError(
            "sharded weights are gathered in model.dtype = 'bfloat16', so that the learner cannot "
            "check workers that compute in float32",
            where="rollout.dtype",
            fix="set rollout.dtype = 'bfloat16', or model.dtype = 'float32'",
        )
    policy, roots["policy"] = place.load_policy(settings.model)
    reference = None
    if _wants_reference(settings) and _reference_is_base(settings):
        reference = policy
    elif _wants_reference(settings):
        source = _reference_source(settings)
        reference, roots["reference"] = place.load_policy(source, frozen=True)
        _require_same_vocabulary(policy, reference, source.path)
    value: nn.Module | None = None
    kind = _value_kind(settings, tokenizer)
    if kind == "shared":
        value = SharedValueHead(policy.config.get_text_config().hidden_size)
        place.sharding().apply(value.to(place.device), exact=True)
    elif kind == "own":
        value = place.load_value(settings.model, learner.value_path)
    return Networks(
        policy=policy,
        reference=reference,
        value=value,
        shared=kind == "shared",
        compute_dtype=settings.model.dtype,
        device=place.device,
        packed=bool(place.packed),
        mesh=place.mesh,
        roots=roots,
    )


def build_optimizers(networks: Networks, learner: LearnerConfig) -> Optimizers:
    """AdamW for the policy, and for a value network of its own; a shared head joins the policy's
    optimiser with its own rate and no decay."""
    value_lr = learner.lr if learner.value_lr is None else learner.value_lr
    make = partial(
        make_optimizer,
        betas=learner.betas,
        eps=learner.eps,
        weight_decay=learner.weight_decay,
        eight_bits=learner.optimizer == "adamw8bit",
        on_host="optimizer" in learner.offload,
    )
    policy = make(networks.policy_parameters(), learner.lr)
    if networks.value is None:
        return Optimizers(policy=policy, value=None)
    if not networks.shared:
        own = make(networks.value.parameters(), value_lr)
        return Optimizers(policy=policy, value=own)
    # In the policy's optimiser, because one backward pass gives both gradients and one clip
    # limits them together; `initial_lr` is what a schedule's factor multiplies.
    head = list(networks.value.parameters())
    policy.add_param_group(
        {"params": head, "lr": value_lr, "initial_lr": value_lr, "weight_decay": 0.0}
    )
    return Optimizers(policy=policy, value=None)


def build_kl_controller(settings: LearnerSettings) -> FixedKL | AdaptiveKL:
    kl = settings.algorithm.kl
    if kl.controller == "fixed":
        return FixedKL(kl.coef)
    if kl.coef == 0:
        raise UserError(
            "an adaptive KL coefficient cannot start at 0: it is only ever multiplied",
            where="algorithm.kl.coef",
            fix="set it above 0 (0.05 is usual), or algorithm.kl.controller = 'fixed'",
        )
    return AdaptiveKL(kl.coef, kl.target, kl.horizon)


def _device(learner: LearnerConfig) -> torch.device:
    if learner.gpus == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "no GPU that torch can use here",
            where="learner.gpus",
            fix="set learner.gpus = 0, or install torch for this machine's GPU",
        )
    return torch.device("cuda")


def _wants_reference(settings: LearnerSettings) -> bool:
    """Without a KL to pay for, now or once a monitor says so, only somebody who names a reference
    wants it measured."""
    named = settings.learner.reference_path is not None
    return settings.algorithm.kl.coef > 0 or named or settings.reference_for_monitors


def _reference(settings: LearnerSettings, policy: Any) -> Any:
    # Adapters leave the base as it is: the reference is the policy without them.
    if _reference_is_base(settings):
        return policy
    # The starting policy as it is in memory: reading the files again could give other weights.
    if settings.learner.reference_path is None:
        return copy.deepcopy(policy)
    source = _reference_source(settings)
    reference = load_policy(source)
    _require_same_vocabulary(policy, reference, source.path)
    return reference


def _reference_is_base(settings: LearnerSettings) -> bool:
    return settings.lora is not None and settings.learner.reference_path is None


def _reference_source(settings: LearnerSettings) -> ModelConfig:
    path = settings.learner.reference_path
    if path is None:
        return settings.model
    trusted = settings.model.trust_remote_code
    revision = settings.learner.reference_revision
    return ModelConfig(path=path, revision=revision, trust_remote_code=trusted)


def _require_same_vocabulary(policy: Any, reference: Any, path: str) -> None:
    # Log-probabilities of two vocabularies cannot be subtracted, whatever their tokens are.
    ours, theirs = (m.get_input_embeddings().weight.shape[0] for m in (policy, reference))
    if ours != theirs:
        raise UserError(
            f"the reference has {theirs} tokens in its vocabulary, the policy {ours}",
            where=path,
            fix="set learner.reference_path to a model with the policy's tokenizer",
        )


def _value_kind(settings: LearnerSettings, tokenizer: Any) -> Literal["own", "shared"] | None:
    """Which value network there is. Raises UserError for settings that do not fit together."""
    learner = settings.learner
    if not ADVANTAGE_ESTIMATORS[settings.algorithm.advantage].needs_values:
        return None
    kind = learner.value_model
    if kind == "auto":
        kind = "shared" if learner.value_path is None else "own"
    if kind == "shared" and learner.value_path is not None:
        raise UserError(
            "a value head on the policy's trunk cannot start from a reward model",
            where="learner.value_path",
            fix="set learner.value_model = 'own', or leave it out with learner.value_path=none",
        )
    if learner.value_path is not None:
        require_same_tokenizer(learner.value_path, tokenizer)
    return kind


def _compile(policy: Any, reference: Any | None, value: nn.Module | None) -> None:
    """Compile the trunks in place, for rows of any shape; names of parameters stay."""
    trunks = [model.base_model for model in (policy, reference) if model is not None]
    if isinstance(value, ValueModel):
        trunks.append(value.trunk)
    for trunk in trunks:
        # Rows differ in length with every microbatch; compiled for each shape it would never end.
        trunk.compile(dynamic=True)
