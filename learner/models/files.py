"""Loading through transformers, with everything that can be wrong said in one clear message; and
writing a directory so that a reader never sees half of it."""

from __future__ import annotations

import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from cluster.contracts.devices import ATTENTION
from cluster.contracts.errors import UserError
from cluster.machine.imports import quiet_torchao
from learner.compute.sharding import materialise
from learner.models.fill import fill, fill_from, names_in_files, without_weights
from learner.models.weight_files import check_weight_files, holds_safetensors

_log = logging.getLogger(__name__)

quiet_torchao()  # before transformers imports it, with the first model class that is asked for


def load_checked(
    kind: Any,
    path: str,
    revision: str | None,
    trust_remote_code: bool,
    *,
    may_miss: tuple[str, ...] = (),
    **config_changes: Any,
) -> Any:
    """A model of the Auto class `kind`, float32, eval mode, complete but for names in `may_miss`.

    config_changes: keys set in its config. Raises UserError for everything that may be wrong.
    """
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = checked_config(kind, path, common, may_miss, config_changes)
    with quiet_transformers():
        model, report = explained(
            lambda: kind.from_pretrained(
                path,
                config=config,
                dtype=torch.float32,
                attn_implementation=_attention(config),
                output_loading_info=True,
                **common,
            ),
            path,
            "model",
        )
    missing = [name for name in report["missing_keys"] if not name.startswith(may_miss)]
    if missing:
        raise UserError(
            f"the weights lack {len(missing)} tensors (first: {sorted(missing)[0]}), which would "
            "start random",
            where=path,
            fix="copy the complete model directory, or use another model",
        )
    return model.eval()


@dataclass(frozen=True, slots=True, kw_only=True)
class Placing:
    """How a model comes to its device without ever being whole on one.

    prepare: changes the model in place while it has no memory (checkpointing, adapters, tensor
    plan, `fully_shard`), and returns the outermost module that has to get some. dtype: of its
    weights. weights_on_host: only buffers go to the device.
    """

    prepare: Callable[[Any], nn.Module]
    device: torch.device
    dtype: torch.dtype = torch.float32
    weights_on_host: bool = False


def load_placed(
    kind: Any,
    path: str,
    revision: str | None,
    trust_remote_code: bool,
    placing: Placing,
    *,
    part: Callable[[Any], Any] = lambda model: model,
    may_miss: tuple[str, ...] = (),
    **config_changes: Any,
) -> Any:
    """As `load_checked`, but each process reads and keeps only its own part of the weights.

    part: what of the model is wanted (its trunk, say); the rest never gets memory. What of
    `may_miss` the files lack has arbitrary numbers afterwards. A model whose
    tensors transformers merges or splits as it loads (experts), or whose weights are no
    safetensors, is read whole by each process first, into the memory of the host; the log says so.
    """
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = checked_config(kind, path, common, may_miss, config_changes)

    def empty() -> Any:
        with without_weights():
            model = kind.from_config(
                config, dtype=placing.dtype, attn_implementation=_attention(config)
            )
        return model.eval()

    with quiet_transformers():
        model = explained(empty, path, "model")
        if model.can_generate():
            model.generation_config = explained(
                lambda: transformers.GenerationConfig.from_pretrained(path, revision=revision),
                path,
                "generation config",
                missing=model.generation_config,
            )
    folder = Path(path) if Path(path).is_dir() else _downloaded(path, revision)
    names = names_in_files(model, folder) if holds_safetensors(folder) else None
    wanted = part(model)
    above = next(name for name, module in model.named_modules() if module is wanted)
    root = placing.prepare(wanted)
    materialise(root, placing.device, weights_on_host=placing.weights_on_host)

    def source(name: str) -> str | None:
        if ".lora_" in name:
            return None  # an adapter, which the caller initialises
        whole = ".".join(filter(None, (above, name.replace(".base_layer.", "."))))
        return whole if names is None else names.get(whole, whole)

    if names is None:
        _log.warning(
            "%s: each process reads the whole model (%s), in the host's memory", path, kind
        )
        given: Any = {"may_miss": may_miss, **config_changes}
        state = load_checked(kind, path, revision, trust_remote_code, **given).state_dict()
        fill_from(wanted, state, named=source)
    else:
        explained(lambda: fill(wanted, folder, named=source, may_miss=may_miss), path, "model")
    return wanted


def _downloaded(path: str, revision: str | None) -> Path:
    """Folder of this host's copy of a hub model with all of its weights."""
    from huggingface_hub import snapshot_download

    kinds = ["*.json", "*.safetensors"]
    return Path(
        explained(
            lambda: snapshot_download(path, revision=revision, allow_patterns=kinds), path, "model"
        )
    )


