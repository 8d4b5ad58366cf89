"""A LoRA adapter, a folder in peft's layout, where a model is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.contracts.config.base import ModelConfig
from cluster.contracts.errors import UserError
from cluster.runs.policies import ADAPTER_CONFIG


class AdaptedModel(ModelConfig):
    """``path`` is the base, ``adapter`` the folder, ``rank`` the adapter's."""

    adapter: str
    rank: int


def adapted(model: ModelConfig) -> ModelConfig:
    """The base and the adapter where ``path`` is the folder of an adapter; else the model as it is.

    Raises UserError for an adapter that does not say what model it was trained on.
    """
    folder = Path(model.path).expanduser()
    if isinstance(model, AdaptedModel) or not (folder / ADAPTER_CONFIG).is_file():
        return model
    config = _read(folder)
    base, rank = config.get("base_model_name_or_path"), config.get("r")
    if not base or not isinstance(rank, int):
        raise UserError(
            "does not name the model it was trained on and its rank",
            where=str(folder / ADAPTER_CONFIG),
            fix="write its base_model_name_or_path, as peft does",
        )
    rest = model.model_dump(exclude={"path"}, exclude_unset=True)
    return AdaptedModel(**rest, path=str(base), adapter=str(folder), rank=rank)


def _read(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
    except (OSError, ValueError) as problem:
        raise UserError(
            f"cannot be read: {problem}",
            where=str(folder / ADAPTER_CONFIG),
            fix="give the folder of a LoRA adapter as peft writes it",
        ) from None
    return config if isinstance(config, dict) else {}
