"""Which prompt killed a worker, of all those it had in hand: pure accounting, no clock.

After a worker was lost through what it computed, each prompt it had in hand is a suspect. Suspects
are tried again apart from each other: on any worker one at a time or, where there are many, so few
that all have had their turn in a few rounds. Prompts that are no suspects run beside them. When
such a worker is lost, too, the suspect that it had in hand is guilty: it has killed two. If it had
several, each must then be the only suspect on its worker. One that is finished is cleared.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.contracts.records import Assignment

ROUNDS = 8  # suspects of one loss have all been tried after about so many completions in a row


@dataclass(slots=True)
class Suspects:
    """``waiting``: suspects in no worker's hand, in the order in which they were lost."""

    waiting: deque[Assignment] = field(default_factory=deque)
    _kills: dict[int, int] = field(default_factory=dict)  # by group: workers lost with it in hand
    _with: dict[int, int] = field(default_factory=dict)  # by group: the worker that has it in hand
    _crowd: Counter[int] = field(default_factory=Counter)  # by worker: suspects in hand

    def __contains__(self, group_id: int) -> bool:
        return group_id in self._kills

    def blame(self, held: Sequence[Assignment]) -> Assignment | None:
        """A worker was lost with these in hand. Returns the guilty one, if there is just one that
        can be; all others are suspects from now on."""
        for assignment in held:
            self.given_back(assignment.group_id)
        counts = [self._kills.get(assignment.group_id, 0) for assignment in held]
        most = max(counts, default=0)
        if most and counts.count(most) == 1:
            guilty = held[counts.index(most)]
            del self._kills[guilty.group_id]
            return guilty  # the others that it had for company are no more suspect than before
        for assignment, kills in zip(held, counts, strict=True):
            self._kills[assignment.group_id] = kills + 1
        return None

    def clear(self, group_id: int) -> None:
        """It was finished: it kills nobody."""
        if group_id in self._kills:
            self.given_back(group_id)
            del self._kills[group_id]

    def next_for(self, workers: Sequence[int]) -> tuple[int, Assignment] | None:
        """A waiting suspect, and which of ``workers`` (those that serve) is to try it; None while
        all have their hands full of suspects."""
        if not self.waiting or not workers:
            return None
        worker = min(workers, key=lambda index: (self._crowd[index], index))
        if self._crowd[worker] >= self._most(self.waiting[0], len(workers)):
            return None
        suspect = self.waiting.popleft()
        self._with[suspect.group_id] = worker
        self._crowd[worker] += 1
        return worker, suspect

    def given_back(self, group_id: int) -> None:
        """No worker has it in hand any more."""
        worker = self._with.pop(group_id, None)
        if worker is not None:
            self._crowd[worker] -= 1

    def _most(self, suspect: Assignment, workers: int) -> int:
        if self._kills.get(suspect.group_id, 0) > 1:
            return 1
        return max(1, -(-len(self._kills) // (ROUNDS * workers)))
