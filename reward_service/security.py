"""Who may ask the service: a bearer token, certificates, and what must not be open to a network."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from cluster.contracts.errors import UserError

HEALTH_PREFIX = "/grpc.health.v1.Health/"


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files. Server: certificate and key, and ``ca`` to demand client certificates (mTLS).
    Client: ``ca`` to check the server (None: the system's), certificate and key for mTLS."""

    ca: str | None = None
    certificate: str | None = None
    key: str | None = None


def server_credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    if not tls.certificate or not tls.key:
        raise UserError("a TLS server needs a certificate and its key", fix="give both PEM files")
    pair = (_read(tls.key), _read(tls.certificate))
    roots = _read(tls.ca) if tls.ca else None
    return grpc.ssl_server_credentials([pair], roots, require_client_auth=roots is not None)


def client_credentials(tls: TlsFiles) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        _read(tls.ca) if tls.ca else None,
        _read(tls.key) if tls.key else None,
        _read(tls.certificate) if tls.certificate else None,
    )


def require_safe(host: str, token: str | None, tls: TlsFiles | None) -> None:
    """Raises UserError when a service open to a network would ask nobody who they are."""
    if is_loopback(host) or token or (tls is not None and tls.ca):
        return
    raise UserError(
        "a reward service that other machines can reach needs to know who asks",
        where=f"host {host!r}",
        fix="give a token (better with TLS) or client certificates, or listen on 127.0.0.1",
    )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class TokenInterceptor(grpc.ServerInterceptor):
    """Refuses calls without ``authorization: Bearer <token>``. Health checks are let through: they
    tell whether the service serves and nothing else, and probes carry no secrets."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()
        self._refusal = grpc.unary_unary_rpc_method_handler(_refuse)

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        if details.method.startswith(HEALTH_PREFIX):
            return continuation(details)
        for key, value in details.invocation_metadata:
            given = value if isinstance(value, bytes) else value.encode()
            if key == "authorization" and hmac.compare_digest(given, self._expected):
                return continuation(details)
        return self._refusal


def _refuse(request: Any, context: grpc.ServicerContext) -> None:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, "the bearer token is missing or wrong")


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=path) from error
