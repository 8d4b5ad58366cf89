"""Items of a preference store, judged by an AI judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from reward_service.judge.comparing import Pair, Tally, Verdict, verdicts
from reward_service.judge.records import Asker
from reward_service.preferences.records import (
    LETTERS,
    PAIR_RANKS,
    Item,
    Judgement,
    derived_id,
    utc_now,
)

CONSENT = "none: an AI judge"


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeIdentity:
    """Who judges: the model at its place, and the hash of the words that it is asked with. A judge
    that is asked with other words is another annotator."""

    model: str
    place: str
    prompt_sha256: str

    @property
    def annotator_id(self) -> str:
        name = self.model.rstrip("/").rsplit("/", 1)[-1]
        return f"ai-{name}-{derived_id(self.model, self.place, self.prompt_sha256)[:8]}"

    def as_record(self) -> Mapping[str, str]:
        return {
            "model": self.model,
            "place": self.place,
            "prompt_sha256": self.prompt_sha256,
        }


@dataclass(slots=True)
class Unfinished:
    """An item of which some pairs are still to be judged."""

    item: Item
    open: int
    found: dict[tuple[int, int], Verdict] = field(default_factory=dict)


def judgements_of(
    asker: Asker,
    items: Sequence[Item],
    criteria: Callable[[Item], str],
    identity: JudgeIdentity,
    tally: Tally,
    *,
    letter: bool = False,
) -> Iterator[Judgement]:
    """One judgement of each item with two or more completions, as soon as all its pairs are judged.
    ``tally`` counts their verdicts. Raises what ``Asker.ask`` raises."""
    open_pairs = [
        (item, pair) for item in items for pair in combinations(range(len(item.completions)), 2)
    ]
    pairs = [
        Pair(
            messages=item.messages,
            a=item.completions[one].text,
            b=item.completions[other].text,
            criteria=criteria(item),
            label=f"item {item.id}",
        )
        for item, (one, other) in open_pairs
    ]
    waiting = {
        item.id: Unfinished(item, len(item.completions) * (len(item.completions) - 1) // 2)
        for item in items
    }
    for place, verdict in verdicts(asker, pairs, letter=letter):
        item, pair = open_pairs[place]
        tally.add(verdict)
        state = waiting[item.id]
        state.found[pair] = verdict
        if len(state.found) == state.open:
            yield judgement_of(item, state.found, identity, criteria(item))


def judgement_of(
    item: Item,
    found: Mapping[tuple[int, int], Verdict],
    identity: JudgeIdentity,
    criteria: str,
) -> Judgement:
    ordered = sorted(found.items())
    return Judgement(
        id=derived_id(item.id, identity.annotator_id),
        item_id=item.id,
        annotator_id=identity.annotator_id,
        answer="ranking",
        ranks=ranks_of(len(item.completions), {pair: v.choice for pair, v in ordered}),
        consent=CONSENT,
        created_at=utc_now(),
        rationale="\n".join(reason for _, v in ordered for reason in v.reasons if reason),
        criteria={"asked": criteria, "verdicts": [_verdict(pair, v) for pair, v in ordered]},
        source="ai",
        judge=identity.as_record(),
    )


def ranks_of(completions: int, choices: Mapping[tuple[int, int], str]) -> tuple[int, ...]:
    """Places from 1, by Copeland's score: of all pairs, 1 for each that a completion won and 1/2
    for each tie. Verdicts that go round in a circle make a tie. Of two completions: the verdict."""
    if completions == 2:
        return PAIR_RANKS[choices[0, 1]]
    points = [0.0] * completions
    for (one, other), choice in choices.items():
        points[one] += {"a": 1.0, "tie": 0.5, "b": 0.0}[choice]
        points[other] += {"b": 1.0, "tie": 0.5, "a": 0.0}[choice]
    return tuple(1 + sum(other > own for other in points) for own in points)


def _verdict(pair: tuple[int, int], verdict: Verdict) -> dict[str, Any]:
    letters = dict(zip("ab", (LETTERS[place] for place in pair), strict=True))
    return {
        "pair": "".join(letters.values()),
        "first_order": letters.get(verdict.a_first, "tie"),
        "second_order": letters.get(verdict.b_first, "tie"),
    }
