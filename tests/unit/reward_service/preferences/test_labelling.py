from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.contracts.errors import UserError
from reward_service.preferences.labelling import Labelling, LeaseLost, Progress
from reward_service.preferences.people import Annotator, InviteRefused, People
from reward_service.preferences.records import (
    Candidate,
    ChosenBy,
    Gold,
    Item,
    Judgement,
    withdrawal,
)
from reward_service.preferences.store import PreferenceStore

WHEN = "2026-01-02T03:04:05+00:00"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def item(name: str, completions: int = 2, gold: Gold | None = None) -> Item:
    return Item(
        id=name,
        messages=({"role": "user", "content": name},),
        completions=tuple(Candidate(text=f"{name} {n}") for n in range(completions)),
        source="here",
        license="CC0-1.0",
        created_at=WHEN,
        gold=gold,
    )


def judged(item_id: str, who: str, name: str = "", **keys: object) -> Judgement:
    given: dict[str, object] = {
        "id": name or f"{item_id}/{who}",
        "item_id": item_id,
        "annotator_id": who,
        "answer": "ranking",
        "ranks": (1, 2),
        "consent": "c1",
        "created_at": WHEN,
    }
    return Judgement(**given | keys)  # type: ignore[arg-type]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path) -> PreferenceStore:
    made = PreferenceStore(tmp_path / "p.db")
    made.add_items([item("i1"), item("i2")])
    return made


@pytest.fixture
def labelling(store: PreferenceStore, clock: Clock) -> Labelling:
    return Labelling(store, lease_s=60, clock=clock)


def given(labelling: Labelling, who: str) -> str | None:
    found = labelling.next_item(who)
    return None if found is None else found.id


def test_two_annotators_never_hold_one_item(labelling: Labelling) -> None:
    assert [given(labelling, who) for who in ("ann", "bob", "cem")] == ["i1", "i2", None]
    assert given(labelling, "ann") == "i1"  # a reload gives the same item
    assert labelling.progress() == Progress(items=2, done=0, leased=2)
    assert labelling.submit(judged("i1", "ann"))
    assert [given(labelling, who) for who in ("ann", "cem")] == [None, None]
    assert labelling.progress() == Progress(items=2, done=1, leased=1)


def test_an_item_that_was_chosen_for_two_annotators_goes_to_two(
    labelling: Labelling, store: PreferenceStore
) -> None:
    store.add_items([replace(item("twice"), chosen_by=ChosenBy(strategy="random", judgements=2))])
    assert [given(labelling, who) for who in ("ann", "bob", "cem")] == ["i1", "i2", "twice"]
    for who, which in (("ann", "i1"), ("bob", "i2"), ("cem", "twice")):
        labelling.submit(judged(which, who))
    assert labelling.progress() == Progress(items=3, done=2, leased=0)
    assert [given(labelling, who) for who in ("ann", "bob", "cem")] == ["twice", None, None]
    labelling.submit(judged("twice", "ann"))
    assert labelling.progress() == Progress(items=3, done=3, leased=0)


def test_an_item_that_was_not_answered_goes_to_the_next(labelling: Labelling, clock: Clock) -> None:
    assert given(labelling, "ann") == "i1"
    clock.now += 61
    assert given(labelling, "bob") == "i1"
    with pytest.raises(LeaseLost, match="not answered in time"):
        labelling.submit(judged("i1", "ann"))
    assert labelling.submit(judged("i1", "bob"))
    assert given(labelling, "ann") == "i2"
    clock.now += 61
    assert labelling.submit(judged("i2", "ann")), "nobody else took it: late, but not lost"


def test_overlap_gives_an_item_to_as_many(store: PreferenceStore, clock: Clock) -> None:
    twice = Labelling(store, overlap=2, clock=clock)
    assert [given(twice, who) for who in ("ann", "bob", "cem")] == ["i1", "i1", "i2"]
    twice.submit(judged("i1", "ann"))
    assert [given(twice, who) for who in ("ann", "bob")] == ["i2", "i1"]
    twice.submit(judged("i1", "bob"))
    assert twice.progress().done == 1


def test_a_skipped_item_goes_to_others_only(labelling: Labelling) -> None:
    given(labelling, "ann")
    labelling.submit(judged("i1", "ann", answer="skip", ranks=(), reason="unclear"))
    assert [given(labelling, who) for who in ("ann", "bob")] == ["i2", "i1"]


def test_control_items_and_priorities(store: PreferenceStore, labelling: Labelling) -> None:
    store.add_items([item("gold", gold=Gold(ranks=(1, 2))), item("urgent")])
    labelling.prioritise({"urgent": 2.0, "gold": 1.0})
    assert given(labelling, "ann") == "urgent"
    for who in ("bob", "cem"):
        assert given(labelling, who) == "gold"
        labelling.submit(judged("gold", who))
        assert given(labelling, who) != "gold"


def test_a_repeated_submit_is_stored_once(labelling: Labelling, store: PreferenceStore) -> None:
    given(labelling, "ann")
    labelling.save_draft("ann", "i1", {"rationale": "so far"})
    assert labelling.draft("ann", "i1") == {"rationale": "so far"}
    assert labelling.submit(judged("i1", "ann", "key", duration_s=2.0)) is True
    later = judged("i1", "ann", "key", duration_s=9.0, created_at="2026-01-02T03:05:00+00:00")
    assert labelling.submit(later) is False
    assert labelling.draft("ann", "i1") is None
    assert [entry.duration_s for entry in store.judgements(history=True)] == [2.0]
    with pytest.raises(UserError, match="'key' is in judgements already, with another ranks"):
        labelling.submit(judged("i1", "ann", "key", ranks=(2, 1)))


