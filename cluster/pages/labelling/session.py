"""Who sends a request, and whether one of our own pages made them send it.

The session is in a cookie that scripts cannot read and that no request from another site carries
(``SameSite=Strict``). Every form holds a second word, which follows from the session's secret: a
page of another site does not know it. Browsers also name the site that a form came from.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Depends, HTTPException, Request
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reward_service.preferences.people import People, Role

LONGEST_BODY = 1_000_000  # bytes of a form
SESSION_S = 30 * 86_400
SIGN_IN = "Open the invitation that you were sent. Each works once; ask for a new one."
STALE = "The form is too old, or it came from another site. Go back, reload the page, send again."


@dataclass(frozen=True, slots=True)
class Session:
    """``who``: the annotator's pseudonym. ``csrf``: what this session's forms carry."""

    who: str
    role: Role
    token: str = field(repr=False)

    @property
    def csrf(self) -> str:
        return hmac.new(self.token.encode(), b"csrf", hashlib.sha256).hexdigest()


def cookie_name(request: Request) -> str:
    """With the port, as browsers share cookies between the ports of a host."""
    return f"accord-label-{(request.scope.get('server') or ('', 0))[1]}"


def signed_in(request: Request) -> Session:
    people: People = request.app.state.people
    token = request.cookies.get(cookie_name(request), "")
    found = people.session(token) if token else None
    if found is None:
        raise HTTPException(401, SIGN_IN)
    return Session(found.id, found.role, token)


def admin(request: Request) -> Session:
    session = signed_in(request)
    if session.role != "admin":
        raise HTTPException(403, "This page is for admins.")
    return session


async def read_form(request: Request) -> dict[str, str]:
    """The text fields of a form that one of our own pages may have sent."""
    if _from_elsewhere(request.headers):
        raise HTTPException(403, STALE)
    form = await request.form(max_files=0, max_fields=50)
    return {name: value for name, value in form.items() if isinstance(value, str)}


def _from_elsewhere(found: Headers) -> bool:
    """What the browser says about the page that sent a form. Our pages send no referrer, so their
    forms have the origin "null"; newer browsers also say whether the site is the same."""
    site, origin = found.get("sec-fetch-site"), found.get("origin", "null")
    if site is not None:
        return site not in ("same-origin", "none")
    return origin != "null" and urlsplit(origin).netloc != found.get("host")


Form = Annotated[dict[str, str], Depends(read_form)]


def posted_by(
    request: Request, form: Form, session: Annotated[Session, Depends(signed_in)]
) -> Session:
    given = form.get("csrf", "")
    if not hmac.compare_digest(given.encode("utf-8", "replace"), session.csrf.encode()):
        raise HTTPException(403, STALE)
    return session


def posted_by_admin(session: Annotated[Session, Depends(posted_by)]) -> Session:
    if session.role != "admin":
        raise HTTPException(403, "This page is for admins.")
    return session


Reader = Annotated[Session, Depends(signed_in)]
Writer = Annotated[Session, Depends(posted_by)]
AdminReader = Annotated[Session, Depends(admin)]
AdminWriter = Annotated[Session, Depends(posted_by_admin)]


def begin(response: Response, request: Request, people: People, annotator_id: str) -> None:
    """Opens a session and hands its secret over with ``response``."""
    token = people.open_session(annotator_id, SESSION_S)
    response.set_cookie(
        cookie_name(request),
        token,
        path="/",
        max_age=SESSION_S,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )


class BodyLimit:
    """Refuses a longer body before it is in memory."""

    def __init__(self, app: ASGIApp, most: int = LONGEST_BODY) -> None:
        self._app = app
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if not declared.isdigit() or int(declared) > self._most:
            await self._refuse(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._most:
                raise HTTPException(413, _TOO_LONG)
            return message

        await self._app(scope, counted, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: Any = PlainTextResponse(_TOO_LONG, status_code=413)
        await answer(scope, receive, send)


_TOO_LONG = f"A form may hold {LONGEST_BODY:,} bytes."
