"""Models of the hub: which commit a run uses, and where its files lie on this host."""

from __future__ import annotations

from pathlib import Path

from cluster.contracts.config.base import ModelConfig
from learner.models.files import explained, require_directory


def hub_snapshot(path: str, revision: str | None) -> Path | None:
    """Folder of this host's copy of a hub model, named after the commit; None for a directory.

    It holds what was loaded so far, config.json at least. Without a network the commit is the one
    that was used last. Raises UserError where the model is neither reachable nor here.
    """
    require_directory(path)
    if Path(path).exists():
        return None
    from transformers.utils import cached_file

    file = explained(lambda: cached_file(path, "config.json", revision=revision), path, "model")
    return Path(file).parent


def pinned(model: ModelConfig) -> ModelConfig:
    """`model` with the commit that its hub id and revision mean now; a directory stays as it is."""
    snapshot = hub_snapshot(model.path, model.revision)
    return model if snapshot is None else model.model_copy(update={"revision": snapshot.name})
