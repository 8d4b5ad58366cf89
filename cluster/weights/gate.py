"""Lets those who know a secret reach a socket of this process, and nobody else.

`torch.distributed`'s store has no notion of who asks, and by itself listens on every address.
Behind a gate it listens on loopback, and the gate, on one address, connects who proves the secret:

    worker                      gate (learner)
           ◀──── nonce ────────
           ───── nonce, HMAC("worker", both nonces) ──▶
           ◀──── HMAC("learner", both nonces) ─────────
           ◀════ bytes of the store, both ways ════════▶
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import threading
from contextlib import suppress

NONCE, PROOF = 32, 32  # bytes
HANDSHAKE_S = 10.0
MOST_STRANGERS = 32  # connections that have not proved anything yet
LOOPBACK = "127.0.0.1"


def new_secret() -> bytes:
    return secrets.token_bytes(32)


def proof(secret: bytes, *parts: bytes) -> bytes:
    """HMAC-SHA256 (RFC 2104)."""
    return hmac.digest(secret, b"\0".join(parts), hashlib.sha256)


class Gate:
    """Listens on ``host``; connects who proves ``secret`` with a port of this machine."""

    def __init__(self, host: str, secret: bytes, inner_port: int) -> None:
        self._server = socket.create_server((host, 0), backlog=MOST_STRANGERS)
        self.port = int(self._server.getsockname()[1])
        self._secret = secret
        self._inner = (LOOPBACK, inner_port)
        self._strangers = threading.BoundedSemaphore(MOST_STRANGERS)
        threading.Thread(target=self._accept, name="weights-gate", daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # wakes who accepts
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                outer = self._server.accept()[0]
            except OSError:  # closed
                return
            if self._strangers.acquire(blocking=False):
                threading.Thread(target=self._admit, args=(outer,), daemon=True).start()
            else:
                outer.close()

    def _admit(self, outer: socket.socket) -> None:
        try:
            known = self._knows_the_secret(outer)
        except OSError:  # gone, or too slow
            known = False
        finally:
            self._strangers.release()
        if not known:
            outer.close()
            return
        with suppress(OSError):
            join(outer, socket.create_connection(self._inner))

    def _knows_the_secret(self, outer: socket.socket) -> bool:
        outer.settimeout(HANDSHAKE_S)
        nonce = secrets.token_bytes(NONCE)
        outer.sendall(nonce)
        theirs, proved = _exactly(outer, NONCE), _exactly(outer, PROOF)
        if not hmac.compare_digest(proved, proof(self._secret, b"worker", nonce, theirs)):
            return False
        outer.sendall(proof(self._secret, b"learner", nonce, theirs))
        outer.settimeout(None)
        return True


def pass_gate(host: str, port: int, secret: bytes) -> tuple[int, str]:
    """(a port of this machine that leads to the socket behind the gate, this machine's address as
    the gate sees it). The port takes one connection. Raises OSError when nobody is there, or when
    it is not who knows the secret."""
    outer = socket.create_connection((host, port), HANDSHAKE_S)
    try:
        nonce, ours = _exactly(outer, NONCE), secrets.token_bytes(NONCE)
        outer.sendall(ours + proof(secret, b"worker", nonce, ours))
        if not hmac.compare_digest(_exactly(outer, PROOF), proof(secret, b"learner", nonce, ours)):
            raise ConnectionError(f"who listens at {host}:{port} does not know the run's secret")
        outer.settimeout(None)
        own = str(outer.getsockname()[0])
        server = socket.create_server((LOOPBACK, 0), backlog=1)
    except BaseException:
        outer.close()
        raise
    threading.Thread(target=_hand_over, args=(server, outer), daemon=True).start()
    return int(server.getsockname()[1]), own


def _hand_over(server: socket.socket, outer: socket.socket) -> None:
    with server:
        server.settimeout(HANDSHAKE_S)
        try:
            inner = server.accept()[0]
        except OSError:
            outer.close()
            return
    join(inner, outer)


def join(one: socket.socket, other: socket.socket) -> None:
    """Hand on bytes both ways until an end closes."""
    for source, sink in ((one, other), (other, one)):
        source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
    except OSError:
        pass
    finally:
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def _exactly(source: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = source.recv(size - len(data))
        if not more:
            raise ConnectionError("the connection ended within the handshake")
        data += more
    return data
