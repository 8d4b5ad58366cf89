"""The model card of a run: what the model is, what it came from, how it was trained, how good it
is, and what is not known. From the run's own record and its lineage, checked now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.assembly.cards.data_card import label_limits
from cluster.assembly.cards.markdown import bullets, cell, code, head, license_of, section, table
from cluster.assembly.lineage import Lineage, lineage_of, manifest_in
from cluster.contracts.durable import write_text
from cluster.contracts.errors import UserError
from cluster.contracts.rows.folders import read_snapshot
from cluster.runs.artefacts import MODELS, artefact_hash
from learner.evaluation.labels_panel import Table, label_tables

CARD = "model_card.md"
KIND = {"policy": "text-generation", "reward_model": "text-classification"}
FIGURES = ("evaluation.json", "fit.json", "reward_model.json")


def write_model_card(run: Path) -> Path:
    """Raises UserError for a run without a model."""
    if not any((run / name).is_dir() for name in MODELS):
        raise UserError(
            "has no policy/ and no reward_model/, so there is nothing to describe",
            where=str(run),
            fix="give a finished run of sft, reward-model, dpo, train or pipeline, or a snapshot",
        )
    path = run / CARD
    write_text(path, "\n".join(model_card(run)))
    return path


def model_card(run: Path) -> list[str]:
    manifest, lineage = manifest_in(run) or {}, lineage_of(run)
    model = next(name for name in MODELS if (run / name).is_dir())
    snapshots = _snapshots(lineage)
    evaluations = evaluations_of(run, artefact_hash(run / model))
    name = str(manifest.get("name", run.name))
    said = (
        f"A {model.replace('_', ' ')} that `accord {manifest.get('command')}` made on "
        f"{manifest.get('created', 'a day that is not recorded')}. Written by Accord from the "
        "run's own record; what is not known is said to be not known."
    )
    return [
        *head(_head(model, lineage, snapshots)),
        f"# {cell(name)}", "", said, "",
        *section("Where it came from", _origin(lineage)),
        *[line for place, labels in snapshots.items() for line in _labels(place, labels)],
        *section("Evaluation", _evaluation(evaluations)),
        *section("Training", _training(run, manifest)),
        *section("Known limits", bullets(_limits(manifest, lineage, snapshots, evaluations))),
    ]  # fmt: skip


def _labels(place: str, labels: dict[str, Any]) -> list[str]:
    lines = [line for found in label_tables(labels) for line in table(found)]
    return section(f"Labels in {cell(Path(place).name)}", lines)


def _head(model: str, lineage: Lineage, snapshots: Mapping[str, Any]) -> dict[str, Any]:
    bases = [
        link.parent for link in lineage.links if lineage.nodes[link.parent].kind == "hub model"
    ]
    # The licence of the base model decides, too, and no run records it.
    found: dict[str, Any] = {"license": license_of([])}
    if bases:
        found["base_model"] = sorted({base.partition("@")[0] for base in bases})
    if snapshots:
        found["datasets"] = sorted(Path(place).name for place in snapshots)
    return {
        **found,
        "library_name": "transformers",
        "pipeline_tag": KIND[model],
        "tags": ["accord", "rlhf", model.replace("_", "-")],
    }


def _snapshots(lineage: Lineage) -> dict[str, dict[str, Any]]:
    """Path -> manifest, of the snapshots that can be read."""
    found = {}
    for node in lineage.nodes.values():
        if node.kind == "snapshot" and "problem" not in node.facts:
            found[node.name] = dict(read_snapshot(Path(node.name)))
    return found


def _origin(lineage: Lineage) -> list[str]:
    rows = tuple(
        (
            Path(link.child).name,
            link.role,
            f"{Path(link.parent).name or link.parent}{f', {link.detail}' if link.detail else ''}",
            link.state,
            (link.recorded or "-")[:64],
        )
        for link in lineage.links
    )
    header = ("artefact", "took as", "from", "checked now", "SHA-256 or revision when used")
    return table(Table("Each link of the chain", header, rows)) if rows else []


def evaluations_of(run: Path, model_hash: str) -> list[tuple[str, dict[str, Any]]]:
    """(folder, evaluation.json) of this run and of those beside it that judged this very model."""
    found = []
    for path in sorted({run, *run.parent.glob("*"), *run.parent.glob("*/*")}):
        manifest = manifest_in(path)
        if manifest is None or not (path / "evaluation.json").is_file():
            continue
        judged = (manifest.get("parent_hashes") or {}).get("policy")
        if path == run or judged == model_hash:
            content = json.loads((path / "evaluation.json").read_text(encoding="utf-8"))
            found.append((path.name, content))
    return found


def _evaluation(evaluations: list[tuple[str, dict[str, Any]]]) -> list[str]:
    rows = tuple(
        (
            name,
            str(e.get("judge", "not recorded")),
            f"{e['win_rate']:.1%} ({e['ci_low']:.1%} to {e['ci_high']:.1%})",
            str(e.get("wins")), str(e.get("ties")), str(e.get("losses")),
        )
        for name, e in evaluations
        if all(isinstance(e.get(key), int | float) for key in ("win_rate", "ci_low", "ci_high"))
    )  # fmt: skip
    header = ("evaluation", "judge", "win rate (95 % interval)", "wins", "ties", "losses")
    return table(Table("Against the baseline", header, rows)) if rows else ["Not evaluated."]


def _training(run: Path, manifest: Mapping[str, Any]) -> list[str]:
    versions = {**manifest.get("versions", {}), "python": manifest.get("python", "not recorded")}
    rows = [
        ("commit of Accord", str(manifest.get("git_commit") or "not recorded")),
        ("seed", str(manifest.get("seed", "not recorded"))),
        ("status of the run", str(manifest.get("status"))),
        *((str(name), str(version)) for name, version in versions.items()),
    ]
    fit = _figures(run)
    rows += [(name, f"{value:.4g}") for name, value in fit.items()]
    config = run / "config.toml"
    settings = code(config.read_text(encoding="utf-8")) if config.is_file() else []
    return [*table(Table("The run", ("", ""), tuple(rows))), "All settings:", "", *settings]


def _figures(run: Path) -> dict[str, float]:
    """What an offline run measured on held-out rows at its end."""
    if not (run / "fit.json").is_file():
        return {}
    content = json.loads((run / "fit.json").read_text(encoding="utf-8"))
    return {k: float(v) for k, v in content.get("evaluation", {}).items()}


def _limits(
    manifest: Mapping[str, Any],
    lineage: Lineage,
    snapshots: Mapping[str, Mapping[str, Any]],
    evaluations: list[tuple[str, dict[str, Any]]],
) -> list[str]:
    found = [text for labels in snapshots.values() for text in label_limits(labels)]
    if manifest.get("status") != "finished":
        found.append(f"The run is not finished: its status is {manifest.get('status')}.")
    if not evaluations:
        found.append("No evaluation of this very model was found beside the run.")
    if any(e.get("judge_was_reward") for _, e in evaluations):
        found.append("A judge was also the reward in training, so its win rate proves nothing.")
    if not any(e.get("safety") for _, e in evaluations):
        found.append("Harm and refusals were not measured.")
    found += [
        f"Broken link: {Path(link.child).name}, {link.role}: {link.state}"
        + (f" ({link.detail})." if link.detail else ".")
        for link in lineage.broken
    ]
    unknown = sum(link.state == "not recorded" for link in lineage.links)
    if unknown:
        found.append(f"Not checked, as no hash of them was recorded: {unknown} origins.")
    found.append("The licence of the base model is not recorded.")
    return list(dict.fromkeys(found))
