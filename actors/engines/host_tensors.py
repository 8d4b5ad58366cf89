"""Weight updates as an engine sees them: arrays by parameter name, checked as they come."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from actors.settings import EngineSettings
from cluster.contracts.errors import UserError, WeightMismatch

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(settings: EngineSettings) -> Shapes:
    """Name -> shape of everything in an update of the model in ``settings.model_path``: what a
    learner publishes, whatever the engine has fused or packed it into."""
    tensors = published_tensors(model_without_memory(settings))
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def model_without_memory(settings: EngineSettings) -> Any:
    """The model as transformers builds it, from its configuration, on torch's device "meta"."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(
        settings.model_path,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, trust_remote_code=settings.trust_remote_code
        )


def published_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, a shared one once, and persistent buffers: what makes up an update."""
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    kept = model.state_dict().keys()
    tensors.update({name: buffer for name, buffer in model.named_buffers() if name in kept})
    return tensors


def checked(
    expected: Shapes, tensors: Iterable[tuple[str, Any]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an update as they come. Raises WeightMismatch for one that the model does not
    have, has in another shape, or was given already, and at the end when one was not given.

    vLLM itself accepts a partial list silently and keeps the old values of the rest.
    """
    missing = dict(expected)
    for name, array in tensors:
        shape = missing.pop(name, None)
        if shape is None:
            problem = "twice" if name in expected else "unknown to the model"
            raise WeightMismatch(f"the update does not fit the model: {name!r} is {problem}")
        if tuple(array.shape) != shape:
            raise WeightMismatch(
                f"the update does not fit the model: {name!r} is {tuple(array.shape)}, "
                f"the model has {shape}"
            )
        yield name, to_tensor(array)
    if missing:
        raise WeightMismatch(
            f"the update does not fit the model: {len(missing)} parameters missing "
            f"{sorted(missing)[:3]}"
        )


def to_tensor(array: np.ndarray | torch.Tensor) -> torch.Tensor:
    """View of a host array (uint16 is bfloat16), or the tensor that came instead. Only read it: the
    memory may be read-only, or another process's."""
    if isinstance(array, torch.Tensor):
        return array
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def check_prompt(prompt_ids: tuple[int, ...], settings: EngineSettings, vocab_size: int) -> None:
    """Raise UserError for a prompt the engine cannot answer (empty, too long, unknown token)."""
    if not prompt_ids:
        raise UserError("the prompt has no tokens", fix="remove that row")
    if len(prompt_ids) + settings.max_tokens > settings.max_model_len:
        raise UserError(
            f"a prompt of {len(prompt_ids)} tokens leaves no room for {settings.max_tokens} more "
            f"within {settings.max_model_len}",
            fix="lower data.max_prompt_tokens or rollout.max_tokens",
        )
    if min(prompt_ids) < 0 or max(prompt_ids) >= vocab_size:
        raise UserError(
            f"the prompt holds token {max(prompt_ids)}, the model knows {vocab_size}",
            fix="use the tokenizer that belongs to the model",
        )
