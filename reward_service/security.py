"""Who may ask the service: a bearer token, certificates, and what must not be open to a network."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from cluster.contracts.errors import UserError
from reward_service.access import Access, Tls

HEALTH_PREFIX = "/grpc.health.v1.Health/"


def server_credentials(tls: Tls) -> grpc.ServerCredentials:
    if not tls.certificate or not tls.key:
        raise UserError("a TLS server needs a certificate and its key", fix="give both PEM files")
    return grpc.ssl_server_credentials(
        [(tls.key, tls.certificate)], tls.ca, require_client_auth=tls.ca is not None
    )


def channel(address: str, tls: Tls | None, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
    """A client's connection, encrypted where ``tls`` is given."""
    if tls is None:
        return grpc.insecure_channel(address, options)
    credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.certificate)
    named = [("grpc.ssl_target_name_override", tls.name)] if tls.name else []
    return grpc.secure_channel(address, credentials, [*options, *named])


def require_safe(host: str, access: Access) -> None:
    """Raises UserError when a service open to a network would ask nobody who they are."""
    if is_loopback(host) or access.token or (access.tls is not None and access.tls.ca):
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
    """Refuses calls without ``authorization: Bearer <token>``, before their message is read. Health
    checks are let through: they tell whether the service serves and nothing else, and probes carry
    no secrets."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()
        # Of a stream, which this one-message call looks like as well, nothing is read unasked.
        self._refusal = grpc.stream_unary_rpc_method_handler(_refuse)

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


def why_not_connected(details: str) -> tuple[str, str] | None:
    """(what is wrong, what to do) where gRPC's own words show that somebody listens, but that the
    two ends do not agree on encryption."""
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return (
            "its certificate is not signed by an authority that is trusted here",
            "give the authority's certificate as `ca` in the section tls of the reward's config",
        )
    if "WRONG_VERSION_NUMBER" in details:
        return (
            "it does not encrypt, but the config's section tls asks for it",
            "leave the section tls out, or start the service with --tls-cert and --tls-key",
        )
    if "handshake failed" in details:
        return f"no encrypted connection: {details}", "check the files of the section tls"
    if "Socket closed" in details:
        return (
            "it closes the connection: it encrypts, or wants a client certificate it trusts",
            "give `ca`, and `cert` and `key` if it asks for them, in the section tls",
        )
    return None