def test_undo_and_change_are_new_records(labelling: Labelling, store: PreferenceStore) -> None:
    given(labelling, "ann")
    first = judged("i1", "ann", "one")
    labelling.submit(first)
    store.add_judgement(withdrawal(first, "two", WHEN))
    assert (store.judgements(), labelling.history("ann")) == ([], [])
    assert given(labelling, "ann") == "i1"
    with pytest.raises(UserError, match="judged item 'i1' before"):
        labelling.submit(judged("i1", "ann", "three"))
    current = labelling.current("ann", "i1")
    assert current is not None
    assert current.answer == "withdrawn"
    assert labelling.submit(judged("i1", "ann", "three", supersedes=current.id, ranks=(1, 1)))
    assert labelling.submit(judged("i1", "ann", "four", supersedes="three", ranks=(2, 1)))
    assert [(i.id, j.choice) for i, j in labelling.history("ann")] == [("i1", "b")]
    records = [(entry.id, entry.choice) for entry in store.judgements(history=True)]
    assert records == [("one", "a"), ("two", "withdrawn"), ("three", "tie"), ("four", "b")]


def test_rankings_demonstrations_and_what_does_not_fit(store: PreferenceStore) -> None:
    store.add_items([item("three", 3), item("one", 1)])
    store.add_judgement(
        judged("three", "ann", ranks=(2, 1, 2), shown_order="cab", demonstration="better")
    )
    store.add_judgement(
        judged("one", "ann", answer="demonstration", ranks=(), demonstration="mine")
    )
    assert store.judgements()[0].choice == "b>a=c"
    pairs = [(pair.chosen, pair.rejected) for pair in store.pairs()]
    assert pairs == [("three 1", "three 0"), ("three 1", "three 2")]
    stats = store.stats()
    assert (stats["rankings"], stats["demonstrations"], stats["pairs"]) == (1, 2, 2)
    for change in ({"ranks": (1, 2, 3)}, {"ranks": (2, 3)}, {"shown_order": "abc"}):
        with pytest.raises(UserError, match="judgement 'i1/ann' of item 'i1'"):
            store.add_judgement(judged("i1", "ann", **change))


def test_an_invitation_works_once(store: PreferenceStore, clock: Clock) -> None:
    people = People(store, clock)
    token = people.invite("annotator", team="north", valid_s=100)
    ann = people.redeem(token)
    assert (ann.role, ann.team, people.annotators()) == ("annotator", "north", [ann])
    with pytest.raises(InviteRefused, match="used already"):
        people.redeem(token)
    with pytest.raises(InviteRefused, match="not known"):
        people.redeem("made up")
    late = people.invite(valid_s=100)
    clock.now += 101
    with pytest.raises(InviteRefused, match="too old"):
        people.redeem(late)
    assert token.encode() not in store.path.read_bytes()


def test_sessions_outlive_the_process_and_end(store: PreferenceStore, clock: Clock) -> None:
    people = People(store, clock)
    people.register(Annotator(id="ann", role="admin"))
    cookie = people.open_session("ann", valid_s=100)
    again = People(PreferenceStore(store.path), clock)
    assert again.session(cookie) == Annotator(id="ann", role="admin")
    assert again.session("another") is None
    other = people.open_session("ann", valid_s=100)
    people.close_session(other)
    assert people.session(other) is None
    clock.now += 101
    assert people.session(cookie) is None


def test_texts_have_versions_and_agreement_is_kept(store: PreferenceStore) -> None:
    people = People(store)
    assert people.document("guideline") is None
    first = people.publish("guideline", "1", "be fair")
    assert people.publish("guideline", "1", "be fair") == first
    with pytest.raises(UserError, match="version '1' of the guideline is there already"):
        people.publish("guideline", "1", "be quick")
    second = people.publish("guideline", "2", "be quick")
    assert (people.document("guideline"), people.document("guideline", "1")) == (second, first)
    people.register(Annotator(id="ann", role="annotator"))
    assert not people.has_agreed("ann", "c1")
    people.agree("ann", "c1")
    people.agree("ann", "c1")
    assert people.has_agreed("ann", "c1")
    assert not people.has_agreed("ann", "c2")
    assert replace(first, version="2") != second


def test_a_share_of_the_items_is_labelled_by_several(store: PreferenceStore, clock: Clock) -> None:
    store.add_items([item(f"x{n}") for n in range(48)])
    half = Labelling(store, overlap=2, overlap_share=0.3, clock=clock)
    several = {one.id for one in store.items() if half.wanted(one.id) == 2}
    assert 5 < len(several) < 30
    for who in ("ann", "bob", "cem"):
        while (name := given(half, who)) is not None:
            half.submit(judged(name, who))
    labels = [one.item_id for one in store.judgements()]
    assert {name for name in labels if labels.count(name) == 2} == several
    assert len(labels) == 50 + len(several)
    assert half.progress() == Progress(items=50, done=50, leased=0)


def test_only_a_skip_or_a_flag_is_put_back(labelling: Labelling, store: PreferenceStore) -> None:
    given(labelling, "ann")
    skipped = judged("i1", "ann", answer="skip", ranks=())
    labelling.submit(skipped)
    assert labelling.put_back(skipped.id, "admin-1", "w", "2027-01-01T00:00:00+00:00")
    assert not labelling.put_back(skipped.id, "admin-1", "w2", "2027-01-01T00:00:00+00:00")
    assert given(labelling, "ann") == "i1"
    label = judged("i2", "bob")
    labelling.submit(label)
    assert not labelling.put_back(label.id, "admin-1", "w3", "2027-01-01T00:00:00+00:00")
    assert [one.answer for one in store.judgements()] == ["ranking"]
