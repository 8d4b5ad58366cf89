"""The admin's pages: progress, agreement, speed, gold items, invitations, export, and what
annotators have skipped or flagged."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import RedirectResponse, Response

from cluster.pages.app import page
from cluster.pages.labelling.desk import Desk
from cluster.pages.labelling.figures import Reports, person_figures
from cluster.pages.labelling.forms import SKIP_REASONS, in_words
from cluster.pages.labelling.session import AdminReader, AdminWriter, Form, Session
from cluster.pages.labelling.text import as_html, as_written
from reward_service.preferences.export import export_preferences
from reward_service.preferences.people import Invite, Role
from reward_service.preferences.records import LETTERS, Item, Judgement

KINDS = {
    "jsonl": "application/x-ndjson",
    "parquet": "application/vnd.apache.parquet",
}
LONGEST_TEAM = 40  # characters
SHOWN = 50  # invitations, and items that were set aside
SET_ASIDE = ("skip", "flag")


def add_admin_pages(app: FastAPI, desk: Desk) -> None:
    reports = Reports()

    @app.get("/admin")
    def overview(session: AdminReader) -> Response:
        return _overview(desk, reports, session)

    @app.post("/admin/invite")
    def invite(request: Request, session: AdminWriter, form: Form) -> Response:
        role: Role = "admin" if form.get("role") == "admin" else "annotator"
        secret = desk.people.invite(role, team=form.get("team", "").strip()[:LONGEST_TEAM])
        # Shown in this answer only: the store keeps a hash.
        link = f"{request.base_url}join/{quote(secret)}"
        return _overview(desk, reports, session, link=link, invited=role)

    @app.post("/admin/withdraw")
    def withdraw(session: AdminWriter, form: Form) -> Response:
        if not desk.people.withdraw_invite(form.get("invite", "")):
            raise HTTPException(410, "This invitation has been used already.")
        return RedirectResponse("/admin", status_code=303)

    @app.get("/admin/item/{item_id}")
    def item(session: AdminReader, item_id: str, plain: bool = False) -> Response:
        return _item_page(desk, session, item_id, plain=plain)

    @app.post("/admin/put-back")
    def put_back(session: AdminWriter, form: Form) -> Response:
        if not desk.put_back(form.get("judgement", ""), session.who):
            raise HTTPException(410, "This answer is not in force any more.")
        return RedirectResponse("/admin#set-aside", status_code=303)

    @app.post("/admin/sign-out")
    def sign_out(session: AdminWriter, form: Form) -> Response:
        desk.people.close_sessions(form.get("annotator", ""))
        return RedirectResponse("/admin", status_code=303)

    @app.get("/admin/export.{kind}")
    def export(session: AdminReader, kind: str) -> Response:
        if kind not in KINDS:
            raise HTTPException(404, "There is an export as jsonl and as parquet.")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"pairs.{kind}"
            export_preferences(desk.labelling.store, path)
            content = path.read_bytes()
        name = f"{desk.labelling.store.path.stem}-{time.strftime('%Y%m%d-%H%M%S')}.{kind}"
        headers = {"content-disposition": f"attachment; filename*=UTF-8''{quote(name)}"}
        return Response(content, media_type=KINDS[kind], headers=headers)


def _overview(
    desk: Desk, reports: Reports, session: Session, link: str = "", invited: str = ""
) -> Response:
    judged = desk.labelling.store.judged()
    people = desk.people.annotators()
    report = reports.of(judged, people)
    aside = [(item, one) for item, one in reversed(judged) if one.answer in SET_ASIDE]
    invites, now = desk.people.invites()[:SHOWN], desk.people.clock()
    return page(
        "label_admin.html.j2",
        session=session,
        store=desk.labelling.store.path.name,
        progress=desk.labelling.progress(),
        overlap=desk.labelling.overlap,
        overlap_share=desk.labelling.overlap_share,
        labels=sum(one.is_label for _, one in judged),
        people=person_figures(people, judged, report),
        report=report,
        live=desk.live.status() if desk.live is not None else "",
        aside=[_set_aside(item, judgement) for item, judgement in aside[:SHOWN]],
        aside_count=len(aside),
        invites=[_invite(one, now) for one in invites],
        link=link,
        invited=invited,
    )


def _set_aside(item: Item, judgement: Judgement) -> dict[str, str]:
    return {
        "judgement": judgement.id,
        "item": item.id,
        "prompt": item.messages[-1]["content"][:200],
        "who": judgement.annotator_id,
        "said": in_words(judgement, judgement.shown_order),
        "why": SKIP_REASONS.get(judgement.reason, "") if judgement.answer == "skip" else "",
        "words": judgement.rationale,
    }


def _item_page(desk: Desk, session: Session, item_id: str, *, plain: bool) -> Response:
    """What annotators see of an item, and their answers. It says no more than they know of where
    the completions come from: an admin may label, too."""
    found = desk.labelling.store.item(item_id)
    if found is None:
        raise HTTPException(410, "There is no such item. It may have been removed.")
    show = as_written if plain else as_html
    answers = [one for one in desk.labelling.store.judgements() if one.item_id == item_id]
    return page(
        "label_item.html.j2",
        session=session,
        item=found,
        plain=plain,
        turns=[{"role": m["role"], "html": show(m["content"])} for m in found.messages],
        completions=[
            {"letter": letter, "html": show(one.text), "empty": not one.text.strip()}
            for letter, one in zip(LETTERS, found.completions, strict=False)
        ],
        answers=[
            {
                "judgement": one.id,
                "who": one.annotator_id,
                "said": one.choice if one.is_label else in_words(one, one.shown_order),
                "words": one.rationale,
                "aside": one.answer in SET_ASIDE,
            }
            for one in answers
        ],
    )


def _invite(invite: Invite, now: float) -> dict[str, Any]:
    is_open = False
    if invite.used_by:
        state = f"used by {invite.used_by}"
    elif invite.withdrawn:
        state = "withdrawn"
    elif invite.expires_at <= now:
        state = "too old"
    else:
        state = f"open for {(invite.expires_at - now) / 3600:.0f} hours"
        is_open = True
    return {
        "id": invite.id,
        "role": invite.role,
        "team": invite.team,
        "state": state,
        "open": is_open,
    }
