"""What the report tells of a reward model beyond accuracy and calibration. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from learner.evaluation.run_files import Row, number

# Section of reward_model.json -> its numbers, each with the words of the report.
FIGURES = {
    "length": {
        "correlation": "correlation of score and length",
        "accuracy_chosen_shorter": "accuracy where the better completion is shorter",
        "accuracy_chosen_longer": "accuracy where the better completion is longer",
        "share_chosen_longer": "share of pairs whose better completion is longer",
    },
    "ensemble": {
        "members": "members of the ensemble",
        "disagreement": "standard deviation of members' scores, mean over completions",
        "agreement": "share of pairs that two members order alike",
        "mean_member_accuracy": "accuracy of one member, on average",
    },
    "drift": {
        "shift": "the policy's completions: mean score, in standard deviations above the training "
        "rows",
        "spread": "the policy's completions: standard deviation over that of the training rows",
        "disagreement_ratio": "the policy's completions: members' disagreement over that on the "
        "training rows",
    },
}


@dataclass(frozen=True, slots=True)
class Slice:
    name: str
    pairs: float
    accuracy: float


def reward_figures(reward_model: Row) -> dict[str, float]:
    """`SECTION_KEY` -> number, of those that the run has: for summary.json."""
    found: dict[str, float] = {}
    for section, keys in FIGURES.items():
        record = reward_model.get(section)
        if not isinstance(record, dict):
            continue
        for key in keys:
            value = number(record, key)
            if value is not None:
                found[f"{section}_{key}"] = value
    return found


def reward_rows(reward_model: Row) -> list[tuple[str, float]]:
    """(words, number) for the table of the report."""
    found = reward_figures(reward_model)
    return [
        (words, found[f"{section}_{key}"])
        for section, keys in FIGURES.items()
        for key, words in keys.items()
        if f"{section}_{key}" in found
    ]


def slices(reward_model: Row) -> list[Slice]:
    """Accuracy by slice, where the record is whole."""
    record = reward_model.get("slices")
    found = []
    for name, entry in record.items() if isinstance(record, dict) else ():
        if isinstance(entry, dict):
            pairs, accuracy = number(entry, "pairs"), number(entry, "accuracy")
            if pairs is not None and accuracy is not None:
                found.append(Slice(str(name), pairs, accuracy))
    return found
