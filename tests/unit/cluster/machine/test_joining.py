"""Who is let into a running cluster, and what is said to those who are not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.contracts.config.base import ClusterConfig
from cluster.contracts.errors import UserError
from cluster.machine import joining
from cluster.machine.joining import cluster_to_join

PLACE = "10.0.0.1:6379"


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """``asking(token)``: a cluster that lets in who sends this token."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(joining, "_place", lambda address, where: address)

    def ask(token: str) -> None:
        def answer(place: str) -> tuple[str, str]:

            sent = os.environ.get("RAY_AUTH_MODE") == "token"
            file = tmp_path / "token"
            ours = file.read_text() if sent and file.exists() else ""
            return ("lets us in" if ours == token else "wants another token"), ""

        monkeypatch.setattr(joining, "_answer", answer)
        from ray._private.authentication import authentication_token_setup as setup

        def enable(warn_if_disabled: bool = True) -> bool:
            monkeypatch.setenv("RAY_AUTH_MODE", "token")
            return True

        monkeypatch.setattr(setup, "maybe_enable_token_auth_if_token_available", enable)

    return ask


def test_a_token_that_is_there_is_sent_where_it_is_asked_for(
    asking: Callable[[str], None], tmp_path: Path
) -> None:
    asking("right")
    (tmp_path / "token").write_text("right")
    assert cluster_to_join(PLACE) == PLACE


def test_no_token_is_sent_where_none_is_asked_for(
    asking: Callable[[str], None], tmp_path: Path
) -> None:

    asking("")
    (tmp_path / "token").write_text("ours")
    assert cluster_to_join(PLACE) == PLACE
    assert "RAY_AUTH_MODE" not in os.environ


def test_a_missing_and_a_wrong_token_are_said_as_such(
    asking: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking("right")
    with pytest.raises(UserError, match=r"there is none in .*token"):
        cluster_to_join(PLACE)
    (tmp_path / "token").write_text("wrong")
    with pytest.raises(UserError, match=r"refuses the token in .*token"):
        cluster_to_join(PLACE)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UserError, match="RAY_AUTH_MODE=disabled keeps it from being sent"):
        cluster_to_join(PLACE)


def test_nobody_there_and_no_address_at_all_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(joining, "ANSWER_S", 0.2)
    with pytest.raises(UserError, match="no Ray cluster answers at"):
        cluster_to_join("127.0.0.1:9")
    with pytest.raises(UserError, match="no Ray cluster is known here"):
        cluster_to_join("ray://127.0.0.1:10001")


@pytest.mark.parametrize(
    ("given", "variable", "joined"),
    [
        (None, None, None),
        (None, PLACE, PLACE),
        (None, "local", None),
        ("local", PLACE, None),
        ("auto", None, "auto"),
        ("h:1", PLACE, "h:1"),
    ],
)
def test_the_cluster_of_a_job_is_joined_unless_another_is_named(
    given: str | None, variable: str | None, joined: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert ClusterConfig(address=given).to_join == joined
