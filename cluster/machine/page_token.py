"""The token of the page in the dashboard of a Ray cluster that others start.

The head is told the address with the token once, when it starts; the runs that join it later serve
the page there. So this token is kept, for this user alone.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from cluster.contracts.errors import UserError
from cluster.machine.ray_token import open_to_others


def page_token_file() -> Path:
    return Path.home() / ".accord" / "dashboard_token"


def fixed_page_token() -> str:
    """The token; made when there is none. Raises UserError for one that others may read."""
    file = page_token_file()
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        own = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
        descriptor = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="ascii") as written:
            written.write(secrets.token_urlsafe(24))
        with suppress(FileExistsError):  # there is one already, or another command was quicker
            os.link(own, file)
        own.unlink()
    except OSError as problem:
        raise UserError(
            f"cannot be made: {problem.strerror}", where=str(file), fix="make its folder writable"
        ) from None
    token = known_page_token()
    assert token is not None
    return token


def known_page_token() -> str | None:
    """The token that `accord dashboard env` made; None without one. Raises UserError for one that
    others may read, or that is damaged."""
    file = page_token_file()
    try:
        token = file.read_text(encoding="ascii").strip()
        too_open = open_to_others(file)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        token, too_open = "", False
    if too_open:
        raise UserError(
            "may be read by other users", where=str(file), fix=f"run `chmod 600 {file}`"
        )
    if len(token) < 16 or not token.replace("-", "").replace("_", "").isalnum():
        raise UserError(
            "is damaged", where=str(file), fix="remove it, and run `accord dashboard env` again"
        )
    return token
