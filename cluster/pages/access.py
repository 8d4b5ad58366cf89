"""Who may see a page, and what a browser may do with it: token, cookie, host names, headers.

A page shows prompts and completions, which belong to their owner and may be hostile. So every
request needs the token, also on the loopback address, where any user of the machine can connect.
Like Jupyter, the server prints an address with the token in it; the first request exchanges it for
a cookie that scripts cannot read, and the token leaves the address bar.
"""

from __future__ import annotations

import hmac
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, parse_qsl, quote, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

QUERY = "token"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
WHO = "This page needs its token. Open the address that was printed when the server started."


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """``hosts``: the names in the address bar that are answered; another name may be a stranger's
    that points here (DNS rebinding). ``framed_by``: origins that may show the pages in a frame,
    such as http://127.0.0.1:8265. ``open_paths``: answered without the token; they must tell
    nothing. ``asks_token``: false for an app that itself knows who may see what."""

    token: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    hosts: tuple[str, ...] = LOOPBACK
    framed_by: tuple[str, ...] = ()
    open_paths: frozenset[str] = frozenset()
    asks_token: bool = True

    def guards(self, app: ASGIApp) -> ASGIApp:
        """``app`` behind the checks, the outermost first: headers, host name, token."""
        known = _Token(app, self) if self.asks_token else app
        guarded = TrustedHostMiddleware(known, allowed_hosts=self.hosts, www_redirect=False)
        return _Headers(guarded, headers(self.framed_by))

    def admits(self, given: str | None) -> bool:
        """Whether ``given`` is the token, in a time that does not depend on where they differ."""
        return given is not None and hmac.compare_digest(
            given.encode("utf-8", "surrogateescape"), self.token.encode()
        )


def names_of(address: str) -> tuple[str, ...]:
    """The names under which a browser may ask for a server that listens on ``address``."""
    if address in LOOPBACK:
        return LOOPBACK
    own = () if address in ("0.0.0.0", "::") else (address, f"[{address}]")
    return (*LOOPBACK, *own, socket.gethostname(), socket.getfqdn(), *_addresses())


def _addresses() -> list[str]:
    """Of this host, as others see it; none where its name is not known to the network."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return sorted({str(info[4][0]) for info in found})


def headers(framed_by: tuple[str, ...] = ()) -> dict[str, str]:
    """Of every answer. Pages load nothing but our own style sheet and script from this server."""
    frames = " ".join(framed_by) or "'none'"
    return {
        "content-security-policy": (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
            f"connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors {frames}"
        ),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-resource-policy": "same-site" if framed_by else "same-origin",
        "cache-control": "no-store",
        **({} if framed_by else {"x-frame-options": "DENY"}),
    }


class _Headers:
    """Adds the headers that an answer does not set itself."""

    def __init__(self, app: ASGIApp, added: Mapping[str, str]) -> None:
        self._app = app
        self._added = added

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                found = MutableHeaders(scope=message)
                for name, value in self._added.items():
                    found.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, with_headers)


class _Token:
    """Lets a request through that carries the token: in its cookie, in a header, or in its address.

    In an address it is ``?token=``, or the first part of the path: then it stays there, for a frame
    in a page of another site, where browsers keep no cookies. Its app sees it as its ``root_path``.
    The cookie's name holds the port, as browsers share cookies between the ports of a host.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._access.open_paths:
            await self._app(scope, receive, send)
            return
        given = parse_qs(scope["query_string"].decode("latin-1")).get(QUERY, [None])[-1]
        cookie = f"accord-{(scope.get('server') or ('', 0))[1]}"
        first = scope["path"].partition("/")[2].partition("/")[0]
        if self._access.framed_by and self._access.admits(first):
            await self._app({**scope, "root_path": f"/{first}"}, receive, send)
        elif self._access.admits(given):
            await _exchange(scope, cookie, self._access.token)(scope, receive, send)
        elif self._access.admits(_carried(Headers(scope=scope), cookie)):
            await self._app(scope, receive, send)
        else:
            await PlainTextResponse(WHO, status_code=401)(scope, receive, send)


def _carried(found: Headers, cookie: str) -> str | None:
    scheme, _, credentials = found.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return credentials
    try:
        morsel = SimpleCookie(found.get("cookie", "")).get(cookie)
    except CookieError:
        return None
    return morsel.value if morsel else None


def _exchange(scope: Scope, cookie: str, token: str) -> Response:
    """To the same address without the token, which is in the cookie from now on."""
    asked = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    rest = urlencode([(name, value) for name, value in asked if name != QUERY])
    path = quote("/" + scope["path"].lstrip("/"))  # "//host" would lead elsewhere
    where = f"{path}?{rest}" if rest else path
    response = Response(status_code=303, headers={"location": where})
    response.set_cookie(cookie, token, path="/", httponly=True, samesite="lax")
    return response
