"""Files that hold a secret: read only if nobody but their owner can."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cluster.contracts.errors import UserError

LONGEST = 64 * 1024  # bytes; a token or a key is far shorter, and /dev/zero is longer


def read_private(path: Path) -> bytes:
    """The content. Raises UserError for a file that is missing, no file, too long, or open to other
    users: what they can read is no secret."""
    path = path.expanduser()
    try:
        # O_NONBLOCK: a named pipe must not hold up the command before it is seen to be one.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            _require_private(path, os.fstat(descriptor).st_mode)
            content = os.read(descriptor, LONGEST + 1)
        finally:
            os.close(descriptor)
    except OSError as problem:
        raise UserError(
            f"cannot be read: {problem.strerror}",
            where=str(path),
            fix="give a file that holds the secret and that only its owner may read",
        ) from None
    if len(content) > LONGEST:
        raise UserError(f"is longer than {LONGEST} bytes, so it is no secret", where=str(path))
    return content


def _require_private(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise UserError("is not a file", where=str(path), fix="give a file with the secret")
    if stat.S_IMODE(mode) & 0o077:
        raise UserError(
            f"other users may read it (mode {stat.S_IMODE(mode):04o}), so it keeps no secret",
            where=str(path),
            fix=f"run `chmod 600 {path}`",
        )


def read_token(path: Path) -> str:
    """The word in a token file. Raises UserError as ``read_private``, and for what cannot travel in
    a header."""
    token = read_private(path).decode("utf-8", errors="replace").strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(
            "holds no token that can travel in a header",
            where=str(path),
            fix="write one long random word of ASCII characters into it",
        )
    return token
