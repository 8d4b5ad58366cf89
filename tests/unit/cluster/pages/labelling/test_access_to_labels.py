"""Who may come in and what they may do: invitations, sessions, CSRF, roles, sizes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from cluster.pages.labelling.session import LONGEST_BODY

Open = Callable[..., Any]


def test_without_a_session_nothing_is_shown(open_site: Open) -> None:
    site = open_site()
    client = site.browser()
    for path in ("/", f"/task/{site.items[0].id}", "/history", "/guidelines", "/admin"):
        answer = client.get(path)
        assert answer.status_code == 401, path
        assert "question" not in answer.text
    assert client.post(f"/task/{site.items[0].id}", data={"choice": "tie"}).status_code == 401
    assert client.get("/admin/export.jsonl").status_code == 401


def test_an_invitation_works_once(open_site: Open) -> None:
    site = open_site()
    secret = site.desk.people.invite()
    clients = [site.browser() for _ in range(2)]
    for client in clients:  # looking does not use it up
        assert "You are invited" in client.get(f"/join/{secret}").text
    assert clients[0].post(f"/join/{secret}").status_code == 200
    again = clients[1].post(f"/join/{secret}")
    assert again.status_code == 410
    assert "has been used already" in again.text
    assert "Ask whoever invited you for a new one" in again.text
    assert clients[1].get("/").status_code == 401
    assert len(site.desk.people.annotators()) == 1


def test_an_unknown_invitation_is_refused(open_site: Open) -> None:
    client = open_site().browser()
    for secret in ("nonsense", "x" * 3000, "%00", "..%2fadmin"):
        assert client.post(f"/join/{secret}").status_code in (404, 405, 410), secret


def test_an_old_invitation_is_refused(open_site: Open) -> None:
    site = open_site()
    secret = site.desk.people.invite()
    site.clock.now += 8 * 86_400
    client = site.browser()
    answer = client.post(f"/join/{secret}")
    assert (answer.status_code, "is too old" in answer.text) == (410, True)


def test_the_cookie_is_for_no_script_and_no_other_site(open_site: Open) -> None:
    site = open_site()
    client = site.browser()
    answer = client.post(f"/join/{site.desk.people.invite()}", follow_redirects=False)
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith("accord-label-")
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "Path=/" in cookie


def test_a_session_lasts_beyond_a_restart_and_ends_with_leaving(open_site: Open) -> None:
    site = open_site()
    visitor = site.visitor()
    restarted = site.browser()
    restarted.cookies = visitor.client.cookies
    assert restarted.get("/history").status_code == 200
    old = dict(visitor.client.cookies)
    visitor.send("/leave")
    restarted.cookies.update(old)
    assert restarted.get("/history").status_code == 401
    visitor.get("/", 401)


def test_a_form_without_the_sessions_word_changes_nothing(open_site: Open) -> None:
    site = open_site()
    visitor = site.visitor("admin")
    task = visitor.task()
    fields = {"choice": "tie", "action": "submit", "agree": "yes"}
    for path in (task, "/undo", "/leave", "/welcome", "/admin/invite", "/admin/sign-out"):
        for csrf in (None, "", "wrong", "é", "0" * 64):
            word = {} if csrf is None else {"csrf": csrf}
            answer = visitor.client.post(path, data=fields | word)
            assert answer.status_code == 403, (path, csrf)
            assert "came from another site" in answer.text
    assert site.store.judgements() == []
    assert visitor.client.get("/history").status_code == 200
    assert len(site.desk.people.invites()) == 1


def test_anothers_word_does_not_help(open_site: Open) -> None:
    site = open_site()
    one, other = site.visitor(), site.visitor()
    theirs = re.findall(r'name="csrf" value="(\w+)"', other.get("/"))[0]
    answer = one.client.post(one.task(), data={"csrf": theirs, "choice": "tie"})
    assert answer.status_code == 403


def test_a_form_from_another_site_is_refused(open_site: Open) -> None:
    site = open_site()
    visitor = site.visitor()
    for headers, taken in (
        ({}, True),
        ({"origin": "null"}, True),
        ({"origin": "http://127.0.0.1"}, True),
        ({"origin": "null", "sec-fetch-site": "same-origin"}, True),
        ({"origin": "http://evil.example"}, False),
        ({"origin": "null", "sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "same-site"}, False),
    ):
        path, before = visitor.task(), len(site.store.judgements())
        fields = dict(re.findall(r'name="(csrf|began)" value="([^"]*)"', visitor.get(path)))
        answer = visitor.client.post(path, data={**fields, "choice": "tie"}, headers=headers)
        assert answer.status_code == (200 if taken else 403), headers
        assert len(site.store.judgements()) == before + taken


def test_an_annotator_is_no_admin(open_site: Open) -> None:
    site = open_site()
    visitor = site.visitor()
    csrf = re.findall(r'name="csrf" value="(\w+)"', visitor.get("/"))[0]
    for path in ("/admin", "/admin/export.jsonl"):
        visitor.get(path, 403)
    for path in ("/admin/invite", "/admin/sign-out"):
        assert visitor.client.post(path, data={"csrf": csrf}).status_code == 403
    assert "Admin</a>" not in visitor.get("/")


def test_a_form_that_is_too_long_is_refused_before_it_is_read(open_site: Open) -> None:
    site = open_site()
    visitor = site.visitor()
    path = visitor.task()
    long = visitor.client.post(path, data={"rationale": "x" * (LONGEST_BODY + 1)})
    assert long.status_code == 413

    def chunks() -> Any:
        for _ in range(40):
            yield b"x" * 100_000

    headers = {"content-type": "application/x-www-form-urlencoded"}
    answer = visitor.client.post(path, content=chunks(), headers=headers)
    assert answer.status_code == 413
    assert visitor.client.post(path, data={f"f{n}": "x" for n in range(200)}).status_code >= 400
    assert site.store.judgements() == []


def test_long_words_are_refused_and_kept_on_the_page(open_site: Open) -> None:
    site = open_site()
    visitor = site.visitor()
    path = visitor.task()
    page = visitor.send(path, 422, action="submit", choice="tie", rationale="w" * 5001)
    assert "At most 5,000 characters; these are 5,001." in page


def test_a_full_disk_loses_nothing_and_is_said(
    open_site: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster.contracts.errors import UserError

    site = open_site()
    visitor = site.visitor()
    path = visitor.task()

    def full(judgement: object) -> bool:
        raise UserError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(site.desk.labelling, "submit", full)
        page = visitor.send(path, 503, action="submit", choice="tie")
        assert "It is not lost" in page
    visitor.send(path, action="submit", choice="tie")
    assert len(site.store.judgements()) == 1
