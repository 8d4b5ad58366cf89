"""Bounded staleness by counting slots: pure accounting, no clock, no asyncio, no Ray.

Group n belongs to step n // P (P prompts a step), and steps consume their groups whole and in
order, so which groups a step trains on never depends on which happened to finish first.

A group may be admitted only while

    admitted < (held + bound + 1) * P

where ``held`` is the version every serving worker is known to hold. The learner trains step s with
version s. A group admitted under version ``held`` therefore has n // P <= held + bound, and its
tokens are from version ``held`` or later: its lag at training, n // P - version, is at most
``bound``. The bound holds by construction; nothing is generated and thrown away, so long answers
are not under-represented. ``bound = 0`` admits a step's groups only once the weights of that step
are held: exactly synchronous.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cluster.contracts.records import GroupMeta, Harvest, StepInput


@dataclass(slots=True)
class SlotLedger:
    """Admission. ``admitted``: next group id; ``held``: the version all serving workers hold."""

    prompts_per_step: int
    bound: int
    last_step: int  # steps of the run; nothing is admitted for a step that will not happen
    admitted: int = 0
    held: int = 0

    def room(self) -> int:
        """How many groups may be admitted now."""
        limit = min(self.held + self.bound + 1, self.last_step) * self.prompts_per_step
        return max(0, limit - self.admitted)

    def admit(self, count: int) -> range:
        """Take ``count`` slots; returns the new group ids. Raises ValueError over the room."""
        if count > self.room():
            raise ValueError(f"{count} groups asked for, {self.room()} slots free")
        first = self.admitted
        self.admitted += count
        return range(first, self.admitted)

    def weights_held(self, version: int) -> None:
        """Every serving worker now holds ``version``: the slots of the steps before it are free."""
        if version < self.held:
            raise ValueError(f"version {version} after {self.held}")
        self.held = version

    def step_of(self, group_id: int) -> int:
        return group_id // self.prompts_per_step

    def groups_of(self, step: int) -> range:
        return range(step * self.prompts_per_step, (step + 1) * self.prompts_per_step)


@dataclass(slots=True)
class GroupBuffer:
    """Finished groups waiting for their step. Each id is accepted once; a second is refused."""

    ledger: SlotLedger
    next_step: int = 0
    refused: int = 0
    refused_tokens: int = 0
    _ready: dict[int, tuple[GroupMeta, Any]] = field(default_factory=dict)
    _arrived: dict[int, int] = field(default_factory=dict)  # step -> its groups in ``_ready``

    def __len__(self) -> int:
        return len(self._ready)

    def add(self, harvest: Harvest, groups: Iterable[GroupMeta]) -> None:
        for meta in groups:
            trained = self.ledger.step_of(meta.group_id) < self.next_step
            if trained or meta.group_id in self._ready or meta.group_id >= self.ledger.admitted:
                self.refused += 1
                self.refused_tokens += meta.response_tokens
                continue
            self._keep(meta, harvest.payload)

    def _keep(self, meta: GroupMeta, payload: Any) -> None:
        self._ready[meta.group_id] = (meta, payload)
        step = self.ledger.step_of(meta.group_id)
        self._arrived[step] = self._arrived.get(step, 0) + 1

    def missing(self) -> list[int]:
        """Group ids the next step still waits for."""
        return [g for g in self.ledger.groups_of(self.next_step) if g not in self._ready]

    def take(self) -> tuple[StepInput, list[GroupMeta]] | None:
        """The next step's groups once all have come in, else None. Failed groups are in the list
        of metas but not in the input. Asking in vain costs nothing: arrivals are counted."""
        if self._arrived.get(self.next_step, 0) < self.ledger.prompts_per_step:
            return None
        del self._arrived[self.next_step]
        entries = [self._ready.pop(g) for g in self.ledger.groups_of(self.next_step)]
        payloads: dict[int, Any] = {}
        for meta, payload in entries:
            if meta.failure is None:
                payloads.setdefault(id(payload), payload)
        step = StepInput(
            step=self.next_step,
            group_ids=tuple(m.group_id for m, _ in entries if m.failure is None),
            payloads=tuple(payloads.values()),
        )
        self.next_step += 1
        return step, [meta for meta, _ in entries]

    def give_back(self, step: int, metas: Iterable[GroupMeta]) -> list[GroupMeta]:
        """Undo ``take`` of ``step``, whose payload was lost. Groups that had failed stay as they
        are; the others are returned: they have to be generated again."""
        self.next_step = step
        again = []
        for meta in metas:
            if meta.failure is None:
                again.append(meta)
            else:
                self._keep(meta, None)
        return again