def checked_config(
    kind: Any,
    path: str,
    common: Mapping[str, Any],
    may_miss: tuple[str, ...] = (),
    changes: Mapping[str, Any] | None = None,
) -> Any:
    """The config of a model whose weight files were looked at, but not read.

    Raises UserError for a missing directory, an unknown architecture, weights that are cut off,
    missing or of other shapes. A model that is not on this machine is not looked at.
    """
    require_directory(path)
    config = explained(
        lambda: transformers.AutoConfig.from_pretrained(path, **common, **(changes or {})),
        path,
        "model",
    )
    if Path(path).is_dir():
        explained(lambda: check_weight_files(kind, Path(path), config, may_miss), path, "model")
    return config


def check_causal_model(path: str, revision: str | None, trust_remote_code: bool) -> None:
    """Raise UserError where ``load_policy`` would, as far as can be seen without loading."""
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    checked_config(transformers.AutoModelForCausalLM, path, common)


def check_reward_model(path: str) -> None:
    """Raise UserError where ``load_reward_model`` would, as far as can be seen without loading."""
    checked_config(transformers.AutoModelForSequenceClassification, path, {})


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bar and no report of missing tensors: those are checked here, as errors."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _attention(config: Any) -> str:
    """By the device, but eager where scores are capped: no other computes that."""
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "eager" if capped else ATTENTION.on(torch.cuda.is_available())


def require_directory(path: str, *markers: str) -> None:
    """Raise UserError for a path that is no model directory, before any attempt to download.

    A hub id is NAME or OWNER/NAME; anything else that does not exist is a mistyped path, and so is
    FOLDER/NAME where that folder exists. markers: a directory has one of these files.
    """
    place, needed = Path(path), markers or ("config.json",)
    if place.is_dir():
        if not any((place / name).exists() for name in needed):
            raise UserError(
                f"the directory holds no model ({needed[0]} is missing)",
                where=path,
                fix="give a directory in Hugging Face layout, such as runs/NAME/policy",
            )
        return
    if place.exists():
        raise UserError("is a file, not a model directory", where=path, fix="give its directory")
    mistyped = path.count("/") == 1 and place.parent.is_dir()
    if mistyped or path.count("/") > 1 or path.startswith((".", "~", "/")) or not path:
        raise UserError("no such model directory", where=path, fix="check the path (model.path)")
    if not _is_cached(path) and not hub_has_an_address():
        raise UserError(
            "cannot load the model: there is no such directory, and the hub cannot be reached from "
            f"{socket.gethostname()}",
            where=path,
            fix="give an existing model directory, or a hub id reachable from here",
        )


def _is_cached(hub_id: str) -> bool:
    from huggingface_hub import constants, file_download

    folder = file_download.repo_folder_name(repo_id=hub_id, repo_type="model")
    return (Path(constants.HF_HUB_CACHE) / folder).is_dir()


def hub_has_an_address() -> bool:
    """Without a network every attempt would be repeated for half a minute."""
    from huggingface_hub import constants

    if getproxies():
        return True  # the proxy looks the address up
    with suppress(OSError):
        return bool(socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None))
    return False


def explained(load: Callable[[], Any], path: str, what: str, *, missing: Any = None) -> Any:
    """`load()`, with what transformers raises turned into one message that says what to do."""
    try:
        return load()
    except OSError as problem:
        if missing is not None:
            return missing
        local = Path(path).exists()
        host = "" if local else f" on {socket.gethostname()}"
        raise UserError(
            f"cannot load the {what}{host}: {_first_line(problem)}",
            where=path,
            fix="complete the model directory"
            if local
            else "give an existing model directory, or a hub id reachable from here",
        ) from problem
    except (ValueError, KeyError, RuntimeError, SafetensorError, ImportError) as problem:
        raise UserError(
            f"cannot load the {what}: {_first_line(problem)}",
            where=path,
            fix="check that config.json names a known architecture and that files are undamaged",
        ) from problem


def _first_line(problem: BaseException) -> str:
    text = str(problem).strip()
    return text.splitlines()[0] if text else type(problem).__name__


def read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(
            f"cannot read the chat template: {_first_line(problem)}",
            where=path,
            fix="set model.chat_template to an existing Jinja file",
        ) from None


def replace_directory(directory: Path, write: Callable[[Path], None]) -> Path:
    """Fill a new folder with `write` and put it in place of `directory`, which may exist."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = directory.with_name(f".{directory.name}.new-{os.getpid()}")
    old = directory.with_name(f".{directory.name}.old-{os.getpid()}")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir()
    try:
        write(fresh)
        if directory.exists():
            directory.rename(old)
        fresh.rename(directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return directory


def as_list(ids: Any) -> list[int]:
    if ids is None:
        return []
    return [int(i) for i in ids] if isinstance(ids, list | tuple) else [int(ids)]
