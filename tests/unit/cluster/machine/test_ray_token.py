"""The file of Ray's token: made and kept so that only its owner can read it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from cluster.contracts.errors import UserError
from cluster.machine.ray_token import prepare_token, token_file, token_found


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_token_is_made_for_its_owner_alone(home: Path) -> None:
    assert not token_found()
    prepare_token()
    file = home / ".ray" / "auth_token"
    assert token_file() == file
    assert (mode(file), mode(file.parent)) == (0o600, 0o700)
    token = file.read_text()
    assert len(token) == 64
    assert list(file.parent.iterdir()) == [file]  # nothing half written is left
    prepare_token()
    assert file.read_text() == token
    assert token_found()


def test_a_token_that_was_open_is_closed_and_said(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = home / ".ray" / "auth_token"
    file.parent.mkdir(mode=0o755)
    file.write_text("known")
    file.chmod(0o644)
    prepare_token()
    assert (mode(file), mode(file.parent), file.read_text()) == (0o600, 0o700, "known")
    assert "was open to other users" in caplog.text


def test_a_token_elsewhere_is_used_and_its_folder_left_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = home / "shared"
    folder.mkdir(mode=0o755)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "token"))
    prepare_token()
    assert mode(folder / "token") == 0o600
    assert mode(folder) == 0o755
    assert not (home / ".ray").exists()


def test_a_token_in_the_environment_needs_no_file(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t" * 40)
    prepare_token()
    assert token_found()
    assert not (home / ".ray").exists()


def test_ray_without_a_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UserError, match="unset RAY_AUTH_MODE"):
        prepare_token()


def test_a_place_that_cannot_be_is_one_message(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "file" / "token"))
    with pytest.raises(UserError, match="cannot be made"):
        prepare_token()


def test_two_commands_that_start_together_agree(home: Path) -> None:
    from cluster.machine import ray_token

    ray_token._make_token()
    token = token_file().read_text()
    ray_token._make_token()  # what the slower one does
    assert token_file().read_text() == token
    assert os.listdir(home / ".ray") == ["auth_token"]
