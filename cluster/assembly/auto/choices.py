"""Choosing values one after the other, with a reason for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from cluster.assembly.model_facts import ModelFacts
from cluster.contracts.config.base import Section, auto_rule
from cluster.machine.hardware import Machine

WIDTH = {"float32": 4, "bfloat16": 2}  # bytes a number

C = TypeVar("C", bound=Section)


@dataclass(frozen=True, slots=True)
class Reason:
    """A value that was chosen, and why."""

    value: Any
    why: str


@dataclass(frozen=True, slots=True)
class Resolved(Generic[C]):
    """A config with every key set, and the reasons by key for those that were chosen."""

    config: C
    reasons: Mapping[str, Reason]


@dataclass(slots=True)
class Choices(Generic[C]):
    """A config on its way to be resolved: choices are made in order, each sees those before."""

    config: C
    machine: Machine
    reasons: dict[str, Reason] = field(default_factory=dict)

    def settle(self, key: str, value: Any, why: str) -> None:
        """Give ``section.name`` this value, unless the user set it."""
        place, _, name = key.partition(".")
        section: Section = getattr(self.config, place)
        if auto_rule(type(section).model_fields[name]) is None:
            raise ValueError(f"{key} is not a key that is chosen")
        if self.is_set(key):
            return
        changed = section.model_copy(update={name: value})
        self.config = self.config.model_copy(update={place: changed})
        self.reasons[key] = Reason(value, why)

    def is_set(self, key: str) -> bool:
        """Whether ``section.name`` needs no choice: the user set it, or it was chosen before."""
        place, _, name = key.partition(".")
        section: Section = getattr(self.config, place)
        return name in section.model_fields_set


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the engines of a command have to do.

    outstanding: completions at once, of all engines; None: many. alone: no learner computes beside
    them. prompt_tokens_set: the user said how long a prompt may be.
    """

    engines: int
    prompt_tokens: int
    outstanding: int | None
    prompt_tokens_set: bool = True
    alone: bool = False


def size_of(model: ModelFacts | None) -> int:
    return 0 if model is None else model.parameters


def millions(count: int) -> str:
    return f"{count / 1e6:.1f} million" if count < 1e7 else f"{count / 1e6:.0f} million"


def counted(number: int, what: str = "worker") -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
