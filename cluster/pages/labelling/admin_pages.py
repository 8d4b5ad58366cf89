"""The admin's page: progress, agreement, speed, gold items, invitations, export."""

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
from cluster.pages.labelling.forms import FLAG_REASONS
from cluster.pages.labelling.session import AdminReader, AdminWriter, Form, Session
from reward_service.preferences.export import export_preferences
from reward_service.preferences.people import Role

KINDS = {
    "jsonl": "application/x-ndjson",
    "parquet": "application/vnd.apache.parquet",
}
LONGEST_TEAM = 40  # characters
SHOWN = 50  # invitations and flags


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
    flagged = [(item, one) for item, one in reversed(judged) if one.answer == "flag"]
    invites, now = desk.people.invites()[:SHOWN], desk.people.clock()
    return page(
        "label_admin.html.j2",
        session=session,
        store=desk.labelling.store.path.name,
        progress=desk.labelling.progress(),
        overlap=desk.labelling.overlap,
        labels=sum(one.is_label for _, one in judged),
        people=person_figures(people, judged, report),
        report=report,
        live=desk.live.status() if desk.live is not None else "",
        flags=[_flag(item, judgement) for item, judgement in flagged[:SHOWN]],
        invites=[_invite(one, now) for one in invites],
        link=link,
        invited=invited,
    )


def _flag(item: Any, judgement: Any) -> dict[str, str]:
    return {
        "item": item.id,
        "prompt": item.messages[-1]["content"][:200],
        "who": judgement.annotator_id,
        "why": FLAG_REASONS.get(judgement.reason, judgement.reason),
        "words": judgement.rationale,
    }


def _invite(invite: Any, now: float) -> dict[str, str]:
    if invite.used_by:
        state = f"used by {invite.used_by}"
    elif invite.expires_at <= now:
        state = "too old"
    else:
        state = f"open for {(invite.expires_at - now) / 3600:.0f} hours"
    return {"role": invite.role, "team": invite.team, "state": state}
