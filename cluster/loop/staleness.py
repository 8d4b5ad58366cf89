"""Bounded staleness by counting admissions: pure accounting, no clock, no asyncio, no Ray.

Staleness is counted in learner steps: how far the learner had got when it trained on a token, less
the version that sampled the token.

Group n belongs to step n // P (P prompts per step). Steps consume their groups whole and in order,
so which groups a step trains on never depends on which happened to finish first.

A group may be admitted (given to a worker) only while

    admitted < (held + bound + 1) * P

where ``held`` is the version that every serving worker is known to hold. Step s trains version s.
A group admitted under ``held`` has n // P <= held + bound. Its tokens are of version ``held`` or
later. So its staleness, n // P - version, is at most ``bound``. The bound holds by construction:
nothing is generated and thrown away, so long completions are not under-represented. With
``bound = 0`` the groups of a step are admitted only when its weights are held: synchronous.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from cluster.contracts.errors import Fatal
from cluster.contracts.records import GroupMeta, Harvest, StepInput
from cluster.contracts.stream_parts import part_of


def require_fresh(step: int, metas: Iterable[GroupMeta], bound: int) -> None:
    """Raises Fatal where a token that step ``step`` would train on is older than ``bound``."""
    for meta in metas:
        if meta.failure is None and step - meta.version_min > bound:
            raise Fatal(
                f"group {meta.group_id} has tokens of version {meta.version_min} "
                f"at step {step}: older than staleness.bound = {bound}"
            )


@dataclass(slots=True)
class AdmissionLedger:
    """How many groups may be admitted, and which are next.

    ``admitted``: the next group id; ``held``: the version that all serving workers hold.
    """

    prompts_per_step: int
    bound: int
    last_step: int  # steps of the run; nothing is admitted for a step that will not happen
    admitted: int = 0
    held: int = 0

    def room(self) -> int:
        """How many groups may be admitted now."""
        # Near the end the last step is the limit: what is admitted beyond it nobody would train on.
        limit = min(self.held + self.bound + 1, self.last_step) * self.prompts_per_step
        return max(0, limit - self.admitted)

    def admit(self, count: int) -> range:
        """Admit ``count`` groups; returns their ids. Raises ValueError over the room."""
        if count > self.room():
            raise ValueError(f"{count} groups asked for, {self.room()} may be admitted")
        first = self.admitted
        self.admitted += count
        return range(first, self.admitted)

    def weights_held(self, version: int) -> None:
        """Every serving worker now holds ``version``: as many groups more may be admitted."""
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

    ledger: AdmissionLedger
    next_step: int = 0
    refused: int = 0
    refused_tokens: int = 0
    _ready: dict[int, tuple[GroupMeta, Any]] = field(default_factory=dict)
    _arrived: dict[int, int] = field(default_factory=dict)  # step -> its groups in ``_ready``

    def __len__(self) -> int:
        return len(self._ready)

    def add(self, harvest: Harvest, groups: Iterable[GroupMeta]) -> None:
        for meta in groups:
            # A group can come twice: its first worker was taken for lost, and answered after all.
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

    def is_complete(self, step: int) -> bool:
        """Whether all groups of a step that was not taken yet are there."""
        return self._arrived.get(step, 0) >= self.ledger.prompts_per_step

    def lacking(self) -> int:
        """How many groups the next step still waits for; costs the same always."""
        return self.ledger.prompts_per_step - self._arrived.get(self.next_step, 0)

    def take(self) -> tuple[StepInput, list[GroupMeta]] | None:
        """The next step's groups once all have come in, else None. Failed groups are in the list
        of metas but not in the input. Asking in vain costs nothing: arrivals are counted."""
        if not self.is_complete(self.next_step):
            return None
        del self._arrived[self.next_step]
        entries = [self._ready.pop(g) for g in self.ledger.groups_of(self.next_step)]
        step = self._input(entries)
        self.next_step += 1
        return step, [meta for meta, _ in entries]

    def _input(self, entries: list[tuple[GroupMeta, Any]]) -> StepInput:
        return StepInput(
            step=self.next_step,
            group_ids=tuple(m.group_id for m, _ in entries if m.failure is None),
            payloads=_payloads(entries),
        )

    def upcoming(self) -> tuple[Any, ...]:
        """The payloads that ``take`` would hand out, once the next step is complete."""
        return _payloads([self._ready[g] for g in self.ledger.groups_of(self.next_step)])

    def complete_parts(self, parts: int) -> list[int]:
        """Which of the ``parts`` of the next step have all their groups here."""
        size = self.ledger.prompts_per_step
        lacking = {part_of(group_id, size, parts) for group_id in self.missing()}
        return [part for part in range(parts) if part not in lacking]

    def input_of(self, wanted: Collection[int], parts: int) -> StepInput:
        """Some complete parts of the next step. They stay here until ``take``."""
        size, groups = self.ledger.prompts_per_step, self.ledger.groups_of(self.next_step)
        return self._input([self._ready[g] for g in groups if part_of(g, size, parts) in wanted])

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


def _payloads(entries: Iterable[tuple[GroupMeta, Any]]) -> tuple[Any, ...]:
    """Of the groups that did not fail; one that groups of a harvest share is handed on once."""
    shared = {id(payload): payload for meta, payload in entries if meta.failure is None}
    return tuple(shared.values())
