"""Which prompt killed the worker: found whatever the workers, and no innocent one is ever named."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.contracts.records import Assignment, Prompt
from cluster.loop.suspects import ROUNDS, Suspects


def assignment(group: int) -> Assignment:
    return Assignment(
        group_id=group, prompt=Prompt(id=str(group), messages=(), token_ids=(1,)), samples=1
    )


@settings(max_examples=200, deadline=None)
@given(
    groups=st.integers(1, 200),
    workers=st.integers(1, 8),
    poison=st.sets(st.integers(0, 199), max_size=3),
    seed=st.integers(0, 10**6),
)
def test_only_what_kills_is_found_guilty(
    groups: int, workers: int, poison: set[int], seed: int
) -> None:
    """Each worker computes what it holds in one round; one that holds poison dies."""
    rng, suspects = random.Random(seed), Suspects()
    poison = {group for group in poison if group < groups}
    fresh = [assignment(group) for group in range(groups)]
    guilty: set[int] = set()
    done: set[int] = set()
    losses = rounds = 0
    while len(done) + len(guilty) < groups:
        rounds += 1
        assert rounds < 60 * groups
        held: dict[int, list[Assignment]] = {worker: [] for worker in range(workers)}
        while (turn := suspects.next_for(range(workers))) is not None:
            held[turn[0]].append(turn[1])
        for item in fresh:
            held[rng.randrange(workers)].append(item)
        fresh = []
        for items in held.values():
            if {item.group_id for item in items} & poison:
                losses += 1
                found = suspects.blame(items)
                guilty |= {found.group_id} if found else set()
                suspects.waiting.extend(item for item in items if item is not found)
                left = [item for item in suspects.waiting if item.group_id not in suspects]
                fresh += left
                for item in left:
                    suspects.waiting.remove(item)
            else:
                for item in items:
                    suspects.clear(item.group_id)
                    done.add(item.group_id)
    assert guilty == poison
    assert losses <= 4 * len(poison)
    if groups <= ROUNDS * workers and len(poison) == 1:
        assert losses == 2


def test_an_innocent_prompt_that_was_in_hand_twice_is_tried_alone() -> None:
    suspects = Suspects()
    both = [assignment(0), assignment(1)]
    assert suspects.blame(both) is None
    assert suspects.blame(both) is None  # lost together again: one cannot tell
    suspects.waiting.extend(both)
    assert suspects.next_for([0]) == (0, both[0])
    assert suspects.next_for([0]) is None
    suspects.clear(0)
    assert 0 not in suspects
    assert suspects.next_for([0]) == (0, both[1])
    assert suspects.blame([both[1], assignment(2)]) == both[1]
    assert 2 not in suspects
