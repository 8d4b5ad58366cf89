"""How a model is trained on one device or several: what PPO and offline training share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from cluster.contracts.config.base import Section

Offload = Literal["optimizer", "parameters", "activations", "reference"]


class ComputeConfig(Section):
    """The keys of `learner` and of `fit` that choose where weights, gradients, moments and
    activations lie. None of them changes what is computed, but for rounding, and for `optimizer`.
    """

    section: ClassVar[str] = "learner"
    """Where its keys stand in a config file, for messages."""
    unsupported: ClassVar[Mapping[str, str]] = {}
    """Keys that this section cannot set, each with the reason."""

    processes: int = Field(
        1, ge=1, description="Number of processes that train together, each on its own device."
    )
    sharding: Literal["none", "fsdp2"] = Field(
        "none",
        description="With several processes. none: each holds all weights. fsdp2: each holds a "
        "part of the weights, gradients and optimiser state (`fully_shard`).",
    )
    tensor_parallel: int = Field(
        1,
        ge=1,
        description="Number of processes that split each weight matrix between them, by the plan "
        "that transformers has for the model.",
    )
    sequence_parallel: int = Field(
        1,
        ge=1,
        description="Number of processes that split each sequence between them (Ulysses). For "
        "sequences whose activations do not fit one device.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Compute activations twice instead of keeping them. Slower, with less memory.",
    )
    reshard_after_forward: bool = Field(
        True,
        description="With sharding = 'fsdp2'. true: a layer's gathered weights are given back "
        "after its forward pass, and gathered again for its backward pass. false: they are kept "
        "until then, which communicates a third less and holds all weights in `model.dtype`.",
    )
    prefetch_layers: int = Field(
        1,
        ge=1,
        description="With sharding = 'fsdp2': how many layers ahead of the one that computes are "
        "being gathered. More hides a slow network, and holds so many more layers.",
    )
    gradient_reduction: Literal["microbatch", "step"] = Field(
        "microbatch",
        description="With sharding = 'fsdp2': when gradients are summed over processes. "
        "microbatch: after each one, so that a process holds the gradients of its part. step: "
        "once per optimiser step, which communicates less; until then a process holds the "
        "gradients of all parameters (4 bytes per parameter).",
    )
    offload: list[Offload] = Field(
        [],
        description="What lies in the memory of the host instead of the device's. optimizer: the "
        "moments, which visit the device one tensor at a time. parameters: weights, gradients and "
        "moments, with the optimiser's arithmetic on the host (needs sharding = 'fsdp2'). "
        "activations: what gradient_checkpointing keeps of each layer. reference: the frozen "
        "reference model (needs sharding = 'fsdp2').",
    )
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw",
        description="adamw: moments of 8 bytes per parameter. adamw8bit: moments of 2 bytes per "
        "parameter, rounded by blocks (torchao).",
    )

    @property
    def data_parallel(self) -> int:
        """How many groups of processes share the microbatches of a step between them."""
        return self.processes // (self.tensor_parallel * self.sequence_parallel)

    @model_validator(mode="after")
    def _check_compute(self) -> ComputeConfig:
        problems = compute_problems(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self


def compute_problems(config: ComputeConfig) -> list[str]:
    """What of a section does not go together, one sentence each, with what to do."""
    at, changed = config.section, _changed(config)
    found = [
        f"{at}.{key} = {changed[key]!r} cannot be set: {why}"
        for key, why in config.unsupported.items()
        if key in changed
    ]
    split = config.tensor_parallel * config.sequence_parallel
    if config.processes % split:
        found.append(
            f"{at}.processes = {config.processes} does not divide into groups of {split} "
            f"(tensor_parallel x sequence_parallel): set {at}.processes to a multiple of {split}"
        )
    sharded = config.sharding == "fsdp2"
    if sharded and config.processes == 1:
        found.append(
            f"{at}.sharding = 'fsdp2' deals weights out to several processes: set "
            f"{at}.processes to 2 or more, or {at}.sharding = 'none'"
        )
    elif sharded and config.processes == config.tensor_parallel:
        found.append(
            f"{at}.sharding = 'fsdp2' deals out what {at}.tensor_parallel has split already, and "
            f"no two processes have the same part: set {at}.processes to a larger multiple of "
            f"{config.tensor_parallel}, or {at}.sharding = 'none'"
        )
    for key in ("reshard_after_forward", "prefetch_layers", "gradient_reduction"):
        if key in changed and not sharded:
            found.append(f"{at}.{key} does nothing without {at}.sharding = 'fsdp2': leave it out")
    return found + _offload_problems(config)


def _offload_problems(config: ComputeConfig) -> list[str]:
    at, offload, found = config.section, config.offload, list[str]()
    if len(set(offload)) < len(offload):
        found.append(f"{at}.offload names something twice")
    for kind in {"parameters", "reference"} & set(offload):
        if config.sharding != "fsdp2":
            found.append(
                f"{at}.offload = [{kind!r}] moves the parts that fully_shard makes: set "
                f"{at}.sharding = 'fsdp2'"
            )
    if {"parameters", "reference"} <= set(offload):
        found.append(f"{at}.offload: 'parameters' takes all models: leave 'reference' out")
    if {"parameters", "optimizer"} <= set(offload):
        found.append(f"{at}.offload: 'parameters' takes the moments along: leave 'optimizer' out")
    if "activations" in offload and not config.gradient_checkpointing:
        found.append(
            f"{at}.offload = ['activations'] moves what gradient checkpointing keeps: set "
            f"{at}.gradient_checkpointing = true"
        )
    return found


def _changed(config: ComputeConfig) -> dict[str, Any]:
    """Keys of this section that differ from their defaults, with their values."""
    fields = type(config).model_fields
    return {
        key: getattr(config, key)
        for key in ComputeConfig.model_fields
        if getattr(config, key) != fields[key].default
    }
