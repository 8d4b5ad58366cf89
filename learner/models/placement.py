"""How the models of one trainer come to its devices: whole, or in parts that were never whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from cluster.contracts.config.base import DType, ModelConfig
from cluster.contracts.config.compute import ComputeConfig
from cluster.contracts.config.lora import LoraConfig
from learner.compute.mesh import ALONE, Mesh, require_heads
from learner.compute.sharding import Gathered, Sharding, call, shard_layers, shard_model
from learner.models.files import Placing
from learner.models.heads import check_lm_head
from learner.models.load import (
    ValueModel,
    load_policy,
    load_sequence_classifier,
    load_trunk,
    load_value_head,
)
from learner.models.lora import (
    DEFAULT,
    adapter_dropouts,
    add_adapter,
    hold_base_in,
    initialise_adapter,
)
from learner.models.packed_attention import (
    choose_layout,
    require_plain_causal,
    use_packed_attention,
)
from learner.models.quantised import quantise_base
from learner.models.tensor_plan import split_matrices


@dataclass(slots=True, kw_only=True, eq=False)
class Placement:
    """Where the models of a trainer lie, and what is done to each before it has memory.

    compute: `learner` or `fit` of a config. dtype: what is computed in. packing: see
    `choose_layout`, which decides it for all models when the first is loaded. lora: the adapters
    that models get, on a frozen base that lies in the type that is computed in; seed: of these.
    adapters: their names in the policy.
    """

    compute: ComputeConfig
    device: torch.device
    dtype: DType
    mesh: Mesh = ALONE
    packing: str = "padded"
    packed: bool | None = None
    lora: LoraConfig | None = None
    seed: int = 0
    adapters: tuple[str, ...] = (DEFAULT,)

    @property
    def in_parts(self) -> bool:
        """Whether no process holds a whole model."""
        split = self.compute.sharding == "fsdp2" or self.compute.tensor_parallel > 1
        return split and self.mesh.everyone.size > 1

    def sharding(self, *, frozen: bool = False) -> Sharding:
        offload = self.compute.offload
        return Sharding(
            on=self.compute.sharding == "fsdp2",
            mesh=self.mesh.shard_devices,
            bfloat16=self.dtype == "bfloat16",
            reshard=self.compute.reshard_after_forward,
            prefetch=self.compute.prefetch_layers,
            on_host="parameters" in offload or (frozen and "reference" in offload),
        )

    def adapt(self, model: Any) -> None:
        """Freeze a whole policy in memory and give it its adapters, where `lora` says so."""
        if self.lora is not None:
            hold_base_in(model, self.dtype)
            for name in self.adapters:
                add_adapter(model, self.lora, name, self.seed)
            quantise_base(model, self.lora.base)

    def adapt_value(self, value: ValueModel) -> None:
        """As `adapt`, for a value network of its own: one adapter."""
        if self.lora is not None:
            hold_base_in(value.trunk, self.dtype)
            # Of another seed, or policy and value would start from the same numbers.
            add_adapter(value.trunk, self.lora, seed=self.seed + 1)
            quantise_base(value.trunk, self.lora.base)

    def ready(self, model: Any, *, frozen: bool = False) -> None:
        """What is done in place to a model, with memory or without, before it is sharded."""
        if self.packed is None:
            self.packed = choose_layout(self.packing, self.device, self.dtype, model)
        split_rows = self.mesh.sequence.size > 1
        if split_rows:
            require_plain_causal(model, self.compute.section)
        require_heads(model, self.mesh, self.compute.section)
        if self.packed or split_rows:
            use_packed_attention(model)
        split_matrices(model, self.mesh, self.compute.section)
        if self.compute.gradient_checkpointing and not frozen:
            checkpoint_gradients(model, on_host="activations" in self.compute.offload)

    def load_policy(self, cfg: ModelConfig, *, frozen: bool = False) -> tuple[Any, Gathered]:
        """(model, the root that forward passes go through) of a causal model in parts.

        frozen: a reference; it needs no gradient and no adapter, and lies in the type that is
        computed in. Raises UserError as `load_policy`.
        """
        roots: list[Gathered] = []

        def prepare(model: Any) -> nn.Module:
            roots.append(self._in_parts(model, frozen=frozen))
            return roots[0]

        model = load_policy(cfg, self._placing(prepare, frozen=frozen))
        if self.lora is not None and not frozen:
            for name in self.adapters:
                initialise_adapter(model, name, self.seed)
        with torch.no_grad():
            call(roots[0], check_lm_head)
        return model, roots[0]

    def load_classifier(
        self,
        cfg: ModelConfig,
        *,
        pad_token_id: int,
        heads: int,
    ) -> Gathered:
        """As `load_sequence_classifier`, in parts: the root."""
        roots: list[Gathered] = []

        def prepare(model: Any) -> nn.Module:
            roots.append(self._in_parts(model, exact=(model.score,)))
            return roots[0]

        placing = self._placing(prepare)
        model = load_sequence_classifier(
            cfg, pad_token_id=pad_token_id, heads=heads, placing=placing
        )
        if self.lora is not None:
            initialise_adapter(model, seed=self.seed)
        return roots[0]

    def _in_parts(
        self,
        model: Any,
        *,
        frozen: bool = False,
        exact: tuple[nn.Module, ...] = (),
    ) -> Gathered:
        """Shard a model that has no memory yet. exact: modules that compute in float32."""
        if frozen:
            model.requires_grad_(False)
        elif self.lora is not None:
            for name in self.adapters:
                add_adapter(model, self.lora, name)
        self.ready(model, frozen=frozen)
        how = self.sharding(frozen=frozen)
        for module in exact:
            how.apply(module, exact=True)
        layers = model.config.get_text_config().num_hidden_layers
        return shard_model(model, model.base_model, layers, how)

    def load_value(self, cfg: ModelConfig, reward_model: str | None) -> ValueModel:
        """A value network of its own in parts: from a reward model, or the policy's trunk under a
        head that gives 0."""
        made: list[ValueModel] = []

        def prepare(trunk: Any) -> nn.Module:
            if self.lora is not None:
                add_adapter(trunk, self.lora)
            self.ready(trunk)
            config = trunk.config.get_text_config()
            how = self.sharding()
            head = load_value_head(reward_model, config.hidden_size)
            shard_layers(trunk, config.num_hidden_layers, how)
            # Values are compared with returns: their head computes in float32.
            how.apply(head, exact=True)
            made.append(ValueModel(trunk, head))
            how.apply(made[0])
            return made[0]

        trunk = load_trunk(cfg, self._placing(prepare), reward_model=reward_model)
        if self.lora is not None:
            initialise_adapter(trunk, seed=self.seed + 1)
        return made[0]

    def _placing(self, prepare: Callable[[Any], nn.Module], *, frozen: bool = False) -> Placing:
        short = (frozen or self.lora is not None) and self.dtype == "bfloat16"
        return Placing(
            prepare=prepare,
            device=self.device,
            dtype=torch.bfloat16 if short else torch.float32,
            weights_on_host=self.sharding(frozen=frozen).on_host,
        )


def checkpoint_gradients(model: Any, *, on_host: bool = False) -> None:
    """Keep of each layer only what goes in (on_host: in the memory of the host) and compute it
    again in backward.

    transformers recomputes activations in training mode only, so dropout goes to 0 instead.
    """
    own = adapter_dropouts(model)
    for module in model.modules():
        # Dropout would also make old and new log-probabilities differ at equal weights, and every
        # ratio with them.
        if isinstance(module, nn.Dropout) and module not in own:
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if on_host:
        # As transformers does with `offload=True`, which needs a GPU to pin memory for.
        model._set_gradient_checkpointing(True, _checkpoint_on_host)
    model.train()
    for dropout in own:  # which `adapter_dropout` switches on
        dropout.eval()


def _checkpoint_on_host(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    gpu = torch.cuda.is_available()
    with save_on_cpu(pin_memory=gpu, device_type="cuda" if gpu else "cpu"):
        return checkpoint(function, *args, use_reentrant=False, **kwargs)
