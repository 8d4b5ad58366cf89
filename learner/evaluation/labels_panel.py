"""What a run or a card tells of the labels that were learnt from: how many, by whom, under which
terms, and how good. From a snapshot's manifest, of which no part need be there or well formed.
Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from learner.evaluation.page import number_text, percent_text, plain
from learner.evaluation.run_files import Row, number

COUNTS = {
    "judgements": "judgements",
    "prompts": "prompts",
    "annotators": "annotators",
    "sources": "judged by",
    "guidelines": "guideline versions",
    "consents": "consents",
    "licenses": "licences",
    "origins": "origin of the items",
    "writers": "written by",
    "left_out": "left out",
}
MEASURES = {  # of an annotator or a half of the time -> heading
    "agrees_with_others": "agrees with others",
    "gold": "control items right",
    "prefers_first": "prefers the first",
    "prefers_longer": "prefers the longer",
    "undecided": "undecided",
}


@dataclass(frozen=True, slots=True)
class Table:
    """Cells are text; the first one of a row names it."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def label_tables(labels: Row) -> list[Table]:
    """Those tables for which something is known."""
    quality = _part(labels, "quality")
    found = (
        _counts(labels),
        _agreement(quality),
        _gates(labels.get("gates")),
        _annotators(_part(quality, "annotators")),
        _drift(_part(quality, "drift")),
    )
    return [table for table in found if table.rows]


def agreement_words(labels: Row) -> str:
    """Krippendorff's alpha with its interval; "" where it is not known."""
    agreement = _part(_part(labels, "quality"), "agreement")
    alpha = number(agreement, "krippendorff_alpha")
    interval = _interval(agreement.get("krippendorff_alpha_interval"))
    return "" if alpha is None else f"{alpha:.3f}{f' ({interval})' if interval else ''}"


def _counts(labels: Row) -> Table:
    counts = _part(labels, "counts")
    rows = [(words, _listed(counts[key])) for key, words in COUNTS.items() if counts.get(key)]
    if labels.get("created_at"):
        rows.append(("snapshot of", plain(labels["created_at"])))
    if labels.get("sha256"):
        rows.append(("SHA-256 of the snapshot", plain(labels["sha256"])))
    return Table("What was learnt from", ("of the labels", ""), tuple(rows))


def _agreement(quality: Row) -> Table:
    agreement = _part(quality, "agreement")
    rows = []
    for key, words in (
        ("krippendorff_alpha", "Krippendorff's alpha"),
        ("krippendorff_alpha_ordinal", "Krippendorff's alpha, ordinal"),
        ("cohen_kappa", "Cohen's kappa"),
    ):
        if number(agreement, key) is not None:
            interval = _interval(agreement.get(f"{key}_interval"))
            rows.append((words, number_text(agreement[key]), interval))
    if number(agreement, "percent_agreement") is not None:
        rows.append(("equal labels", percent_text(agreement["percent_agreement"]), ""))
    for key, words in (
        ("gold", "control items answered right"),
        ("position_bias", "prefer the completion shown first"),
        ("length_bias", "prefer the longer completion"),
    ):
        share = _part(quality, key)
        if number(share, "share") is not None:
            ends = [share.get("low"), share.get("high")]
            rows.append((words, percent_text(share["share"]), _interval(ends, percent=True)))
    return Table("Quality", ("measure", "value", "95 % interval"), tuple(rows))


def _gates(gates: Any) -> Table:
    rows = [
        (
            plain(gate.get("name")),
            "passed" if gate.get("passed") is True else "not passed",
            plain(gate.get("why")),
        )
        for gate in (gates if isinstance(gates, list) else [])
        if isinstance(gate, dict)
    ]
    return Table("Quality gates", ("gate", "", "measured"), tuple(rows))


def _annotators(annotators: Row) -> Table:
    header = ("annotator", "labels", *MEASURES.values(), "seconds", "reliability", "")
    rows = tuple(
        (
            plain(name),
            number_text(row.get("labels")),
            *(_share(row, key) for key in MEASURES),
            _or_dash(row, "median_s"),
            _or_dash(row, "reliability"),
            "differs from the others" if row.get("differs") is True else "",
        )
        for name, row in annotators.items()
        if isinstance(row, dict)
    )
    return Table("Annotators, by number", header, rows)


def _drift(drift: Row) -> Table:
    halves = [("earlier half", _part(drift, "early")), ("later half", _part(drift, "late"))]
    if not all(half for _, half in halves):
        return Table("", (), ())
    header = ("labels", *MEASURES.values(), "seconds")
    rows = tuple(
        (words, *(_share(half, key) for key in MEASURES), _or_dash(half, "median_s"))
        for words, half in halves
    )
    said = "they differ" if drift.get("drifts") is True else "no significant difference"
    return Table(f"Drift over time: {said}", header, rows)


def _part(tree: Any, key: str) -> Row:
    value = tree.get(key) if isinstance(tree, Mapping) else None
    return value if isinstance(value, dict) else {}


def _listed(value: Any) -> str:
    if not isinstance(value, Mapping):
        return number_text(value)
    return ", ".join(f"{plain(key) or 'not known'}: {number_text(n)}" for key, n in value.items())


def _interval(ends: Any, *, percent: bool = False) -> str:
    if not isinstance(ends, list | tuple) or len(ends) != 2 or None in ends:
        return ""
    text = percent_text if percent else number_text
    return f"{text(ends[0])} to {text(ends[1])}"


def _share(row: Row, key: str) -> str:
    return "-" if number(row, key) is None else percent_text(row[key])


def _or_dash(row: Row, key: str) -> str:
    return "-" if number(row, key) is None else number_text(row[key])
