"""A lineage in words, and the other direction: which models learnt from a snapshot or a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.assembly.lineage import Lineage, Link
from cluster.assembly.lineage_store import snapshots_of
from cluster.contracts.errors import UserError
from cluster.contracts.rows.folders import is_snapshot, read_snapshot

SHOWN = 12  # characters of a hash


def lineage_lines(lineage: Lineage) -> list[str]:
    """A tree from the newest artefact down; each node is described once."""
    start = next(iter(lineage.nodes))
    lines = [f"{start}  {_described(lineage, start)}", *_below(lineage, start, "", {start})]
    count, broken = len(lineage.links), len(lineage.broken)
    if broken:
        return [*lines, f"{broken} of {count} links are broken"]
    unknown = sum(link.state == "not recorded" for link in lineage.links)
    said = f"; {unknown} not checked, as no hash was recorded" if unknown else ""
    return [*lines, f"{count} links, none is broken{said}"]


def _below(lineage: Lineage, child: str, indent: str, told: set[str]) -> list[str]:
    lines = []
    for link in lineage.of(child):
        new = link.parent not in told
        told.add(link.parent)
        facts = _described(lineage, link.parent) if new else "(see above)"
        lines.append(f"{indent}  {link.role} ← {link.parent}: {_checked(link)}")
        if facts:
            lines.append(f"{indent}      {facts}")
        if new:
            lines += _below(lineage, link.parent, indent + "    ", told)
    return lines


def _checked(link: Link) -> str:
    value = link.recorded if link.recorded and "@" not in link.recorded else None
    parts = [link.state.upper() if link.broken else link.state]
    parts += [f"sha256 {value[:SHOWN]}"] if value else []
    parts += [f"now {link.now[:SHOWN]}"] if link.broken and link.now else []
    parts += [link.detail] if link.detail else []
    return ", ".join(parts)


def _described(lineage: Lineage, name: str) -> str:
    node = lineage.nodes[name]
    facts = dict(node.facts)
    if "problem" in facts:
        return f"{node.kind}: {facts['problem']}"
    if node.kind == "run":
        commit = str(facts.get("git_commit", ""))[:SHOWN]
        said = f"accord {facts.get('command')}, {facts.get('status')}, {facts.get('created')}"
        return said + (f", commit {commit}" if commit else "")
    words = [f"{key} {_value(value)}" for key, value in facts.items() if value not in (None, {})]
    return ", ".join([node.kind, *words] if words else [])


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key or 'not known'}: {_short(entry)}" for key, entry in value.items())
    return _short(value)


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "passed" if value else "not passed"
    text = str(value)
    return text[:SHOWN] if len(text) == 64 else text


# -- the other direction ---------------------------------------------------------------------------


def models_of(path: Path, runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Of a snapshot, or of every snapshot of a store: ``sha256``, ``path``, ``models``."""
    from reward_service.preferences.trained_models import models_trained_on

    if path.suffix == ".db":
        if not path.is_file():
            raise UserError("no such preference store", where=str(path))
        snapshots = snapshots_of(path)
    elif is_snapshot(path):
        snapshots = [{"sha256": str(read_snapshot(path)["sha256"]), "path": str(path)}]
    else:
        raise UserError(
            "is neither a snapshot nor a preference store",
            where=str(path),
            fix="give a folder that `accord preferences snapshot` wrote, or a *.db file",
        )
    return [{**found, "models": models_trained_on([found["sha256"]], runs)} for found in snapshots]


def model_lines(learnt: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for snapshot in learnt:
        lines.append(f"{snapshot['path']}  sha256 {snapshot['sha256'][:SHOWN]}")
        lines += [f"  {model}" for model in snapshot["models"]] or ["  no model learnt from it"]
    return lines or ["no snapshot was made of it, so no model learnt from it"]
