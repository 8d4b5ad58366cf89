"""The page of `accord chat --page`: a question, two unnamed answers, a vote; without scripts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse, Response
from markupsafe import escape

from cluster.contracts.errors import UserError
from cluster.pages.app import new_app, page
from cluster.pages.chat_room import LONGEST, ChatRoom
from cluster.pages.labelling.session import BodyLimit, Form, Reader, Session, Writer, begin
from cluster.pages.labelling.text import COLLAPSED_FROM, as_html, difference
from reward_service.preferences.people import InviteRefused, People

logger = logging.getLogger(__name__)

BUTTONS = (
    ("first", "First is better", "1"),
    ("tie", "Equally good", "2"),
    ("second", "Second is better", "3"),
    ("both_bad", "Both are bad", "b"),
)
SAID = {value: label for value, label, _ in BUTTONS}
NOT_KEPT = "The vote could not be written to the disk. Go back and send it again later."


def chat_app(room: ChatRoom, people: People, terms: str, admit: Callable[[str], None]) -> FastAPI:
    """``terms``: what a visitor agrees to. ``admit``: is told the pseudonym of who has agreed."""
    app = new_app()
    app.state.people = people
    _add_entrance(app, people, terms, admit)
    _add_talk(app, room)
    app.add_middleware(BodyLimit)

    @app.exception_handler(UserError)
    def not_kept(request: Request, problem: UserError) -> Response:
        logger.error("the chat page: %s", problem)
        return page("chat_gone.html.j2", 503, title="Not saved", text=NOT_KEPT)

    return app


def _add_entrance(app: FastAPI, people: People, terms: str, admit: Callable[[str], None]) -> None:
    @app.get("/join/{secret}")
    def invitation(secret: str) -> Response:
        # Looking does not use it up: mail programs and messengers look at addresses, too.
        return page("chat_join.html.j2", secret=secret, terms=terms)

    @app.post("/join/{secret}")
    def join(request: Request, secret: str, form: Form) -> Response:
        try:
            annotator = people.redeem(secret)
        except InviteRefused as problem:
            what = problem.what[:1].upper() + problem.what[1:]
            text = "Each address works once. The next start of the command prints a new one."
            return page("chat_gone.html.j2", 410, title=what, text=text)
        admit(annotator.id)
        answer = RedirectResponse("/", status_code=303)
        begin(answer, request, people, annotator.id)
        return answer


def _add_talk(app: FastAPI, room: ChatRoom) -> None:
    @app.get("/")
    def talk(session: Reader, compare: bool = False) -> Response:
        return _talk_page(room, session, compare=compare)

    @app.post("/ask")
    def ask(session: Writer, form: Form) -> Response:
        question = form.get("question", "").replace("\r\n", "\n").strip()
        problem = ""
        if not question:
            problem = "Write a question."
        elif len(question) > LONGEST:
            problem = f"A question may have {LONGEST:,} characters; this one has {len(question):,}."
        else:
            try:
                room.ask(session.who, question)
            except UserError as refusal:  # of one of the models, such as for want of room
                problem = f"{refusal.what[:1].upper()}{refusal.what[1:]}. {refusal.fix}".strip()
        if problem:
            return _talk_page(room, session, problem=problem, question=question, status=422)
        return RedirectResponse("/#answers", status_code=303)

    @app.post("/vote")
    def vote(session: Writer, form: Form) -> Response:
        room.vote(session.who, form.get("number", ""), form.get("choice", ""))
        return RedirectResponse("/#ask", status_code=303)

    @app.post("/new")
    def anew(session: Writer) -> Response:
        room.begin_anew(session.who)
        return RedirectResponse("/", status_code=303)


def _talk_page(
    room: ChatRoom,
    session: Session,
    *,
    problem: str = "",
    question: str = "",
    compare: bool = False,
    status: int = 200,
) -> Response:
    talk = room.talk(session.who)
    pending = talk.pending
    earlier = [one for one in talk.rounds if one.choice is not None]
    answers = [
        {
            "position": position,
            "html": as_html(text),
            "empty": not text.strip(),
            "long": len(text) > COLLAPSED_FROM,
            "characters": len(text),
        }
        for position, text in enumerate(pending.texts if pending else (), start=1)
    ]
    return page(
        "chat.html.j2",
        status,
        session=session,
        rounds=[
            {
                "question": as_html(one.question),
                "answer": as_html(one.going_on),
                "said": SAID.get(one.choice or "", "No vote"),
            }
            for one in earlier
        ],
        pending=pending,
        asked=as_html(pending.question) if pending else "",
        answers=answers,
        buttons=BUTTONS,
        compared=difference(*pending.texts) if pending and compare else (),
        comparing=compare,
        problem=problem,
        question=escape(question),
        longest=LONGEST,
    )


def invitation_address(base: str, people: People) -> str:
    """An address that lets one visitor in, once."""
    return f"{base}join/{quote(people.invite())}"
