"""What Argilla and Label Studio export: a row holds one record with all its annotators' answers.

Both let their users name fields and questions. Completions are the fields whose names end with a
number or a letter (``response1``, ``answer_b``), or ``chosen`` and ``rejected``; the prompt is the
field ``prompt`` or one of its usual names. Answers that were discarded or cancelled are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.contracts.rows.columns import listed
from cluster.contracts.rows.files import BadRow, Columns, kind_of

PROMPT_FIELDS = ("prompt", "instruction", "question", "input", "conversation", "context")
_COMPLETION = re.compile(
    r"(?:response|completion|answer|generation|output|text|candidate)[-_ ]?([1-9a-d])\Z", re.I
)
_TIES = ("tie", "equal", "same", "draw", "both", "both_good")
_ALL_BAD = ("both_bad", "neither", "none", "all_bad", "bad")

Fields = list[tuple[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How one annotator ordered the completions of a row: ``ranks`` from 1 (best), equal for ties;
    empty where ``all_bad``. ``scores``: where the ranks come from scores. ``annotator`` is empty
    where the row names none."""

    ranks: tuple[int, ...] = ()
    all_bad: bool = False
    strength: float | None = None
    scores: tuple[float, ...] = ()
    annotator: str = ""
    rationale: str = ""
    duration_s: float | None = None
    created_at: str = ""


# -- Label Studio ----------------------------------------------------------------------------------


def is_label_studio(columns: Columns) -> bool:
    return isinstance(columns.get("data"), dict) and isinstance(columns.get("annotations"), list)


def label_studio_row(columns: Columns) -> tuple[Any, Fields, tuple[Verdict, ...]]:
    """(prompt, completions by field, verdicts) of a task of Label Studio's JSON export, with the
    tags Pairwise, Ranker and Choices."""
    prompt, completions = _prompt_and_completions(columns["data"], "data")
    verdicts = []
    for number, annotation in enumerate(columns["annotations"], start=1):
        if not isinstance(annotation, dict):
            raise BadRow(f"column 'annotations', entry {number} holds {kind_of(annotation)}")
        if annotation.get("was_cancelled") or not annotation.get("result"):
            continue
        verdicts.append(_label_studio_verdict(annotation, completions, number))
    return prompt, completions, tuple(verdicts)


def _label_studio_verdict(
    annotation: Mapping[str, Any], completions: Fields, number: int
) -> Verdict:
    by = annotation.get("completed_by")
    who = by.get("id") if isinstance(by, dict) else by
    about: dict[str, Any] = {
        "annotator": "" if who is None else f"label-studio-{who}",
        "duration_s": annotation.get("lead_time"),
        "created_at": str(annotation.get("created_at") or ""),
    }
    names = [name for name, _ in completions]
    order: dict[str, Any] | None = None
    rationale = ""
    for result in annotation["result"]:
        value = result.get("value", {}) if isinstance(result, dict) else {}
        if "selected" in value:
            sides = [name.strip() for name in str(result.get("to_name", "")).split(",")]
            left_right = sides if len(sides) == 2 and set(sides) <= set(names) else names[:2]
            place = {"left": 0, "right": 1}.get(str(value["selected"]))
            chosen = "tie" if place is None else left_right[place]
            order = _order(chosen, completions, f"annotations, entry {number}")
        elif isinstance(value.get("ranker"), dict):
            ranked: Any = next(iter(value["ranker"].values()), [])
            order = _order(ranked, completions, f"annotations, entry {number}")
        elif value.get("choices") and order is None:
            order = _order(value["choices"][0], completions, f"annotations, entry {number}")
        elif value.get("text"):
            text = value["text"]
            rationale = " ".join(text) if isinstance(text, list) else str(text)
    if order is None:
        raise BadRow(
            f"column 'annotations', entry {number} holds no comparison",
            "export tasks labelled with Pairwise, Ranker or Choices",
        )
    return Verdict(**order, **about, rationale=rationale)


# -- Argilla ---------------------------------------------------------------------------------------


def is_argilla(columns: Columns) -> bool:
    return _nested(columns) or bool(_flat_answers(columns)) or bool(_old_answers(columns))


def _nested(columns: Columns) -> bool:
    return isinstance(columns.get("fields"), dict) and isinstance(columns.get("responses"), dict)


def _flat_answers(columns: Columns) -> list[str]:
    """Questions of a data set made by Argilla 2: ``NAME.responses`` beside the fields."""
    ends = ".responses"
    return [n.removesuffix(ends) for n in columns if n.endswith(ends) and columns[n] is not None]


def _old_answers(columns: Columns) -> list[str]:
    """Questions of Argilla 1: a column with one {user_id, value, status} per answer."""
    return [
        name
        for name, value in columns.items()
        if isinstance(value, list)
        and value
        and all(isinstance(v, dict) and {"user_id", "value"} <= v.keys() for v in value)
    ]


