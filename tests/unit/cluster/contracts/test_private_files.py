"""Secrets are read from files that nobody else can read; everything else is refused by name."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.contracts.errors import UserError
from cluster.contracts.private_files import LONGEST, read_private, read_token


def private(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    path.chmod(0o600)
    return path


def test_a_private_file_is_read(tmp_path: Path) -> None:
    assert read_private(private(tmp_path / "key", b"PEM")) == b"PEM"
    assert read_token(private(tmp_path / "token", b" word\n")) == "word"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o601])
def test_a_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = private(tmp_path / "token", b"word")
    path.chmod(mode)
    with pytest.raises(UserError, match=rf"mode {mode:04o}.*(?s:.)*chmod 600"):
        read_token(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_private(tmp_path / "absent")
    with pytest.raises(UserError, match="is not a file"):
        read_private(tmp_path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(UserError, match="is not a file"):
        read_private(tmp_path / "pipe")
    with pytest.raises(UserError, match="is longer than"):
        read_private(private(tmp_path / "long", b"x" * (LONGEST + 1)))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_whatever_stands_in_a_token_file_it_is_a_header_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = private(tmp_path_factory.getbasetemp() / "fuzzed-token", content)
    with suppress(UserError):
        token = read_token(path)
        assert token
        assert token.isascii()
        assert token.isprintable()
        assert " " not in token
