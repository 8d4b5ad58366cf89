"""LoRA adapters of a model (Hu et al. 2021), as peft makes them, in the model's own class.

peft replaces each chosen linear layer by one that holds the frozen layer (`base_layer`) and the
adapters' A and B. The model keeps its class and its forward pass, so that heads, packing and
sharding work on it as before. `get_peft_model` would wrap the class and rename every parameter.

B starts as zeros, so that a fresh adapter changes nothing.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cluster.contracts.config.lora import LoraConfig
from cluster.contracts.errors import UserError
from cluster.machine.imports import quiet_torchao
from cluster.weights.low_precision import plain
from cluster.weights.merging import PEFT_PREFIX, adapted_name, factor_names, merged_weight
from learner.compute.ranks import whole
from learner.compute.sharding import local, split_like
from learner.model_files import ADAPTER_FILE

DEFAULT = "default"
"""Name of the only adapter of a model with one."""
_WRAPPED = ".base_layer."
_HEADS = ("score",)
"""Heads that a task puts on a trunk: they start from nothing, so they are trained whole."""


def add_adapter(model: Any, cfg: LoraConfig, name: str = DEFAULT, seed: int = 0) -> None:
    """Give a model an adapter in place: it alone is trained, and a `score` head if there is one.

    The base keeps its type; the adapter is float32. The A matrices are a function of (seed, name,
    layer), see `initialise_adapter`, which the caller runs itself on a model without memory (meta).
    A second adapter of another name joins the first; both learn, each in `one_adapter`.

    Raises UserError for targets that are not there or cannot be adapted; it names those there are.
    """
    targets = _targets(model, cfg)
    with _quiet():
        # Here and not above: peft takes a second to import, and few runs need it.
        from peft import inject_adapter_in_model

        inject_adapter_in_model(_peft_config(model, cfg, targets), model, adapter_name=name)
    for layer in adapter_layers(model, name).values():
        for factor in (layer.lora_A[name], layer.lora_B[name]):
            factor.to(torch.float32)
        layer.eval()
    # peft stops the gradients of all adapters but the newest.
    for key, parameter in model.named_parameters():
        if is_factor(key):
            parameter.requires_grad_(True)
    for head in _HEADS:
        if isinstance(module := getattr(model, head, None), nn.Module):
            module.to(torch.float32).requires_grad_(True)
    if not next(iter(adapter_layers(model, name).values())).lora_A[name].weight.is_meta:
        initialise_adapter(model, name, seed)


@torch.no_grad()
def initialise_adapter(model: Any, name: str = DEFAULT, seed: int = 0) -> None:
    """A uniform in +-1 / sqrt(in) as peft's default, B zeros; sharded or not, the same numbers."""
    for module, layer in adapter_layers(model, name).items():
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        # Of the layer's name, not of a stream: the order of layers and of ranks does not matter.
        own = xxhash.xxh3_64_intdigest(f"{seed}/{name}/{module}".encode()) % (1 << 63)
        generator = torch.Generator().manual_seed(own)
        bound = 1.0 / math.sqrt(a.shape[1])
        full = torch.empty(a.shape).uniform_(-bound, bound, generator=generator)
        local(a).copy_(local(split_like(full, a)))
        local(b).zero_()


def hold_base_in(model: Any, dtype: str) -> None:
    """Keep the parameters of a base, which will not change any more, in `dtype`. Buffers, such as
    rotary tables, stay as they are: they are computed, and rounding would move every position."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))


def has_adapters(model: Any) -> bool:
    return any(hasattr(module, "lora_A") for module in model.modules())


def adapter_layers(model: Any, name: str = DEFAULT) -> dict[str, Any]:
    """Module name in the base model -> peft's layer, of the layers that adapter `name` changes."""
    found = ((n, m) for n, m in model.named_modules() if name in getattr(m, "lora_A", ()))
    return {base_name(n): layer for n, layer in found}


def adapter_names(model: Any) -> list[str]:
    """In the order in which they were added."""
    layer = next((module for module in model.modules() if hasattr(module, "lora_A")), None)
    return [] if layer is None else list(layer.lora_A)


@contextmanager
def one_adapter(model: Any, name: str) -> Iterator[None]:
    """Of a model with several adapters, this one alone is computed with for a while."""
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    before = [layer._active_adapter for layer in layers]
    # Not peft's `set_adapter`, which also stops the gradients of the others: a forward pass of
    # theirs that waits for its backward pass would lose them.
    for layer in layers:
        layer._active_adapter = [name]
    try:
        yield
    finally:
        for layer, names in zip(layers, before, strict=True):
            layer._active_adapter = names


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """The base model for a while, bit-equal to it: its layers run alone."""
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    before = [layer._disable_adapters for layer in layers]
    # Not peft's `enable_adapters`, which also stops the adapters' gradients: a forward pass that
    # waits for its backward pass would lose them.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._disable_adapters = state