def argilla_row(columns: Columns) -> tuple[Any, Fields, tuple[Verdict, ...]]:
    """(prompt, completions by field, verdicts) of a record, as Argilla 2's ``to_json`` or
    ``to_datasets``, or Argilla 1 writes it; the question is a label or a ranking."""
    fields = columns["fields"] if _nested(columns) else columns
    prompt, completions = _prompt_and_completions(fields, "fields" if _nested(columns) else "")
    answers = _argilla_answers(columns)
    verdicts = []
    for question, answer in answers:
        order = _order(answer["value"], completions, question)
        who = answer.get("user_id")
        verdicts.append(Verdict(**order, annotator="" if who is None else f"argilla-{who}"))
    return prompt, completions, tuple(verdicts)


def _argilla_answers(columns: Columns) -> list[tuple[str, dict[str, Any]]]:
    """The answers to the question that compares (the first that is no text), not discarded."""
    if _nested(columns):
        questions = columns["responses"]
    elif flat := _flat_answers(columns):
        questions = {name: _joined(columns, name) for name in flat}
    else:
        questions = {name: columns[name] for name in _old_answers(columns)}
    for name, answers in questions.items():
        given = [
            answer
            for answer in answers or []
            if isinstance(answer, dict)
            and answer.get("value") is not None
            and str(answer.get("status") or "submitted") == "submitted"
        ]
        if given and _compares(name, given):
            return [(name, answer) for answer in given]
    return []


def _joined(columns: Columns, name: str) -> list[dict[str, Any]]:
    values = columns[f"{name}.responses"]
    users = columns.get(f"{name}.responses.users") or [None] * len(values)
    status = columns.get(f"{name}.responses.status") or [None] * len(values)
    return [
        {"value": value, "user_id": user, "status": state}
        for value, user, state in zip(values, users, status, strict=False)
    ]


def _compares(name: str, answers: Sequence[Mapping[str, Any]]) -> bool:
    """A label or a ranking, no free text: a text question is known by its name or its spaces."""
    value = answers[0]["value"]
    return isinstance(value, list) or (isinstance(value, str) and " " not in value.strip())


# -- both ------------------------------------------------------------------------------------------


def _prompt_and_completions(fields: Mapping[str, Any], where: str) -> tuple[Any, Fields]:
    prompt = next((fields[name] for name in PROMPT_FIELDS if fields.get(name)), None)
    place = f"column {where!r}" if where else "the row"
    if prompt is None:
        raise BadRow(f"{place} has no field {listed(PROMPT_FIELDS)}", "rename the prompt's field")
    found = sorted(
        (name, value) for name, value in fields.items() if _COMPLETION.search(name) and value
    )
    if not found and {"chosen", "rejected"} <= fields.keys():
        found = [(name, fields[name]) for name in ("chosen", "rejected")]
    if not found and isinstance(fields.get("items"), list):  # Label Studio's List
        found = [
            (str(entry.get("id")), entry.get("body") or entry.get("html") or entry.get("title"))
            for entry in fields["items"]
            if isinstance(entry, dict)
        ]
    if len(found) < 2:
        raise BadRow(
            f"{place} has {len(found)} fields that look like completions",
            "name them response1, response2, ... (or answer1, completion_a, ...)",
        )
    return prompt, found


def _order(value: Any, completions: Fields, where: str) -> dict[str, Any]:
    """``ranks`` or ``all_bad`` of an answer: the name of the preferred field, its number or letter,
    a word for ties or "both bad"; or for a ranking the fields in order, or with a rank each."""
    names = [name for name, _ in completions]
    if isinstance(value, list):
        return {"ranks": _listed_ranks(value, names, where)}
    word = str(value).strip()
    plain = word.lower().replace(" ", "_").replace("-", "_")
    if plain in _TIES:
        return {"ranks": (1,) * len(names)}
    if plain in _ALL_BAD:
        return {"all_bad": True}
    ends = [_end_of(name) for name in names]
    if word in names:
        place = names.index(word)
    elif (end := _end_of(word)) and end in ends:
        place = ends.index(end)
    else:
        raise BadRow(
            f"column {where!r} answers {word[:60]!r}, which names no completion "
            f"({', '.join(names)})",
            "answer with a field's name, its number or letter, tie or both_bad",
        )
    return {"ranks": tuple(1 if n == place else 2 for n in range(len(names)))}


def _end_of(name: str) -> str:
    """response-2 -> 2, answer_b -> 2, B -> 2: completions are numbered from 1 or lettered from a.
    Empty for any other word."""
    word = name.strip().lower()
    found = _COMPLETION.search(word)
    end = found[1].lower() if found else word if len(word) == 1 else ""
    return str("abcd".index(end) + 1) if end and end in "abcd" else end


def _listed_ranks(value: Sequence[Any], names: Sequence[str], where: str) -> tuple[int, ...]:
    ranks: dict[str, int] = {}
    for place, entry in enumerate(value, start=1):
        if isinstance(entry, dict):
            ranks[str(entry.get("value"))] = int(entry.get("rank") or place)
        else:
            ranks[str(entry)] = place
    if set(ranks) != set(names):
        raise BadRow(
            f"column {where!r} ranks {', '.join(sorted(ranks)) or 'nothing'}, but the completions "
            f"are {', '.join(names)}",
            "rank every completion once",
        )
    lowest = sorted(set(ranks.values()))
    return tuple(lowest.index(ranks[name]) + 1 for name in names)
