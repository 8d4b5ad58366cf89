"""Which workers are sent an update together, by hand and without a clock."""

from __future__ import annotations

from cluster.weights.gathering import GATHER_S, Ask, Gathering, Round


def ask(member: int, number: int, version: int, **more: float) -> Ask:
    return Ask(member=member, number=number, version=version, **more)  # type: ignore[arg-type]


def members(rounds: list[Round]) -> list[tuple[int, ...]]:
    return [one.members for one in rounds]


def served(gathering: Gathering, asks: list[Ask], now: float) -> list[Round]:
    for one in asks:
        gathering.ask(one, now)
    return gathering.due(now)


def whole_round(gathering: Gathering, version: int, who: tuple[int, ...], now: float) -> None:
    for one in served(gathering, [ask(m, version + 1, version) for m in who], now):
        gathering.ended(one, whole=True)


def test_those_that_took_the_last_version_together_are_waited_for() -> None:
    gathering = Gathering()
    whole_round(gathering, 0, (1, 2, 3), 0.0)
    assert served(gathering, [ask(2, 2, 1), ask(1, 2, 1)], 10.0) == []
    assert gathering.wakes(10.25) == GATHER_S - 0.25
    assert members(served(gathering, [ask(3, 2, 1)], 10.5)) == [(1, 2, 3)]
    assert gathering.wakes(10.5) is None


def test_one_that_left_is_waited_for_once_and_no_longer_than_that() -> None:
    gathering = Gathering()
    whole_round(gathering, 0, (1, 2), 0.0)
    assert served(gathering, [ask(1, 2, 1)], 10.0) == []
    (one,) = gathering.due(10.0 + GATHER_S)
    gathering.ended(one, whole=True)
    assert members(served(gathering, [ask(1, 3, 2)], 20.0)) == [(1,)]


def test_one_that_comes_late_gets_its_own_and_belongs_to_the_next_group() -> None:
    gathering = Gathering()
    (first,) = served(gathering, [ask(1, 1, 0)], 0.0)
    (second,) = served(gathering, [ask(2, 1, 0)], 0.1)
    gathering.ended(first, whole=True)
    gathering.ended(second, whole=True)
    assert members(served(gathering, [ask(2, 2, 1), ask(1, 2, 1)], 1.0)) == [(1, 2)]


def test_one_that_hangs_is_left_out_of_the_second_try_and_apart_for_good() -> None:
    gathering = Gathering()
    (broken,) = served(gathering, [ask(1, 1, 0), ask(2, 1, 0), ask(3, 1, 0)], 0.0)
    gathering.ask(ask(1, 2, 0, first=4), 5.0)
    assert broken.broken, "the sender learns from who asks again"
    assert gathering.due(5.0) == [], "not before the broken round has ended"
    gathering.ended(broken, whole=False)
    gathering.ask(ask(2, 2, 0, first=3), 5.1)
    (again,) = gathering.due(5.0 + GATHER_S)
    assert again.members == (1, 2)
    assert again.first == 3, "what the one that got least lacks"
    gathering.ended(again, whole=True)
    woken = served(gathering, [ask(3, 2, 0)], 30.0)
    assert members(woken) == [(3,)]
    gathering.ended(woken[0], whole=True)
    asked = served(gathering, [ask(3, 3, 1), ask(1, 3, 1), ask(2, 3, 1)], 40.0)
    assert members(asked) == [(3,), (1, 2)]


def test_one_that_loads_slowly_is_sent_its_own() -> None:
    gathering = Gathering()
    asked = [ask(1, 1, 1, busy_s=1.0), ask(2, 1, 1, busy_s=9.0), ask(3, 1, 1, busy_s=1.5)]
    assert members(served(gathering, asked, 0.0)) == [(1, 3), (2,)]


def test_a_message_that_comes_twice_counts_once() -> None:
    gathering = Gathering()
    (one,) = served(gathering, [ask(1, 1, 0)], 0.0)
    assert served(gathering, [ask(1, 1, 0)], 0.1) == []
    assert not one.broken


def test_versions_do_not_share_a_round() -> None:
    gathering = Gathering()
    found = served(gathering, [ask(1, 1, 4), ask(2, 1, 5)], 0.0)
    assert sorted(members(found)) == [(1,), (2,)]