def adapter_dropouts(model: Any) -> list[nn.Module]:
    return [m for x in model.modules() for m in getattr(x, "lora_dropout", {}).values()]


@contextmanager
def adapter_dropout(model: Any) -> Iterator[None]:
    """The adapters' dropout is on for a while (it is off else); nothing else of the model is."""
    drops = adapter_dropouts(model)
    for module in drops:
        module.train()
    try:
        yield
    finally:
        for module in drops:
            module.eval()


def adapter_tensors(model: Any, name: str = DEFAULT) -> dict[str, Tensor]:
    """The adapter's A and B under peft's names, as in `adapter_model.safetensors`; they share the
    model's memory, and are sharded where it is. A `score` head that is trained comes with them."""
    tensors: dict[str, Tensor] = {}
    for module, layer in adapter_layers(model, name).items():
        for key, factor in zip(factor_names(module), (layer.lora_A, layer.lora_B), strict=True):
            tensors[key] = factor[name].weight
    tensors.update(_trained_heads(model))
    return tensors


@torch.no_grad()
def load_adapter(model: Any, tensors: Mapping[str, Tensor], name: str = DEFAULT) -> None:
    """Fill an adapter with whole tensors of `adapter_tensors`' names.

    Raises RuntimeError where names or shapes are not the adapter's.
    """
    own = adapter_tensors(model, name)
    if own.keys() != tensors.keys():
        raise RuntimeError(f"other tensors: {sorted(own.keys() ^ tensors.keys())[:3]}")
    for key, tensor in own.items():
        given = tensors[key]
        if tensor.shape != given.shape:
            raise RuntimeError(f"{key}: {tuple(given.shape)} for {tuple(tensor.shape)}")
        local(tensor).copy_(local(split_like(given.to(tensor.dtype), tensor)))


def attach_saved(model: Any, folder: str, name: str = DEFAULT) -> None:
    """Give a model the adapter that was saved in `folder` (peft's layout). Raises UserError where
    it does not fit the model."""
    with _quiet():
        from peft import PeftConfig, inject_adapter_in_model

        try:
            config = PeftConfig.from_pretrained(folder)
            inject_adapter_in_model(config, model, adapter_name=name)
            load_adapter(model, load_file(Path(folder) / "adapter_model.safetensors"), name)
        except (OSError, ValueError, RuntimeError, SafetensorError) as problem:
            raise UserError(
                f"the adapter does not fit the model: {problem}",
                where=folder,
                fix="give an adapter that was trained on this model",
            ) from None
    model.eval()


def base_name(name: str) -> str:
    """The name that a parameter or module of an adapted model has in the base model."""
    return name.replace(_WRAPPED, ".")


def base_tensors(model: Any) -> dict[str, Tensor]:
    """The base's parameters under their Hugging Face names, a tied one once, and its persistent
    buffers; without the adapters. Of a model without adapters: all of it."""
    kept = model.state_dict().keys()
    named = dict(model.named_parameters())
    named.update({name: buffer for name, buffer in model.named_buffers() if name in kept})
    return {base_name(n): tensor for n, tensor in named.items() if not is_factor(n)}


