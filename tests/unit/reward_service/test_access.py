"""Secrets of a connection: where they are read, and where they do not show."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from cluster.contracts.config.reward import GrpcSource, RewardConfig, RulesSource, TlsSection
from cluster.contracts.errors import UserError
from reward_service.access import Access, read_tls, service_access, sources_access
from reward_service.certificate import run_access


def test_no_files_mean_no_encryption(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCORD_REWARD_TOKEN", raising=False)
    assert read_tls(None, None, None) is None
    assert service_access(RewardConfig(sources=[RulesSource()])) == Access()


def test_an_empty_section_encrypts_with_what_the_system_trusts() -> None:
    access = service_access(RewardConfig(sources=[RulesSource()], tls=TlsSection()))
    assert access.tls is not None
    assert access.tls.ca is None


def test_a_certificate_needs_its_private_key(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.write_text("C")
    key.write_text("K")
    key.chmod(0o600)
    with pytest.raises(UserError, match="belong together"):
        read_tls(None, str(certificate), None)
    tls = read_tls(None, str(certificate), str(key))
    assert tls is not None
    assert (tls.certificate, tls.key) == (b"C", b"K")
    key.chmod(0o644)
    with pytest.raises(UserError, match="other users may read it"):
        read_tls(None, str(certificate), str(key))


def test_each_source_has_its_own_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONE", "1111")
    monkeypatch.setenv("ACCORD_REWARD_TOKEN", "not-for-sources")
    one = GrpcSource(address="h:1", name="one", token_env="ONE")
    two = GrpcSource(address="h:2", name="two")
    found = sources_access(RewardConfig(sources=[one, two, RulesSource()]))
    assert {name: access.token for name, access in found.items()} == {"one": "1111", "two": None}


def test_the_access_of_a_run_is_new_travels_and_does_not_show() -> None:
    service, clients = run_access(encrypted=True)
    assert service.token == clients.token != run_access(encrypted=True)[0].token
    assert copy.deepcopy(service) == service  # through the hooks of pickle, as Ray sends it
    assert service.tls is not None
    assert service.tls.key is not None
    for text in (repr(service), repr(clients)):
        assert str(service.token) not in text
        assert "PRIVATE" not in text
    assert clients.tls is not None
    assert clients.tls.key is None
