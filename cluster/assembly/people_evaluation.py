"""Policies' completions, compared by people: through a preference store and `accord label`.

Each comparison becomes an item of the store, whose completions say who wrote them; annotators are
not told. Nothing else is held while people judge, so the command may also end and go on later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.assembly.contest import Comparison, Written
from cluster.assembly.judged_comparisons import TIE, Judged, Scores
from cluster.assembly.live_labelling import add_new
from cluster.contracts.config.evaluate import EvaluateConfig, PeopleConfig
from cluster.contracts.errors import Resumable
from cluster.runs.console import Reporter
from reward_service.preferences.agreement import agreement
from reward_service.preferences.quality import position_bias, speed
from reward_service.preferences.records import Candidate, Item, Judgement, derived_id, utc_now
from reward_service.preferences.store import PreferenceStore

LOOK_EVERY_S = 2.0
UNANSWERED = ("skip", "flag")
CHOICES: Mapping[str, Scores] = {"a": (1.0, 0.0), "b": (0.0, 1.0), "tie": TIE, "both_bad": TIE}


def judge_by_people(
    config: EvaluateConfig,
    key: str,
    written: Written,
    compared: Sequence[Comparison],
    reporter: Reporter,
    sleep: Callable[[float], None] = time.sleep,
) -> Judged:
    """Equal completions are a tie that nobody is asked about. ``key``: of the evaluation; the same
    evaluation has the same items, and labels that are there count. Raises Resumable with
    ``people.wait = false`` while labels are missing."""
    people = config.people
    assert people is not None
    store = PreferenceStore(people.store)
    items = {
        n: _item(config, key, written, comparison)
        for n, comparison in enumerate(compared)
        if not comparison.equal
    }
    # In an order that tells nothing of who wrote what, and puts no prompt next to itself.
    add_new(store, sorted(items.values(), key=lambda item: item.id))
    answers = _wait(people, store, {item.id for item in items.values()}, reporter, sleep)
    scores: list[Scores | None] = [TIE] * len(compared)
    for n, item in items.items():
        scores[n] = _scores(item, compared[n], answers.get(item.id, ()))
    return Judged(scores, {"judge": "people", "people": _figures(people, items, answers)})


def _item(config: EvaluateConfig, key: str, written: Written, comparison: Comparison) -> Item:
    sides = [(comparison.left, comparison.a), (comparison.right, comparison.b)]
    sampling = {
        "temperature": config.rollout.temperature,
        "max_tokens": config.rollout.max_tokens,
        "seed": config.run.seed,
    }
    candidates = [
        Candidate(
            text=text,
            policy_version=written.names[policy],
            run=config.contestants[written.names[policy]].path,
            sampling=sampling,
        )
        for policy, text in sides
    ]
    # Which one is called "a" follows from a hash, so that it tells nothing.
    ordered = sorted(candidates, key=lambda one: derived_id(comparison.messages, one.text))
    return Item(
        id=derived_id(
            "evaluation", key, comparison.left, comparison.right, comparison.place, comparison.turn
        ),
        messages=comparison.messages,
        completions=tuple(ordered),
        source="accord evaluate",
        license="unknown",
        created_at=utc_now(),
        topic=comparison.category,
    )


Answers = Mapping[str, Sequence[Judgement]]


def _wait(
    people: PeopleConfig,
    store: PreferenceStore,
    wanted: set[str],
    reporter: Reporter,
    sleep: Callable[[float], None],
) -> Answers:
    """The answers to the items, once there are enough of them."""
    answers = _answers(store, wanted)
    done = _settled(answers, people.labels)
    if done == len(wanted):
        return answers
    overlap = f" data.overlap={people.labels}" if people.labels > 1 else ""
    page = f"accord label {people.store}{overlap}"
    if not people.wait:
        raise Resumable(
            f"people have judged {done} of {len(wanted)} pairs; let them go on with `{page}`, and "
            "run the same command again: it samples nothing again"
        )
    reporter.tell(
        f"people are to judge {len(wanted) - done} pairs, in another terminal: {page}\n"
        "Ctrl-C ends this command; the same command goes on later without sampling again."
    )
    with reporter.stage("pairs judged by people", len(wanted)) as stage:
        while done < len(wanted):
            stage.update(done, {})
            sleep(LOOK_EVERY_S)
            answers = _answers(store, wanted)
            done = _settled(answers, people.labels)
        stage.update(done, {})
    return answers


def _answers(store: PreferenceStore, wanted: set[str]) -> Answers:
    found: dict[str, list[Judgement]] = {}
    for judgement in store.judgements():
        if judgement.item_id in wanted:
            found.setdefault(judgement.item_id, []).append(judgement)
    return found


def _settled(answers: Answers, labels: int) -> int:
    """Items with as many answers as are wanted. A skipped or flagged item has been looked at: it
    is not waited for."""
    return sum(len(given) >= labels for given in answers.values())


def _scores(item: Item, comparison: Comparison, answers: Sequence[Judgement]) -> Scores | None:
    """The mean over the annotators; None without a label."""
    given = [CHOICES[answer.choice] for answer in answers if answer.choice in CHOICES]
    if not given:
        return None
    first = sum(score for score, _ in given) / len(given)
    in_order = item.completions[0].text == comparison.a
    return (first, 1 - first) if in_order else (1 - first, first)


def _figures(people: PeopleConfig, items: Mapping[int, Item], answers: Answers) -> dict[str, Any]:
    given = [judgement for own in answers.values() for judgement in own]
    labels = [judgement for judgement in given if judgement.is_label]
    return {
        "store": people.store,
        "items": len(items),
        "labels": len(labels),
        "skips_and_flags": sum(judgement.answer in UNANSWERED for judgement in given),
        "annotators": len({judgement.annotator_id for judgement in labels}),
        "agreement": dict(agreement(labels)),
        "chose_first_shown": position_bias(labels).share,
        "median_s": speed(labels)["median_s"],
    }
