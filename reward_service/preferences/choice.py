"""Which pairs of completions are judged next, and why. Pure: completions and scores in, pairs out.

    disagreement   standard deviation, over the members of an ensemble, of r(a) - r(b)
    uncertainty    entropy, in bits, of the mean over members of sigmoid(r(a) - r(b))
    newest         place of the older of both completions' policy versions, 0 for the oldest
    diversity      distance of the texts to the nearest pair chosen before (farthest-point
                   traversal, Gonzalez 1985)
    random         none

Pairs of a prompt share no completion while it has others. Of pairs whose texts are almost the same,
the batch takes one before it takes the others: the best single pairs may all ask the same (Kirsch
et al. 2019, "BatchBALD"). ``spread`` says what "almost the same" is.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cluster.contracts.config.choice import ChoiceConfig
from cluster.contracts.errors import UserError
from cluster.contracts.records import Message
from reward_service.preferences.records import Candidate, ChosenBy, Item, derived_id
from reward_service.preferences.spread import (
    almost_the_same_last,
    farthest_first,
    text_features,
)

MISMATCHED = "mismatched"  # what such a pair was chosen by
CANDIDATES_PER_PAIR = 8  # random pairs of a prompt that diversity compares, per pair it may take

Scores = NDArray[np.float64]
Place = tuple[int, int]  # (group, completion)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionGroup:
    """The completions of one prompt. ``alike``: what it has in common with other prompts, such as
    "topic/price"; a mismatched pair takes its second completion from such a prompt half of the
    time, so that details count."""

    messages: tuple[Message, ...]
    completions: tuple[Candidate, ...]
    topic: str = ""
    alike: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenPair:
    """Two completions to compare as answers to the prompt of ``first``'s group. ``value``: of the
    strategy's measure; None where it has none. ``judgements``: how many annotators are to judge
    the pair."""

    first: Place
    second: Place
    strategy: str
    value: float | None = None
    judgements: int = 1

    @property
    def mismatched(self) -> bool:
        return self.first[0] != self.second[0]


def choose_pairs(
    groups: Sequence[CompletionGroup],
    config: ChoiceConfig,
    seed: int,
    scores: Sequence[Scores] | None = None,
    asked: Collection[str] = (),
) -> list[ChosenPair]:
    """The pairs to judge, the most wanted first; mismatched ones stand at random places.

    scores: of each group [M, K], the unnormalised rewards of its M completions by K members.
    asked: ids of items (``item_of``) that are not asked again.
    Raises UserError where the strategy needs scores that are not there.
    """
    rng = random.Random(f"choice/{seed}")
    total = len(groups) * config.pairs_per_prompt
    total = min(total, config.count) if config.count is not None else total
    wrong = round(total * config.mismatched)
    each = math.ceil(config.pairs_per_prompt * (1 - config.mismatched))
    own = _own_pairs(groups, config, rng, scores, asked, each, total - wrong)
    others = _not_asked(groups, own, _mismatched_pairs(groups, own, wrong, rng), asked)
    places = set(rng.sample(range(len(own) + len(others)), len(others)))
    own_in_order, others_in_order = iter(own), iter(others)
    return [
        _judged_by(config.overlap_share, n, next(others_in_order if n in places else own_in_order))
        for n in range(len(own) + len(others))
    ]


def _not_asked(
    groups: Sequence[CompletionGroup],
    own: Sequence[ChosenPair],
    others: Sequence[ChosenPair],
    asked: Collection[str],
) -> list[ChosenPair]:
    """Those of ``others`` whose item is not among ``asked`` nor ``own``, each item once: several
    prompts may have got the same completion."""
    seen = {*asked, *(item_id(groups, pair) for pair in own)}
    kept = []
    for pair in others:
        if (name := item_id(groups, pair)) not in seen:
            seen.add(name)
            kept.append(pair)
    return kept


def _judged_by(share: float, number: int, pair: ChosenPair) -> ChosenPair:
    """By two annotators for ``share`` of the pairs, evenly spread."""
    twice = math.floor((number + 1) * share + 1e-9) > math.floor(number * share + 1e-9)
    return replace(pair, judgements=2) if twice else pair


# -- pairs of one prompt's completions -------------------------------------------------------------


def _own_pairs(
    groups: Sequence[CompletionGroup],
    config: ChoiceConfig,
    rng: random.Random,
    scores: Sequence[Scores] | None,
    asked: Collection[str],
    each: int,
    most: int,
) -> list[ChosenPair]:
    """At most ``each`` of a prompt and ``most`` in all, the most wanted first."""
    if not most:
        return []
    measure = _measure(groups, config, scores)
    wanted: list[tuple[int, float, float, ChosenPair]] = []
    for number, group in enumerate(groups):
        pairs = [
            (a, b)
            for a, b in _different_texts(group)
            if not asked
            or _item_id(group, *(group.completions[one].text for one in (a, b))) not in asked
        ]
        rng.shuffle(pairs)
        if config.strategy == "diversity":
            kept = each * CANDIDATES_PER_PAIR
        else:
            pairs.sort(key=lambda pair: -measure(number, *pair))  # keeps the order of equal ones
            kept = each
        for turn, (a, b) in enumerate(_apart(pairs, kept)):
            value = None if config.strategy == "random" else measure(number, a, b)
            pair = ChosenPair(
                first=(number, a), second=(number, b), strategy=config.strategy, value=value
            )
            # At random, every prompt comes once before any comes twice.
            rank = turn if config.strategy == "random" else 0
            wanted.append((rank, -(value or 0.0), rng.random(), pair))
    wanted.sort(key=lambda entry: entry[:3])
    ordered = [entry[3] for entry in wanted]
    if config.strategy == "random":
        return ordered[:most]
    features = text_features([_whole_text(groups, pair) for pair in ordered])
    if config.strategy == "diversity":
        of_prompt = [pair.first[0] for pair in ordered]
        found = farthest_first(features, of_prompt, each, most)
        return [replace(ordered[n], value=distance) for n, distance in found]
    return [ordered[n] for n in almost_the_same_last(features, most)]


def _whole_text(groups: Sequence[CompletionGroup], pair: ChosenPair) -> str:
    """Prompt and both completions, in an order that does not depend on which is first."""
    prompt = (message["content"] for message in groups[pair.first[0]].messages)
    return " ".join([*prompt, *sorted((_text(groups, pair.first), _text(groups, pair.second)))])


def _different_texts(group: CompletionGroup) -> Iterator[tuple[int, int]]:
    texts = [completion.text for completion in group.completions]
    for a, b in itertools.combinations(range(len(texts)), 2):
        if texts[a] != texts[b]:
            yield a, b


def _apart(pairs: Sequence[tuple[int, int]], most: int) -> list[tuple[int, int]]:
    """The first ``most``, those of completions that stand in none before ahead of the others."""
    used: set[int] = set()
    fresh: list[tuple[int, int]] = []
    again: list[tuple[int, int]] = []
    for pair in pairs:
        if used.isdisjoint(pair):
            fresh.append(pair)
            used.update(pair)
        else:
            again.append(pair)
    return [*fresh, *again][:most]


def _measure(
    groups: Sequence[CompletionGroup], config: ChoiceConfig, scores: Sequence[Scores] | None
) -> Callable[[int, int, int], float]:
    """(group, a, b) -> how much the pair is wanted."""
    if config.strategy in ("random", "diversity"):
        return lambda group, a, b: 0.0
    if config.strategy == "newest":
        ages = _ages(groups)
        return lambda group, a, b: min(ages[group][a], ages[group][b])
    _check_scores(groups, config, scores)
    assert scores is not None
    measure = disagreement if config.strategy == "disagreement" else uncertainty
    return lambda group, a, b: measure(scores[group][a] - scores[group][b])


def disagreement(differences: Scores) -> float:
    """Standard deviation over the members of differences [K] in reward."""
    return float(np.std(differences))


def uncertainty(differences: Scores) -> float:
    """Entropy in bits of the members' mean probability that the first is better; differences [K]
    in reward, each a log-odds of the Bradley-Terry model. 1 at even odds."""
    probability = float(np.mean(1 / (1 + np.exp(-np.clip(differences, -500, 500)))))
    parts = (probability, 1 - probability)
    return -sum(p * math.log2(p) for p in parts if p > 0)


def _check_scores(
    groups: Sequence[CompletionGroup], config: ChoiceConfig, scores: Sequence[Scores] | None
) -> None:
    where = f"choice of pairs, strategy {config.strategy!r}"
    if scores is None:
        raise UserError("there are no rewards to choose by", where=where, fix="name a reward_model")
    if [len(one) for one in scores] != [len(group.completions) for group in groups]:
        raise ValueError("scores do not fit the groups")
    if config.strategy == "disagreement" and any(one.shape[1] < 2 for one in scores):
        raise UserError(
            "one reward model cannot disagree with itself",
            where=where,
            fix="train an ensemble (`accord reward-model ... members=4`), or choose uncertainty",
        )


def _ages(groups: Sequence[CompletionGroup]) -> list[list[float]]:
    """Of each completion the place of its policy, 0 for the oldest. Policies are ordered by the
    numbers in the names of run and version, as of "round-2, step 40"; "final" comes after all
    numbers, a completion of no known policy before all others."""
    keys = [[_version_key(completion) for completion in group.completions] for group in groups]
    places = {key: float(n) for n, key in enumerate(sorted({key for own in keys for key in own}))}
    return [[places[key] for key in own] for own in keys]


def _version_key(completion: Candidate) -> tuple[float, ...]:
    if completion.run is None and completion.policy_version is None:
        return (-1.0,)
    name = f"{completion.run or ''} {completion.policy_version or ''}"
    parts = re.findall(r"\d+|\bfinal\b", name)
    return tuple(math.inf if part == "final" else float(part) for part in parts)


# -- pairs of completions of two prompts -----------------------------------------------------------


def _mismatched_pairs(
    groups: Sequence[CompletionGroup], own: Sequence[ChosenPair], count: int, rng: random.Random
) -> list[ChosenPair]:
    """``count`` of them, every prompt once before any comes twice. Within one prompt nearly every
    completion is about the question, so comparisons among them hardly teach a reward model to read
    it: it then pays for any pleasant completion, and the policy finds that out (Liu et al. 2024,
    "RRM: Robust Reward Model Training")."""
    if len(groups) < 2:
        return []
    alike: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        for name in group.alike:
            alike.setdefault(name, []).append(number)
    unused = _unused(groups, own, rng)
    chosen: list[ChosenPair] = []
    order: list[int] = []
    for turn in range(count):
        if not order:
            order = rng.sample(range(len(groups)), len(groups))
        own_number = order.pop()
        names = [name for name in groups[own_number].alike if len(alike[name]) > 1]
        among = alike[rng.choice(names)] if names and turn % 2 == 0 else range(len(groups))
        other = rng.choice([number for number in among if number != own_number])
        first = _next_of(unused, own_number, groups, rng)
        text = _text(groups, first)
        different = [p for p in _places(groups, other) if _text(groups, p) != text]
        if different:
            second = rng.choice(different)
            chosen.append(ChosenPair(first=first, second=second, strategy=MISMATCHED))
    return chosen


def _unused(
    groups: Sequence[CompletionGroup], own: Sequence[ChosenPair], rng: random.Random
) -> list[list[Place]]:
    used = {place for pair in own for place in (pair.first, pair.second)}
    left = [[p for p in _places(groups, n) if p not in used] for n in range(len(groups))]
    for places in left:
        rng.shuffle(places)
    return left


def _next_of(
    unused: list[list[Place]], group: int, groups: Sequence[CompletionGroup], rng: random.Random
) -> Place:
    return unused[group].pop() if unused[group] else rng.choice(_places(groups, group))


def _places(groups: Sequence[CompletionGroup], group: int) -> list[Place]:
    return [(group, number) for number in range(len(groups[group].completions))]


def _text(groups: Sequence[CompletionGroup], place: Place) -> str:
    return groups[place[0]].completions[place[1]].text


# -- records of a store ----------------------------------------------------------------------------


def item_id(groups: Sequence[CompletionGroup], pair: ChosenPair) -> str:
    """The same for the same prompt and texts, whoever chose them and in whichever order."""
    return _item_id(groups[pair.first[0]], _text(groups, pair.first), _text(groups, pair.second))


def _item_id(group: CompletionGroup, *texts: str) -> str:
    ordered = sorted(texts, key=lambda text: derived_id(group.messages, text))
    return derived_id(group.messages, False, *ordered)


def item_of(
    groups: Sequence[CompletionGroup],
    pair: ChosenPair,
    *,
    source: str,
    license: str,
    created_at: str,
) -> Item:
    """The item that asks for the pair. A hash decides which completion it calls "a", so the letter
    tells nothing."""
    group = groups[pair.first[0]]
    sides = [groups[g].completions[c] for g, c in (pair.first, pair.second)]
    sides.sort(key=lambda side: derived_id(group.messages, side.text))
    return Item(
        id=item_id(groups, pair),
        messages=group.messages,
        completions=tuple(sides),
        source=source,
        license=license,
        created_at=created_at,
        topic=group.topic,
        chosen_by=ChosenBy(strategy=pair.strategy, value=pair.value, judgements=pair.judgements),
    )