@torch.no_grad()
def merged_tensors(
    model: Any, dtype: torch.dtype = torch.float32, name: str = DEFAULT
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor in `dtype`): the base with the adapter merged into it.

    W + scale * B @ A in float32, rounded once, one tensor at a time; the model stays as it is.
    Of sharded tensors every rank has to ask for each.
    """
    layers = {adapted_name(module): layer for module, layer in adapter_layers(model, name).items()}
    for key, tensor in base_tensors(model).items():
        full = plain(whole(tensor.detach()))
        layer = layers.get(key)
        if layer is not None:
            a, b = (whole(f[name].weight.detach()) for f in (layer.lora_A, layer.lora_B))
            full = merged_weight(full, a, b, float(layer.scaling[name]))
        yield key, full.to(dtype) if full.is_floating_point() else full


def merged_parameters(modules: Iterable[nn.Module]) -> dict[int, Tensor]:
    """By the id of a parameter what stands in its place in a merged model: merged weights for the
    base's, zeros for B, with which an adapter adds nothing. For layers whose parameters are whole.
    """
    found: dict[int, Tensor] = {}
    for layer in (module for module in modules if hasattr(module, "lora_A")):
        adapted: Any = layer
        base = adapted.get_base_layer().weight
        weight = plain(base.detach())
        for name in (name for name in adapted.active_adapters if name in adapted.lora_A):
            b = adapted.lora_B[name].weight
            a, scale = adapted.lora_A[name].weight, float(adapted.scaling[name])
            weight = merged_weight(weight, a, b, scale)
            found[id(b)] = torch.zeros_like(b)
        found[id(base)] = weight
    return found


def save_adapter(
    model: Any,
    directory: Path,
    base: str,
    name: str = DEFAULT,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, which peft, transformers and
    vLLM load. base: the path or hub id of the base model, which the file names.

    tensors: whole copies of `adapter_tensors`, for a model that trains on meanwhile or is sharded.
    """
    if tensors is None:
        tensors = {key: whole(t.detach()) for key, t in adapter_tensors(model, name).items()}
    config = model.peft_config[name]
    directory.mkdir(parents=True, exist_ok=True)
    written = _copy_of(config, base, _trained_heads(model))
    written.save_pretrained(str(directory))
    plain = {key: t.to("cpu", copy=False).contiguous() for key, t in tensors.items()}
    save_file(plain, directory / ADAPTER_FILE, metadata={"format": "pt"})


def _copy_of(config: Any, base: str, heads: Mapping[str, Tensor]) -> Any:
    written = copy.copy(config)
    written.base_model_name_or_path = base
    written.inference_mode = True
    # A set in peft: its order would change with every process.
    written.target_modules = sorted(config.target_modules)
    if heads:
        written.modules_to_save = sorted({key.split(".")[-2] for key in heads})
    return written


def _trained_heads(model: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for head in _HEADS:
        if isinstance(module := getattr(model, head, None), nn.Module):
            found.update({f"{PEFT_PREFIX}{head}.{key}": p for key, p in module.named_parameters()})
    return found


def is_factor(name: str, adapter: str | None = None) -> bool:
    """Whether a parameter of this name is an A or B, of this adapter if one is given."""
    _, found, rest = name.rpartition(".lora_A." if ".lora_A." in name else ".lora_B.")
    return bool(found) and adapter in (None, rest.removesuffix(".weight"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without peft's warning of a second adapter, which is wanted."""
    quiet_torchao()  # peft imports it
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        yield


def _peft_config(model: Any, cfg: LoraConfig, targets: list[str]) -> Any:
    from peft import LoraConfig as PeftConfig

    head = getattr(model, "get_output_embeddings", lambda: None)()
    task = "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM" if head is not None else None
    alpha = cfg.scale * cfg.rank
    return PeftConfig(
        r=cfg.rank,
        # Whole numbers as such: readers of the file, vLLM among them, declare it an integer.
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]
        target_modules=targets,
        lora_dropout=cfg.dropout,
        bias="none",
        task_type=task,
    )


def _targets(model: Any, cfg: LoraConfig) -> list[str]:
    """The last parts of the names of the layers to adapt, sorted."""
    linear, outside = _linear_names(model)
    where = str(getattr(model.config, "name_or_path", "") or "lora.targets")
    if not linear:
        raise UserError(
            f"{type(model).__name__} has no linear layer that an adapter could change",
            where=where,
            fix="train it whole: leave [lora] out",
        )
    if cfg.targets == "all-linear":
        return sorted(linear)
    for target in cfg.targets:
        if target in outside:
            raise UserError(
                f"lora.targets names {target!r}: Accord computes embeddings and output heads "
                "without adapters, and where the two are tied an adapter would change both",
                where=where,
                fix=f"choose among {', '.join(sorted(linear))}",
            )
        if target not in linear:
            raise UserError(
                f"lora.targets names {target!r}, which is no linear layer of this model",
                where=where,
                fix=f"choose among {', '.join(sorted(linear))}",
            )
    return sorted(set(cfg.targets))


def _linear_names(model: Any) -> tuple[set[str], set[str]]:
    """(last parts of the names of the linear layers within, of embeddings and heads)."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    inside, outside = set(), set()
    for name, module in model.named_modules():
        # Of a model that has an adapter already: the layer inside peft's.
        last = name.removesuffix(".base_layer").rpartition(".")[2]
        if module is head or isinstance(module, nn.Embedding) or last in _HEADS:
            outside.add(last)
        elif isinstance(module, nn.Linear) and ".lora_" not in name:
            inside.add(last)
    return inside - outside, outside
