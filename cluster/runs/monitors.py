"""Alarms raised from the figures of each step: pure, so that a table of numbers tests them.

An alarm begins after ``patience`` steps in a row outside its limit and ends after as many well
inside it (hysteresis: a value that hovers around a limit is one episode, said once).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.contracts.config.monitors import Action, MonitorsConfig
from cluster.runs.monitor_rules import Numbers, Past, Reading, Rule, make_rules

Change = Literal["start", "again", "end"]


@dataclass(frozen=True, slots=True)
class AlarmChange:
    """An alarm that begins, still goes on, or ends at ``step``. ``text``: what is wrong and what to
    do. ``since``: the step up to which all was well: the last within the limit, or that of the
    best mean."""

    alarm: str
    change: Change
    step: int
    value: float
    limit: float
    text: str
    action: Action = "warn"
    since: int = 0


@dataclass(slots=True)
class _Episode:
    on: bool = False
    outside: int = 0
    inside: int = 0
    since: int = 0
    acted: int = 0  # step


class Watch:
    """Feed it every step in order. It keeps what the rules compare a step with."""

    def __init__(self, config: MonitorsConfig, *, samples_per_prompt: int = 2) -> None:
        """``samples_per_prompt``: of one completion nothing is equal or unequal."""
        self._config = config
        self._samples_per_prompt = samples_per_prompt
        self._rules: Sequence[Rule] = ()
        self._episodes: dict[str, _Episode] = {}
        self._past = Past()
        self.begin_anew()

    def begin_anew(self) -> None:
        """The weights are others: nothing of before is compared with, and no alarm is on."""
        config, self._past = self._config, self._past.beginning()
        made = make_rules(config, self._past, self._samples_per_prompt) if config.enabled else ()
        self._rules = made
        self._episodes = {rule.name: _Episode() for rule in made}

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the alarms that are on."""
        return tuple(name for name, episode in self._episodes.items() if episode.on)

    def check(self, step: int, numbers: Numbers) -> list[AlarmChange]:
        """What begins, goes on or ends with the figures of this step. "again" comes of alarms whose
        action is raise_kl, each ``again_after`` steps."""
        changes = []
        self._past.step = step
        for rule in self._rules:
            reading = rule.read(numbers)
            if reading is None or not math.isfinite(reading.severity):
                continue
            change = self._advance(rule, reading, step)
            if change is not None:
                changes.append(self._change(rule, change, step, reading))
        self._past.remember(numbers)
        return changes

    def _change(self, rule: Rule, change: Change, step: int, reading: Reading) -> AlarmChange:
        text = _over(rule.name) if change == "end" else rule.text(reading)
        action: Action = "warn" if change == "end" else self._action(rule)
        since = self._episodes[rule.name].since
        return AlarmChange(
            rule.name, change, step, reading.value, reading.limit, text, action, since
        )

    def _action(self, rule: Rule) -> Action:
        return self._config.acting.get(rule.name, "warn")

    def _advance(self, rule: Rule, reading: Reading, step: int) -> Change | None:
        episode, patience = self._episodes[rule.name], rule.patience or self._config.patience
        if reading.severity > 1 and not episode.outside and not episode.on:
            episode.since = step - 1 if reading.since is None else reading.since
        episode.outside = episode.outside + 1 if reading.severity > 1 else 0
        episode.inside = episode.inside + 1 if reading.severity < rule.calm else 0
        if not episode.on and episode.outside >= patience:
            episode.on, episode.acted = True, step
            return "start"
        if episode.on and episode.inside >= (rule.calm_patience or self._config.patience):
            episode.on = False
            return "end"
        waited = step - episode.acted >= self._config.again_after
        if episode.on and episode.outside and waited and self._action(rule) == "raise_kl":
            episode.acted = step
            return "again"
        return None


def _over(name: str) -> str:
    return f"{name} is over: the figure is back within its limit."
