"""The data card of a snapshot: where its labels come from, under which terms, and how good they
are. From its manifest; what that does not say is said to be not known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.assembly.cards.markdown import bullets, head, license_of, section, table
from cluster.contracts.durable import write_text
from cluster.contracts.rows.folders import read_snapshot
from learner.evaluation.labels_panel import Table, label_tables

CARD = "data_card.md"


def write_data_card(snapshot: Path) -> Path:
    """Raises UserError for a snapshot that is damaged."""
    manifest = dict(read_snapshot(snapshot))
    path = snapshot / CARD
    write_text(path, "\n".join(data_card(snapshot.absolute().name, manifest)))
    return path


def data_card(name: str, manifest: Mapping[str, Any]) -> list[str]:
    counts = manifest.get("counts", {})
    licenses = list(counts.get("licenses", {}))
    files = tuple((f["name"], str(f["rows"]), f["sha256"]) for f in manifest.get("files", []))
    listed = Table("Rows and SHA-256", ("file", "rows", "sha256"), files)
    return [
        *head(
            {
                "license": license_of(licenses),
                "pretty_name": name,
                "task_categories": ["reinforcement-learning"],
                "tags": ["accord", "rlhf", "preferences"],
            }
        ),
        f"# {name}",
        "",
        "Judgements of completions: which of several completions of a prompt somebody preferred. "
        "Written by Accord from the snapshot's own record.",
        "",
        *section("Labels", [x for t in label_tables(dict(manifest)) for x in table(t)]),
        *section("Splits", _splits(manifest)),
        *section("Files", table(listed)),
        *section("Known limits", bullets(label_limits(manifest))),
    ]  # fmt: skip


def _splits(manifest: Mapping[str, Any]) -> list[str]:
    split = manifest.get("split", {})
    filters = {k: v for k, v in manifest.get("filters", {}).items() if v}
    return bullets(
        [
            f"Test share: {split.get('test_fraction', 'not known')}, decided by "
            f"{split.get('by', 'what is not known')}; no prompt is in both splits.",
            f"Filters: {filters or 'none'}",
        ]
    )  # fmt: skip


def label_limits(manifest: Mapping[str, Any]) -> list[str]:
    """What a user of the labels should know, from the record alone."""
    counts, quality = manifest.get("counts", {}), manifest.get("quality") or {}
    sources = counts.get("sources", {})
    found = []
    for source, words in (
        ("simulated", "are of simulated annotators, not of people"),
        ("ai", "are of an AI judge, not of people"),
        ("import", "were imported; how they were collected is not recorded"),
    ):
        if sources.get(source):
            found.append(f"{sources[source]} of {counts.get('judgements')} judgements {words}.")
    for key, what in (
        ("consents", "consent"),
        ("guidelines", "guideline"),
        ("licenses", "licence"),
    ):
        unknown = sum(counts.get(key, {}).get(name, 0) for name in ("", "unknown"))
        if key not in counts or unknown:
            found.append(
                f"The {what} is not recorded" + (f" for {unknown} judgements." if unknown else ".")
            )  # fmt: skip
    if (quality.get("agreement") or {}).get("krippendorff_alpha") is None:
        found.append("How far annotators agree is not known: too few items were judged twice.")
    if not manifest.get("gates"):
        found.append("No quality gate was set.")
    return [*found, "Personal data was not looked for when this card was written.",
            "Language and demographics of the annotators are not recorded."]  # fmt: skip
