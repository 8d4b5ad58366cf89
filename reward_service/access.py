"""What lets a client in: a token, certificates. Read where the command runs, then sent along."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cluster.contracts.config.reward import GrpcSource, JudgeSource, RewardConfig, TlsSection
from cluster.contracts.errors import UserError
from cluster.contracts.private_files import read_private

SERVICE_TOKEN = "ACCORD_REWARD_TOKEN"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """PEM texts. Server: certificate and key, and ``ca`` to demand client certificates (mTLS).
    Client: ``ca`` to check the server (None: the system's), certificate and key for mTLS.

    ``name``: for clients, what the server's certificate is made out to, where that is not the host
    of its address.
    """

    ca: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """One end's part of a connection. Picklable; its secrets stay out of every repr and log."""

    token: str | None = field(default=None, repr=False)
    tls: Tls | None = None


OPEN = Access()


def read_tls(ca: str | None, cert: str | None, key: str | None) -> Tls | None:
    """The files' contents, None where none is given. Raises UserError for one that cannot be read,
    for a key that other users may read, and for a certificate without its key."""
    if bool(cert) != bool(key):
        raise UserError(
            "a certificate and its key belong together, and one of them is missing",
            where=f"certificate {cert or '(none)'}, key {key or '(none)'}",
            fix="give both PEM files",
        )
    if not ca and not cert:
        return None
    return Tls(
        ca=_read(ca) if ca else None,
        certificate=_read(cert) if cert else None,
        key=read_private(Path(key)) if key else None,
    )


def service_access(config: RewardConfig) -> Access:
    """For the service at ``reward.address``; its token comes from the environment only."""
    return Access(token=os.environ.get(SERVICE_TOKEN), tls=_tls(config.tls))


def source_access(source: GrpcSource | JudgeSource) -> Access:
    """For a service that scores as a source. Raises UserError when its token is not set."""
    if isinstance(source, JudgeSource):
        where = f"reward.sources, {source.name}: key_env"
        return Access(token=key_from_environment(source.key_env, where))
    token = os.environ.get(source.token_env) if source.token_env else None
    if source.token_env and not token:
        raise UserError(
            f"the environment variable {source.token_env} is not set",
            where=f"reward.sources, {source.name}: token_env",
            fix=f"put the token of {source.address} into it, or leave token_env out",
        )
    return Access(token=token, tls=_tls(source.tls))


def key_from_environment(name: str | None, where: str) -> str | None:
    """A judge's key; None where no variable is named. Raises UserError when it is not set, or when
    no header takes it."""
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(
            f"the environment variable {name} is not set",
            where=where,
            fix="put the endpoint's key into it, or leave key_env out",
        )
    if not key.isascii() or not key.isprintable():
        raise UserError(
            f"the environment variable {name} holds characters that no header takes",
            where=where,
            fix="put the endpoint's key into it, and nothing else",
        )
    return key


def sources_access(config: RewardConfig) -> Mapping[str, Access]:
    """By the name of the source, for a service that scores in another process or host."""
    return {
        source.name: source_access(source)
        for source in config.sources
        if isinstance(source, GrpcSource | JudgeSource)
    }


def _tls(section: TlsSection | None) -> Tls | None:
    if section is None:
        return None
    return read_tls(section.ca, section.cert, section.key) or Tls()


def _read(path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=path) from error
