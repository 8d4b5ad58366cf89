"""The admin's page and its numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from cluster.pages.labelling import figures

Open = Callable[..., Any]


def text_of(html: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def test_progress_people_and_agreement_are_told(
    open_site: Open, make_item: Callable[..., Any]
) -> None:
    gold = make_item("gold", ("right", "wrong"), gold=(1, 2))
    site = open_site(items=[*site_pairs(make_item, 4), gold], overlap=2, gold_every=2)
    admin, annotator = site.visitor("admin"), site.visitor()
    for _ in range(5):
        for one in (admin, annotator):
            path = one.task()
            one.send(path, action="draft")
            site.clock.now += 30
            one.send(path, action="submit", choice="tie")
    told = text_of(admin.get("/admin"))
    assert "items done 5 of 5 by 2 annotators each" in told
    assert "labels in force 10" in told
    assert "equal labels 100.0% on 4 items with several labels" in told
    assert "gold items right 0.0% 0 of 2" in told  # a tie is not the known answer
    assert "30.0 s 0.0% 100.0%" in told


def site_pairs(make_item: Callable[..., Any], count: int) -> list[Any]:
    return [make_item(f"q{n}", ("one", "two")) for n in range(count)]


def test_an_invitation_is_shown_once(open_site: Open) -> None:
    site = open_site()
    admin = site.visitor("admin")
    page = admin.send("/admin/invite", role="annotator", team="<b>red</b>")
    (link,) = re.findall(r"http://127\.0\.0\.1/join/([\w-]+)", page)
    assert link not in admin.get("/admin")
    assert "&lt;b&gt;red&lt;/b&gt;" in page
    assert site.desk.people.redeem(link).team == "<b>red</b>"
    assert "used by annotator-" in admin.get("/admin")


def test_somebody_is_signed_out(open_site: Open) -> None:
    site = open_site()
    admin, annotator = site.visitor("admin"), site.visitor()
    who = next(one.id for one in site.desk.people.annotators() if one.role == "annotator")
    assert f"Sign out {who}" in admin.get("/admin")
    admin.send("/admin/sign-out", annotator=who)
    annotator.get("/", 401)
    admin.get("/admin")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_pairs_are_exported(open_site: Open, kind: str) -> None:
    site = open_site()
    admin = site.visitor("admin")
    admin.label("first-3")
    answer = admin.client.get(f"/admin/export.{kind}")
    assert answer.status_code == 200
    assert answer.headers["content-disposition"].startswith("attachment")
    if kind == "jsonl":
        (row,) = map(json.loads, answer.text.splitlines())
        assert row["margin"] == 3
        assert row["chosen"] != row["rejected"]
    else:
        assert answer.content.startswith(b"PAR1")
    assert admin.client.get("/admin/export.csv").status_code == 404


def test_flags_are_listed(open_site: Open) -> None:
    site = open_site()
    admin = site.visitor("admin")
    path = admin.task()
    admin.send(path, action="flag", rationale="see there", **{"flag-reason": "unsafe"})
    told = text_of(admin.get("/admin"))
    assert "Dangerous or illegal content" in told
    assert "see there" in told


def test_the_report_of_a_large_store_is_kept_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def slow(judged: Any, teams: Any) -> dict[str, Any]:
        made.append(judged)
        moment[0] += 2.0
        return {"of": judged}

    moment = [100.0]
    monkeypatch.setattr(figures.time, "monotonic", lambda: moment[0])
    monkeypatch.setattr(figures, "quality_report", slow)
    reports = figures.Reports()
    assert [reports.of([n], [])["of"] for n in range(3)] == [[0], [0], [0]]
    moment[0] += 40.0
    assert reports.of([4], [])["of"] == [4]


def test_an_open_invitation_is_withdrawn(open_site: Open) -> None:
    site = open_site()
    admin = site.visitor("admin")
    page = admin.send("/admin/invite", role="annotator")
    (link,) = re.findall(r"http://127\.0\.0\.1/join/([\w-]+)", page)
    assert len(re.findall(r"Withdraw invitation", page)) == 1  # the admin's own one is used
    admin.send("/admin/withdraw")
    told = text_of(admin.get("/admin"))
    assert "annotator withdrawn" in told
    refused = site.browser().post(f"/join/{link}")
    assert (refused.status_code, "was withdrawn" in refused.text) == (410, True)
    used = next(one for one in site.desk.people.invites() if one.used_by)
    csrf = re.findall(r'name="csrf" value="(\w+)"', admin.get("/admin"))[0]
    answer = admin.client.post("/admin/withdraw", data={"csrf": csrf, "invite": used.id})
    assert answer.status_code == 410
    annotator = site.visitor()
    own = annotator.get("/history")
    csrf = re.findall(r'name="csrf" value="(\w+)"', own)[0]
    data = {"csrf": csrf, "invite": used.id}
    assert annotator.client.post("/admin/withdraw", data=data).status_code == 403


def test_what_was_set_aside_is_looked_at_and_put_back(
    open_site: Open, make_item: Callable[..., Any]
) -> None:
    site = open_site(items=[make_item("<b>odd</b>", ("**one**", "two"))])
    admin, annotator = site.visitor("admin", accepted=False), site.visitor()
    path = annotator.task()
    annotator.send(path, action="skip", **{"skip-reason": "knowledge"})
    annotator.get("/")
    assert annotator.at == "/"  # nothing is left
    told = admin.get("/admin")
    assert "I lack the knowledge" in told
    assert "&lt;b&gt;odd&lt;/b&gt;" in told
    item = admin.get(f"/admin/item/{site.items[0].id}")
    assert "<strong>one</strong>" in item
    assert "skipped" in text_of(item)
    assert "**one**" in admin.get(f"/admin/item/{site.items[0].id}?plain=true")
    admin.send("/admin/put-back")
    assert annotator.task() == path
    annotator.send(path, action="submit", choice="tie")
    history = site.store.judgements(history=True)
    assert [one.answer for one in history] == ["skip", "withdrawn", "ranking"]
    assert history[1].rationale.startswith("put back by admin-")
    csrf = re.findall(r'name="csrf" value="(\w+)"', admin.get("/admin"))[0]
    for judgement in (history[0].id, history[2].id, "none"):  # a label is not put back by others
        data = {"csrf": csrf, "judgement": judgement}
        assert admin.client.post("/admin/put-back", data=data).status_code == 410
    assert admin.client.get("/admin/item/none").status_code == 410
    assert annotator.client.get(f"/admin/item/{site.items[0].id}").status_code == 403
