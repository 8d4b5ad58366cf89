"""Whether a path can be a model directory. Imports nothing heavy: `accord plan` asks, too."""

from __future__ import annotations

from pathlib import Path

from cluster.contracts.errors import UserError


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
