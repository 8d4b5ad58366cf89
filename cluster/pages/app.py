"""What every web page of Accord shares: templates, style sheet, script, and pages for errors."""

from __future__ import annotations

import functools
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from learner.evaluation.page import environment, style_sheet

TITLES = {
    400: "This address is not complete",
    401: "You are not signed in",
    403: "This was not accepted",
    404: "There is no such page",
    405: "This page cannot be written to",
    409: "This was labelled already",
    410: "This is not there any more",
    413: "This is too long",
    500: "Accord could not make this page",
}


def new_app() -> FastAPI:
    """An app that serves ``/static/`` and shows errors as pages; routes are added by its maker."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    static = Path(str(resources.files("cluster.pages").joinpath("static")))

    @app.get("/static/page.css")
    def page_css() -> Response:
        return Response(style_sheet(), media_type="text/css")

    app.mount("/static", StaticFiles(directory=static))
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(Exception, _failed)
    return app


def page(template: str, status: int = 200, **context: Any) -> HTMLResponse:
    """``template``: a file of ``templates/``; whole pages extend ``base.html.j2``."""
    return HTMLResponse(_templates().get_template(template).render(context), status_code=status)


@functools.cache
def _templates() -> Environment:
    return environment(PackageLoader("cluster.pages"))


def _refused(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)
    title = TITLES.get(problem.status_code, "This cannot be shown")
    return page("error.html.j2", problem.status_code, title=title, text=str(problem.detail))


def _failed(request: Request, problem: Exception) -> Response:
    """The server goes on and logs the traceback; the page names the kind of error only."""
    text = f"{type(problem).__name__}; the terminal in which the server runs shows where."
    return page("error.html.j2", 500, title=TITLES[500], text=text)
