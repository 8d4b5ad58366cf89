"""What `save_pretrained` would write for a model, without ever holding the whole of it: the small
files now, and the names and places of its tensors for whoever writes them one by one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.contracts.durable import FileDigest, digests_below
from learner.compute.stored import nbytes_of
from learner.model_files import FILE_BYTES, Layout
from learner.models.files import as_list, quiet_transformers


def stored_tensors(model: Any) -> dict[str, Tensor]:
    """Parameters by name, a tied one once, and the buffers that a model saves."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    kept = model.state_dict().keys()
    tensors.update({name: b for name, b in model.named_buffers() if name in kept})
    return tensors


def layout_of(model: Any, limit: int = FILE_BYTES) -> Layout | None:
    """Names and files as `save_pretrained` would choose them, but for the ``limit`` on the size of
    a file. None for
    a model whose tensors are other ones in its files (experts kept apart there, say): those have to
    be made of the whole state dict, by `converted`."""
    own = stored_tensors(model)
    # Without memory: only names and shapes count.
    empty = {
        saved: torch.empty(own[name].shape, dtype=own[name].dtype, device="meta")
        for saved, name in _saved_names(model, own).items()
    }
    sources = {id(tensor): saved for saved, tensor in empty.items()}
    found = _reverted(model, dict(empty))
    if any(id(tensor) not in sources for tensor in found.values()):
        return None
    # A renamed tensor is the same one under another name.
    names = _saved_names(model, own)
    renamed = {saved: names[sources[id(tensor)]] for saved, tensor in found.items()}
    sizes = {saved: nbytes_of(own[name]) for saved, name in sorted(renamed.items())}
    return Layout.of(sizes, renamed, limit)


def converted(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors under the names, and in the form, in which they are saved."""
    saved = {name: tensors[own] for name, own in _saved_names(model, tensors).items()}
    return _reverted(model, saved)


def write_small_files(model: Any, tokenizer: Any, folder: Path) -> tuple[FileDigest, ...]:
    """Everything of a model's ``folder`` but the weights: config, generation config with the end
    tokens, code of its own, tokenizer with template. The files of the folder."""
    ends = [tokenizer.eos_token_id, *as_list(model.generation_config.eos_token_id)]
    unique = list(dict.fromkeys(int(end) for end in ends))
    model.generation_config.eos_token_id = unique if len(unique) > 1 else unique[0]
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    with quiet_transformers():
        model.save_pretrained(folder, state_dict={})
    tokenizer.save_pretrained(folder)
    return digests_below(folder)


def _saved_names(model: Any, own: Mapping[str, Any]) -> dict[str, str]:
    """Name to save under -> name in `own`. Of a tied parameter's names, the one that a model is
    loaded from; `own` may have another."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    by_id: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), []).append(name)
    chosen = {}
    for names in by_id.values():
        held = next(name for name in names if name in own)
        chosen[next((name for name in names if name not in tied), held)] = held
    buffers = {name: name for name in own if not any(name in names for names in by_id.values())}
    return {saved: name for saved, name in (chosen | buffers).items() if saved not in ignored}


def _reverted(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return found
