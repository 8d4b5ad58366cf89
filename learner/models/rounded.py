"""A model that computes for a while with its parameters rounded to another type, layer by layer.

Of each decoder layer a rounded copy is made when it runs and dropped after it. So the copies are
one layer, and what belongs to no layer (embeddings, head, last norm), never the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from learner.models.lora import merged_parameters

Held = list[tuple[nn.Module, str, nn.Parameter]]


@contextmanager
def rounded(model: Any, dtype: str) -> Iterator[None]:
    """`model` (not `Gathered`: what belongs to no layer has to be whole) with its parameters
    rounded to `dtype` and back to their own; the exact ones are in place again afterwards.
    Adapters are merged first, as a worker does it."""
    wire = getattr(torch, dtype)
    if all(parameter.dtype == wire for parameter in model.parameters()):
        yield
        return
    layers = decoder_layers(model)
    inside = {id(module) for layer in layers for module in layer.modules()}
    rest = [module for module in model.modules() if id(module) not in inside]
    with ExitStack() as stack:
        stack.enter_context(_eager(model))
        for layer in layers:
            for hook in _rounds_itself(layer, wire):
                stack.callback(hook.remove)
        stack.callback(_restore, _replace(rest, wire))
        yield


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder layers of a causal model; empty when it has no such list."""
    wanted = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return list(module)
    return []


def _rounds_itself(layer: nn.Module, wire: torch.dtype) -> list[Any]:
    """Hooks that have a layer run with rounded parameters.

    FSDP2's own hooks gather a layer's parameters first and give them back last: the rounding has to
    lie between the two, or exact parameters would be put back where gathered ones were.
    """
    held: Held = []

    def before(*_: Any) -> None:
        held.extend(_replace(layer.modules(), wire))

    def after(*_: Any) -> None:
        _restore(held)
        held.clear()

    return [
        layer.register_forward_pre_hook(before),
        layer.register_forward_hook(after, prepend=True, always_call=True),
    ]


def _replace(modules: Iterable[nn.Module], wire: torch.dtype) -> Held:
    """Put rounded parameters in place of the exact ones, which are returned; a shared one once."""
    exact: Held = []
    made: dict[int, nn.Parameter] = {}
    modules = list(modules)
    merged = merged_parameters(modules)
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_floating_point():
                continue
            if id(parameter) not in made:
                value = merged.get(id(parameter), parameter).detach()
                # Back to its own type, which the layer computes in.
                short = value.to(wire).to(parameter.dtype)
                made[id(parameter)] = nn.Parameter(short, requires_grad=False)
            exact.append((module, name, parameter))
            module._parameters[name] = made[id(parameter)]
    return exact


def _restore(exact: Held) -> None:
    for module, name, parameter in exact:
        module._parameters[name] = parameter


def _eager(model: Any) -> Any:
    """Compiled code does not run meanwhile: for hooks and other parameters it would be compiled
    anew, with each version."""
    if any(module._compiled_call_impl is not None for module in model.modules()):
        stance: Callable[[str], Any] = torch.compiler.set_stance
        return stance("force_eager")
    return nullcontext()
