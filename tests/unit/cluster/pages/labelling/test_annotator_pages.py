"""An annotator's way through the pages, without scripts."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from cluster.pages.labelling.forms import shown_order

Open = Callable[..., Any]


def text_of(html: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def test_consent_warning_and_guidelines_come_before_the_first_item(open_site: Open) -> None:
    site = open_site()
    visitor = site.visitor(accepted=False)
    page = visitor.get("/")
    assert visitor.at == "/welcome"
    assert "What you may see" in page
    assert "stored under a pseudonym" in page
    path = f"/task/{site.items[0].id}"
    visitor.get(path)
    assert visitor.at == "/welcome"
    visitor.send("/welcome", agree="no")
    assert visitor.at == "/welcome"
    visitor.send("/welcome", agree="yes")
    assert visitor.at == path


def test_a_changed_guideline_is_shown_again_and_each_label_keeps_its_version(
    open_site: Open, tmp_path: Any
) -> None:
    site = open_site()
    visitor = site.visitor()
    visitor.label()
    (tmp_path / "g.md").write_text("Prefer the *shorter* one.")
    later = open_site(items=[], guidelines=str(tmp_path / "g.md"))
    site.desk.rules = later.desk.rules
    assert "Prefer the <em>shorter</em> one." in visitor.get("/")
    assert visitor.at == "/welcome"
    visitor.send("/welcome", agree="yes")
    visitor.label()
    old, new = site.store.judgements()
    assert old.guideline_version != new.guideline_version
    assert new.guideline_version == site.desk.rules.guideline.version
    assert new.guideline_sha256 == site.desk.rules.guideline.sha256
    assert new.consent == site.desk.rules.consent.version


def test_a_pair_is_shown_blind_and_its_order_recorded(open_site: Open) -> None:
    site = open_site()
    visitor = site.visitor()
    seen = set()
    for _ in site.items:
        path = visitor.task()
        page = visitor.get(path)
        item = site.item_at(path)
        places = [page.index(one.text) for one in item.completions]
        order = "ab" if places[0] < places[1] else "ba"
        seen.add(order)
        site.clock.now += 12
        visitor.send(path, action="submit", choice="first-3")
        judgement = site.store.judgements()[-1]
        assert judgement.shown_order == order
        assert judgement.choice == order[0]
        assert judgement.strength == 3
    assert seen == {"ab", "ba"}
    assert "Nothing is left for you" in visitor.get("/")


def test_the_order_is_random_and_the_same_at_each_look() -> None:
    orders = [shown_order(f"item {n}", "somebody", 2) for n in range(400)]
    assert 150 < orders.count("ab") < 250
    assert orders == [shown_order(f"item {n}", "somebody", 2) for n in range(400)]
    assert {shown_order(f"item {n}", "x", 4) for n in range(400)} >= {"abcd", "dcba"}


def test_the_time_a_label_took_begins_with_the_first_look(open_site: Open) -> None:
    site = open_site()
    visitor = site.visitor()
    path = visitor.task()
    visitor.send(path, action="compare:1-2", choice="tie")
    site.clock.now += 30
    visitor.send(path, action="submit", choice="tie")
    assert site.store.judgements()[0].duration_s == 30


@pytest.mark.parametrize(
    ("choice", "said", "ranks"),
    [
        ("tie", "tie", (1, 1)),
        ("all-bad", "both_bad", ()),
        ("second-1", None, None),
    ],
)
def test_every_choice_is_taken(open_site: Open, choice: str, said: Any, ranks: Any) -> None:
    site = open_site()
    visitor = site.visitor()
    visitor.label(choice, rationale="because")
    (judgement,) = site.store.judgements()
    assert judgement.rationale == "because"
    if said is None:
        said, ranks = judgement.shown_order[1], judgement.ranks
        assert judgement.strength == 1
    assert (judgement.choice, judgement.ranks) == (said, ranks)


@pytest.mark.parametrize("fields", [{}, {"choice": "third"}, {"choice": "first-9"}])
def test_a_form_without_a_choice_is_shown_again_with_what_was_entered(
    open_site: Open, fields: dict[str, str]
) -> None:
    site = open_site()
    visitor = site.visitor()
    path = visitor.task()
    page = visitor.send(path, 422, action="submit", rationale="kept words", **fields)
    assert "Choose which completion is better." in page
    assert "kept words" in page
    assert 'aria-describedby="wrong-choice"' in page
    assert site.store.judgements() == []


def test_a_rationale_can_be_asked_for(open_site: Open) -> None:
    site = open_site(rationale=True)
    visitor = site.visitor()
    path = visitor.task()
    assert "Say in a few words why." in visitor.send(path, 422, action="submit", choice="tie")
    visitor.send(path, action="submit", choice="tie", rationale="they are the same")
    assert len(site.store.judgements()) == 1


def test_strength_can_be_left_out(open_site: Open) -> None:
    site = open_site(strength=False)
    visitor = site.visitor()
    visitor.label("second")
    (judgement,) = site.store.judgements()
    assert judgement.strength is None
    assert judgement.choice == judgement.shown_order[1]


def test_skip_and_flag_are_no_labels(open_site: Open) -> None:
    site = open_site()
    visitor = site.visitor()
    visitor.send(visitor.task(), action="skip", **{"skip-reason": "language"})
    path = visitor.task()
    assert "Choose what is wrong" in visitor.send(path, 422, action="flag")
    visitor.send(path, action="flag", rationale="a name", **{"flag-reason": "personal"})
    first, second = site.store.judgements()
    assert (first.answer, first.reason) == ("skip", "language")
    assert (second.answer, second.reason, second.rationale) == ("flag", "personal", "a name")
    assert site.store.stats()["labels"] == 0
    assert visitor.task() not in (path, f"/task/{first.item_id}")


def test_undo_opens_the_item_again_with_what_was_entered(open_site: Open) -> None:
    site = open_site()
    visitor = site.visitor()
    path = visitor.label("second-2", rationale="my reasons")
    page = visitor.get("/")
    assert "Saved: the second is better." in page
    page = visitor.send("/undo")
    assert visitor.at == path
    assert 'value="second-2" data-key="6" checked' in page
    assert "my reasons" in page
    assert site.store.judgements() == []
    visitor.send(path, action="submit", choice="tie")
    (judgement,) = site.store.judgements()
    assert judgement.choice == "tie"
    assert [one.answer for one in site.store.judgements(history=True)] == [
        "ranking",
        "withdrawn",
        "ranking",
    ]


def test_undo_takes_back_only_ones_own(open_site: Open) -> None:
    site = open_site()
    mine, other = site.visitor(), site.visitor()
    mine.label()
    other.label()
    (first, _) = site.store.judgements()
    other.send("/undo", 410, judgement=first.id)
    assert len(site.store.judgements()) == 2


def test_a_label_can_be_changed_from_the_history(open_site: Open) -> None:
    site = open_site()
    visitor = site.visitor()
    path = visitor.label("first-1")
    visitor.label()
    page = visitor.get("/history")
    assert "the first is slightly better" in page
    assert f'href="{path}"' in page
    page = visitor.get(path)
    assert "You have labelled this item." in page
    assert 'value="first-1" data-key="3" checked' in page
    visitor.send(path, action="submit", choice="second-3")
    current = [one for one in site.store.judgements() if path.endswith(one.item_id)]
    assert [one.strength for one in current] == [3]
    assert current[0].supersedes is not None


def test_a_draft_is_kept_and_goes_with_the_label(open_site: Open) -> None:
    site = open_site()
    visitor = site.visitor()
    path = visitor.task()
    visitor.send(path, action="draft", choice="first-2", rationale="half a thou")
    page = visitor.get(path)
    assert "half a thou" in page
    assert 'value="first-2" data-key="2" checked' in page
    assert site.store.judgements() == []
    visitor.send(path, action="submit", choice="first-2", rationale="half a thought")
    who = site.store.judgements()[0].annotator_id
    assert site.desk.labelling.draft(who, path.rpartition("/")[2]) is None


def test_a_ranking_of_four(open_site: Open, make_item: Callable[..., Any]) -> None:
    site = open_site(items=[make_item("q", ("w", "x", "y", "z"))])
    visitor = site.visitor()
    path = visitor.task()
    incomplete = {"rank-1": "1", "rank-2": "2", "rank-3": "2"}
    assert "Give every completion a place." in visitor.send(
        path, 422, action="submit", **incomplete
    )
    visitor.send(path, action="submit", **incomplete, **{"rank-4": "4"})
    (judgement,) = site.store.judgements()
    shown = [judgement.ranks["abcd".index(letter)] for letter in judgement.shown_order]
    assert shown == [1, 2, 2, 4]
    assert "places 1, 2, 2, 4" in visitor.get("/history")


def test_a_completion_is_edited_into_a_demonstration(open_site: Open) -> None:
    site = open_site()
    visitor = site.visitor()
    path = visitor.task()
    page = visitor.send(path, action="edit:2", choice="second-1")
    who = site.desk.people.annotators()[0].id
    item = site.item_at(path)
    order = shown_order(item.id, who, 2)
    second = item.completions["ab".index(order[1])].text
    assert f'maxlength="50000">\n{second}</textarea>' in page
    unchanged = visitor.send(path, 422, action="submit", choice="second-1", demonstration=second)
    assert "unchanged" in unchanged
    visitor.send(path, action="submit", choice="second-1", demonstration=f"{second}\r\nand more")
    (judgement,) = site.store.judgements()
    assert judgement.demonstration == f"{second}\nand more"
    assert judgement.choice == order[1]


def test_a_single_completion_is_edited_only(open_site: Open, make_item: Callable[..., Any]) -> None:
    site = open_site(items=[make_item("q", ("draft text",))])
    visitor = site.visitor()
    path = visitor.task()
    assert "Edit the completion, or skip" in visitor.send(path, 422, action="submit")
    visitor.send(path, action="submit", demonstration="final text")
    (judgement,) = site.store.judgements()
    assert (judgement.answer, judgement.demonstration) == ("demonstration", "final text")


def test_the_difference_is_shown_on_demand(open_site: Open, make_item: Callable[..., Any]) -> None:
    site = open_site(items=[make_item("q", ("the red fox ran", "the blue fox ran"))])
    visitor = site.visitor()
    path = visitor.task()
    assert "<del>" not in visitor.get(path)
    page = visitor.send(path, action="compare:1-2", rationale="not lost")
    assert {"<del>red</del>", "<ins>blue</ins>"} <= set(
        re.findall(r"<(?:del|ins)>\w+</(?:del|ins)>", page)
    ) or {"<del>blue</del>", "<ins>red</ins>"} <= set(
        re.findall(r"<(?:del|ins)>\w+</(?:del|ins)>", page)
    )
    assert "not lost" in page


def test_long_completions_fold_and_texts_can_be_shown_as_written(
    open_site: Open, make_item: Callable[..., Any]
) -> None:
    site = open_site(items=[make_item("q", ("**bold** " * 300, "short"))])
    visitor = site.visitor()
    path = visitor.task()
    page = visitor.get(path)
    assert page.count("<details open>") == 1
    assert "<strong>bold</strong>" in page
    assert "<strong>bold</strong>" not in visitor.get(f"{path}?plain=true")


def test_nobody_gets_an_item_that_somebody_has(open_site: Open) -> None:
    site = open_site()
    first, second = site.visitor(), site.visitor()
    one, other = first.task(), second.task()
    assert one != other
    assert first.task() == one
    assert "went to somebody else" in second.get(one, 410)


def test_overlap_gives_an_item_to_so_many(open_site: Open) -> None:
    site = open_site(overlap=2)
    people = [site.visitor() for _ in range(3)]
    assert [one.task() for one in people[:2]] == [f"/task/{site.items[0].id}"] * 2
    assert people[2].task() == f"/task/{site.items[1].id}"


def test_a_lease_ends_and_a_late_label_is_refused_when_others_took_the_item(
    open_site: Open,
) -> None:
    site = open_site()
    late, quick = site.visitor(), site.visitor()
    path = late.task()
    fields = late.get(path)
    site.clock.now += 901
    assert quick.task() == path
    quick.send(path, action="submit", choice="tie")
    hidden = re.findall(r'name="(csrf|began)" value="([^"]*)"', fields)
    answer = late.client.post(path, data={**dict(hidden), "action": "submit", "choice": "tie"})
    assert answer.status_code == 410
    assert "went to somebody else" in answer.text
    assert len(site.store.judgements()) == 1


def test_a_late_label_counts_when_nobody_took_the_item(open_site: Open) -> None:
    site = open_site()
    visitor = site.visitor()
    path = visitor.task()
    site.clock.now += 5000
    visitor.send(path, action="submit", choice="tie")
    assert len(site.store.judgements()) == 1


def test_a_retried_submit_is_not_doubled(open_site: Open) -> None:
    site = open_site()
    visitor = site.visitor()
    path = visitor.task()
    page = visitor.get(path)
    data = dict(re.findall(r'name="(csrf|began)" value="([^"]*)"', page))
    data |= {"action": "submit", "choice": "first-1"}
    for _ in range(3):
        site.clock.now += 7
        answer = visitor.client.post(path, data=data, headers={"x-accord": "script"})
        assert (answer.status_code, answer.json()) == (200, {"next": "/"})
    assert len(site.store.judgements(history=True)) == 1
    other = visitor.client.post(path, data={**data, "choice": "tie"})
    assert other.status_code == 409
    assert "in the meantime" in other.text
    assert len(site.store.judgements(history=True)) == 1


def test_gold_items_are_mixed_in_unmarked(open_site: Open, make_item: Callable[..., Any]) -> None:
    gold = [make_item(f"gold {n}", ("right", "wrong"), gold=(1, 2)) for n in range(2)]
    plain = [make_item(f"plain {n}", ("a", "b")) for n in range(8)]
    site = open_site(items=[*gold, *plain], gold_every=3)
    visitor = site.visitor()
    kinds = []
    for _ in range(9):
        path = visitor.label()
        kinds.append(site.item_at(path).gold is not None)
    assert kinds == [False, False, True, False, False, True, False, False, False]


def test_live_sampling_is_asked_when_nothing_is_left(open_site: Open) -> None:
    class Live:
        asked = 0

        def status(self) -> str:
            return "New <completions> are coming."

        def ask(self) -> None:
            self.asked += 1

    site = open_site(items=[])
    site.desk.live = live = Live()
    page = site.visitor("admin").get("/")
    assert "New &lt;completions&gt; are coming." in page
    assert live.asked > 0
