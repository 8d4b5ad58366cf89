"""Ray's token: who has it may run code on the cluster, so nobody else may read it."""

from __future__ import annotations

import logging
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from cluster.contracts.errors import UserError

log = logging.getLogger("accord.ray")

MODE = "RAY_AUTH_MODE"
TOKEN = "RAY_AUTH_TOKEN"
TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"


def token_file() -> Path:
    """Where Ray reads the token, unless the token itself stands in ``RAY_AUTH_TOKEN``."""
    given = os.environ.get(TOKEN_PATH)
    return Path(given).expanduser() if given else Path.home() / ".ray" / "auth_token"


def token_found() -> bool:
    """Is there a token that Ray would send?"""
    return bool(os.environ.get(TOKEN)) or token_file().is_file()


def prepare_token() -> None:
    """Before the start of a cluster: there is a token, its file has the mode 0600, and Ray asks for
    it.

    The file is made here because Ray would write it with the mode of every other file, which most
    systems let everybody read. A token that was open stays in use, because clusters that run would
    not take another; one line says so. Raises UserError where the environment switches the token
    off, or where its file cannot be closed to others.
    """
    mode = os.environ.get(MODE, "token")
    if mode.lower() != "token":
        raise UserError(
            f"{MODE}={mode} would let every process of this machine run code through Ray",
            where=f"the environment variable {MODE}",
            fix=f"unset {MODE}, or set it to token",
        )
    if os.environ.get(TOKEN):
        return
    try:
        _close_to_others() if token_file().exists() else _make_token()
    except OSError as problem:
        raise UserError(
            f"cannot be made, or closed to other users: {problem.strerror}",
            where=f"Ray's token, {token_file()}",
            fix=f"as its owner, run `chmod 600 {token_file()}`, or name another in {TOKEN_PATH}",
        ) from None


def _make_token() -> None:
    file = token_file()
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    own = file.with_name(f"{file.name}.{secrets.token_hex(4)}")
    descriptor = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="ascii") as written:
        written.write(secrets.token_hex(32))
    try:
        with suppress(FileExistsError):  # another command was quicker: its token holds
            os.link(own, file)
    finally:
        own.unlink()


def _close_to_others() -> None:
    file = token_file()
    if TOKEN_PATH not in os.environ and open_to_others(file.parent):
        file.parent.chmod(0o700)
    if open_to_others(file):
        file.chmod(0o600)
        log.warning("%s was open to other users of this machine; its mode is 0600 now", file)


def open_to_others(path: Path) -> bool:
    """Does the mode let anybody but the owner read, write or enter it?"""
    return bool(stat.S_IMODE(path.stat().st_mode) & 0o077)
