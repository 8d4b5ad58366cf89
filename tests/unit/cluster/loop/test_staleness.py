from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.contracts.records import GroupMeta, Harvest
from cluster.loop.staleness import AdmissionLedger, GroupBuffer


def meta(group_id: int, version: int, failure: str | None = None) -> GroupMeta:
    return GroupMeta(
        group_id=group_id,
        attempt=0,
        samples=1,
        prompt_tokens=1,
        response_tokens=1,
        version_min=version,
        version_max=version,
        failure=failure,
    )


def harvest(*metas: GroupMeta, payload: object = "table") -> Harvest:
    return Harvest(worker="w", incarnation=0, groups=metas, payload=payload)


def test_synchronous_bound_admits_one_step_at_a_time() -> None:
    ledger = AdmissionLedger(prompts_per_step=4, bound=0, last_step=10)
    assert list(ledger.admit(ledger.room())) == [0, 1, 2, 3]
    assert ledger.room() == 0
    ledger.weights_held(1)
    assert list(ledger.admit(ledger.room())) == [4, 5, 6, 7]


def test_bound_two_admits_three_steps_ahead_and_no_step_that_will_not_happen() -> None:
    ledger = AdmissionLedger(prompts_per_step=4, bound=2, last_step=2)
    assert ledger.room() == 8
    with pytest.raises(ValueError, match="9 groups asked for, 8 may be admitted"):
        ledger.admit(9)


def test_groups_are_taken_in_order_of_admission_not_of_arrival() -> None:
    ledger = AdmissionLedger(prompts_per_step=2, bound=1, last_step=9)
    ledger.admit(4)
    buffer = GroupBuffer(ledger)
    buffer.add(harvest(payload="late"), [meta(3, 0), meta(2, 0), meta(1, 0)])
    assert buffer.take() is None
    assert buffer.missing() == [0]
    buffer.add(harvest(payload="early"), [meta(0, 0)])
    taken = buffer.take()
    assert taken is not None
    assert taken[0].group_ids == (0, 1)
    assert set(taken[0].payloads) == {"late", "early"}


def test_a_group_is_accepted_once() -> None:
    ledger = AdmissionLedger(prompts_per_step=1, bound=0, last_step=9)
    ledger.admit(1)
    buffer = GroupBuffer(ledger)
    for _ in range(3):
        buffer.add(harvest(), [meta(0, 0)])
    assert (len(buffer), buffer.refused) == (1, 2)
    buffer.take()
    buffer.add(harvest(), [meta(0, 0)])
    assert (len(buffer), buffer.refused) == (0, 3)


def test_a_failed_group_does_not_hold_up_its_step() -> None:
    ledger = AdmissionLedger(prompts_per_step=2, bound=0, last_step=9)
    ledger.admit(2)
    buffer = GroupBuffer(ledger)
    buffer.add(harvest(), [meta(0, 0), meta(1, 0, failure="bad prompt")])
    taken = buffer.take()
    assert taken is not None
    assert taken[0].group_ids == (0,)
    assert [m.failure for m in taken[1]] == [None, "bad prompt"]


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(0, 4),
    st.lists(st.integers(0, 2**31), min_size=50, max_size=400),
)
def test_no_consumed_group_is_older_than_the_bound(
    per_step: int, bound: int, choices: list[int]
) -> None:
    """Random interleavings of finishing, learning and (late) weight acknowledgement."""
    ledger = AdmissionLedger(prompts_per_step=per_step, bound=bound, last_step=10**6)
    buffer = GroupBuffer(ledger)
    running: dict[int, int] = {}  # group -> oldest version of its tokens
    published, trained = 0, []
    for choice in choices:
        for group in ledger.admit(ledger.room()):
            running[group] = ledger.held
        match choice % 3:
            case 0 if running:
                group = sorted(running)[choice % len(running)]
                buffer.add(harvest(), [meta(group, running.pop(group))])
            case 1:
                taken = buffer.take()
                if taken:
                    step, metas = taken
                    assert all(step.step - m.version_min <= bound for m in metas)
                    assert bound > 0 or all(m.version_min == step.step for m in metas)
                    trained += step.group_ids
                    published = step.step + 1
            case 2:
                if published > ledger.held:
                    ledger.weights_held(published)
    assert trained == list(range(len(trained)))
    assert len(running) + len(buffer) <= (bound + 1) * per_step
