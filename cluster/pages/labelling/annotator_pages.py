"""The pages of an annotator: invitation, welcome, task, history, guidelines."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response
from markupsafe import escape

from cluster.pages.app import page
from cluster.pages.labelling.desk import KEPT_FIELDS, Conflict, Desk, Gone, Task
from cluster.pages.labelling.forms import FLAG_REASONS, SKIP_REASONS, in_words, pair_choices
from cluster.pages.labelling.session import (
    Form,
    Reader,
    Session,
    Writer,
    begin,
    cookie_name,
)
from cluster.pages.labelling.text import COLLAPSED_FROM, as_html, as_written, difference
from reward_service.preferences.people import InviteRefused

JUDGED = ("submit", "skip", "flag")
HISTORY = 200
ASK_AGAIN = "Each invitation works once. Ask whoever invited you for a new one."


def add_annotator_pages(app: FastAPI, desk: Desk) -> None:
    _add_entrance(app, desk)
    _add_reading(app, desk)
    _add_tasks(app, desk)

    @app.exception_handler(Gone)
    def gone(request: Request, problem: Gone) -> Response:
        return page("label_gone.html.j2", 410, title="This item is gone", text=str(problem))

    @app.exception_handler(Conflict)
    def conflict(request: Request, problem: Conflict) -> Response:
        text = "You have labelled this item in the meantime, perhaps in another tab."
        return page("label_gone.html.j2", 409, title="Labelled already", text=text)


def _add_entrance(app: FastAPI, desk: Desk) -> None:
    @app.get("/join/{secret}")
    def invitation(secret: str) -> Response:
        # Looking does not use it up: mail programs and messengers look at addresses, too.
        return page("label_join.html.j2", secret=secret)

    @app.post("/join/{secret}")
    def join(request: Request, secret: str, form: Form) -> Response:
        try:
            annotator = desk.people.redeem(secret)
        except InviteRefused as problem:
            what = problem.what[:1].upper() + problem.what[1:]
            return page("label_gone.html.j2", 410, title=what, text=ASK_AGAIN)
        answer = _to("/admin" if annotator.role == "admin" else "/")
        begin(answer, request, desk.people, annotator.id)
        return answer

    @app.get("/welcome")
    def welcome(session: Reader) -> Response:
        return page(
            "label_welcome.html.j2",
            **_around(session),
            accepted=desk.has_accepted(session.who),
            texts=_texts(desk),
        )

    @app.post("/welcome")
    def accept(session: Writer, form: Form) -> Response:
        if form.get("agree") != "yes":
            return _to("/welcome")
        desk.accept(session.who)
        return _to("/")

    @app.post("/leave")
    def leave(request: Request, session: Writer) -> Response:
        desk.people.close_session(session.token)
        answer = page("label_left.html.j2")
        answer.delete_cookie(cookie_name(request), path="/")
        return answer


def _add_reading(app: FastAPI, desk: Desk) -> None:
    @app.get("/guidelines")
    def guidelines(session: Reader) -> Response:
        return page("label_guidelines.html.j2", **_around(session), texts=_texts(desk))

    @app.get("/history")
    def history(session: Reader) -> Response:
        rows = [
            {
                "item": item.id,
                "prompt": item.messages[-1]["content"][:200],
                "said": in_words(judgement, judgement.shown_order),
                "when": judgement.created_at.replace("T", " ")[:16],
            }
            for item, judgement in desk.labelling.history(session.who, HISTORY)
        ]
        return page("label_history.html.j2", **_around(session), rows=rows)


def _add_tasks(app: FastAPI, desk: Desk) -> None:
    @app.get("/")
    def first(session: Reader) -> Response:
        if not desk.has_accepted(session.who):
            return _to("/welcome")
        item = desk.next_item(session.who)
        if item is not None:
            return _to(f"/task/{quote(item.id, safe='')}")
        live = ""
        if desk.live is not None:
            desk.live.ask()
            live = desk.live.status()
        return page("label_done.html.j2", **_around(session), **_standing(desk, session), live=live)

    @app.get("/task/{item_id}")
    def task(session: Reader, item_id: str, compare: str = "", plain: bool = False) -> Response:
        if not desk.has_accepted(session.who):
            return _to("/welcome")
        opened = desk.open(session.who, item_id)
        return _task_page(desk, session, opened, compare=compare, plain=plain)

    @app.post("/task/{item_id}")
    def judge(request: Request, session: Writer, form: Form, item_id: str) -> Response:
        if not desk.has_accepted(session.who):
            return _to("/welcome")
        action, _, detail = form.get("action", "submit").partition(":")
        if action not in JUDGED:
            return _done(request, _side_step(desk, session, item_id, action, detail, form))
        problems = desk.submit(session.who, item_id, action, form)
        if not problems:
            return _done(request, "/")
        opened = desk.open(session.who, item_id)
        entered = Task(
            item=opened.item,
            order=opened.order,
            fields={**opened.fields, **form},
            earlier=opened.earlier,
        )
        return _task_page(desk, session, entered, problems=problems, status=422)

    @app.post("/undo")
    def undo(session: Writer, form: Form) -> Response:
        item_id = desk.undo(session.who, form.get("judgement", ""))
        if item_id is None:
            raise HTTPException(410, "This judgement is not there any more.")
        return _to(f"/task/{quote(item_id, safe='')}")


def _side_step(
    desk: Desk, session: Session, item_id: str, action: str, detail: str, form: dict[str, str]
) -> str:
    """What does not end the task: what was entered is kept. Returns the page to show."""
    opened = desk.open(session.who, item_id)
    kept, where = dict(form), ""
    if action == "edit" and detail.isdigit() and 1 <= int(detail) <= len(opened.order):
        kept["demonstration"] = opened.texts[int(detail) - 1]
        where = "#demonstration"
    elif action == "compare":
        where = f"?compare={quote(detail)}#difference"
    desk.save_draft(session.who, item_id, kept)
    return f"/task/{quote(item_id, safe='')}{where}"


def _task_page(
    desk: Desk,
    session: Session,
    task: Task,
    *,
    compare: str = "",
    plain: bool = False,
    problems: Any = (),
    status: int = 200,
) -> Response:
    show = as_written if plain else as_html
    completions = [
        {
            "position": position,
            "html": show(text),
            "empty": not text.strip(),
            "long": len(text) > COLLAPSED_FROM,
            "characters": len(text),
        }
        for position, text in enumerate(task.texts, start=1)
    ]
    turns = [{"role": m["role"], "html": show(m["content"])} for m in task.item.messages]
    return page(
        "label_task.html.j2",
        status,
        **_around(session),
        **_standing(desk, session),
        task=task,
        entered={name: task.fields.get(name, "") for name in KEPT_FIELDS},
        # As it is, also what is invisible: it comes back with the form.
        rationale=escape(task.fields.get("rationale", "")),
        demonstration=escape(task.fields.get("demonstration", "")),
        turns=turns,
        completions=completions,
        choices=pair_choices(desk.rules.strength),
        skip_reasons=SKIP_REASONS,
        flag_reasons=FLAG_REASONS,
        needs_rationale=desk.rules.rationale,
        problems={problem.field: problem.text for problem in problems},
        plain=plain,
        compared=_compared(task, compare),
        editing=bool(task.fields.get("demonstration")),
    )


def _compared(task: Task, compare: str) -> dict[str, Any] | None:
    """``compare``: two positions, such as "1-3"."""
    left, _, right = compare.partition("-")
    if not (left.isdigit() and right.isdigit()):
        return None
    first, second = int(left), int(right)
    if not (1 <= first <= len(task.order) and 1 <= second <= len(task.order)):
        return None
    pieces = difference(task.texts[first - 1], task.texts[second - 1])
    return {"first": first, "second": second, "pieces": pieces}


def _standing(desk: Desk, session: Session) -> dict[str, Any]:
    last = desk.last(session.who)
    return {
        "last": None if last is None else {"id": last[0].id, "said": last[1]},
        "progress": desk.labelling.progress(),
    }


def _texts(desk: Desk) -> list[dict[str, Any]]:
    rules = desk.rules
    return [
        {"title": title, "html": as_html(document.text), "version": document.version}
        for title, document in (
            ("What you may see", rules.warning),
            ("What becomes of your answers", rules.consent),
            ("How to judge", rules.guideline),
        )
    ]


def _around(session: Session) -> dict[str, Any]:
    return {"session": session}


def _done(request: Request, where: str) -> Response:
    """Our script asks for the next address; a browser without it is led there."""
    if request.headers.get("x-accord") == "script":
        return JSONResponse({"next": where})
    return _to(where)


def _to(where: str) -> Response:
    return RedirectResponse(where, status_code=303)
