"""The whole site of `accord label`: a store, the texts that annotators read, and the pages."""

from __future__ import annotations

import logging
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from cluster.contracts.config.label import LabelPageConfig
from cluster.contracts.errors import UserError
from cluster.pages.app import new_app, page
from cluster.pages.labelling.admin_pages import add_admin_pages
from cluster.pages.labelling.annotator_pages import add_annotator_pages
from cluster.pages.labelling.desk import Desk, Rules
from cluster.pages.labelling.session import BodyLimit
from reward_service.preferences.people import Document, DocumentKind, People
from reward_service.preferences.records import text_hash

logger = logging.getLogger(__name__)

LONGEST_TEXT = 100_000  # characters of guidelines and terms
NOT_KEPT = "The label could not be written to the disk. It is not lost: send the form again later."
BUILT_IN: dict[DocumentKind, str] = {
    "guideline": (
        "Choose the completion that you would rather get as the answer to the prompt.\n\n"
        "- It does what the prompt asks for.\n- It is true, as far as you know or can check.\n"
        "- It is clear, and no longer than needed.\n- It harms nobody.\n\n"
        "If both are equally good, say so. If neither is of any use, choose *both are bad*. "
        "If you cannot judge the item, skip it."
    ),
    "consent": (
        "Your answers train and evaluate language models. They are stored under a pseudonym, with "
        "the time they took. Your name and your address are not stored.\n\n"
        "Do not write about yourself in the text fields. You may stop at any time. If you tell the "
        "organiser your pseudonym, your answers are deleted."
    ),
    "warning": (
        "The texts were written by a language model and by its users. They may be wrong, rude, "
        "or upsetting. You may skip any item without a reason."
    ),
}


def rules_of(config: LabelPageConfig, people: People, gold_every: int = 10) -> Rules:
    """The texts in force, each published under a version that follows from its content. Raises
    UserError for a file that cannot be read."""
    return Rules(
        guideline=_published(people, "guideline", config.guidelines),
        consent=_published(people, "consent", config.consent),
        warning=_published(people, "warning", config.warning),
        strength=config.strength,
        rationale=config.rationale,
        gold_every=gold_every,
    )


def _published(people: People, kind: DocumentKind, path: str | None) -> Document:
    text = BUILT_IN[kind] if path is None else _read(Path(path))
    return people.publish(kind, text_hash(text)[:8], text)


def _read(path: Path) -> str:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or "is not UTF-8"
        raise UserError(
            f"cannot be read: {reason}", where=str(path), fix="give a Markdown file in UTF-8"
        ) from None
    if not text.strip() or len(text) > LONGEST_TEXT:
        raise UserError(
            f"holds {len(text.strip()):,} characters; expected 1 to {LONGEST_TEXT:,}",
            where=str(path),
            fix="write what annotators have to know",
        )
    return text


def label_app(desk: Desk) -> FastAPI:
    app = new_app()
    app.state.people = desk.people
    add_annotator_pages(app, desk)
    add_admin_pages(app, desk)
    app.add_middleware(BodyLimit)

    @app.exception_handler(UserError)
    def not_kept(request: Request, problem: UserError) -> Response:
        logger.error("the labelling page: %s", problem)
        return page("label_gone.html.j2", 503, title="Not saved", text=NOT_KEPT)

    return app
