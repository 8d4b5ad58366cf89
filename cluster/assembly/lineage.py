"""`accord lineage`: from a model back to the labels it learnt from, every link checked now.

A run's manifest names its parents with the hash that each had when the run began. Each link is
compared with what lies there today. A snapshot's link to its store is checked against the
judgements that the store still holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cluster.assembly.lineage_store import snapshot_link, store_facts
from cluster.contracts.errors import UserError
from cluster.contracts.rows.folders import is_snapshot, read_snapshot
from cluster.runs.artefacts import artefact_hash, model_of

State = Literal["matches", "changed", "gone", "forgotten", "not recorded", "by revision"]
BROKEN: tuple[State, ...] = ("changed", "gone", "forgotten")
Kind = Literal["run", "snapshot", "store", "file", "model", "hub model", "nothing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """``child`` came from ``parent`` in the part of ``role``. ``recorded``: hash or revision when
    the child was made. ``now``: hash of what lies there today."""

    child: str
    role: str
    parent: str
    state: State
    recorded: str | None = None
    now: str | None = None
    detail: str = ""

    @property
    def broken(self) -> bool:
        return self.state in BROKEN


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A run, a snapshot, a store, a file, a model: ``name`` is its path or id."""

    name: str
    kind: Kind
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Lineage:
    """``nodes`` and ``links`` in the order in which they were met, the newest first."""

    nodes: dict[str, Node] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)

    @property
    def broken(self) -> list[Link]:
        return [link for link in self.links if link.broken]

    def of(self, child: str) -> list[Link]:
        return [link for link in self.links if link.child == child]

    def record(self) -> dict[str, Any]:
        return {
            "nodes": [asdict(node) for node in self.nodes.values()],
            "links": [{**asdict(link), "broken": link.broken} for link in self.links],
            "broken": len(self.broken),
        }


def lineage_of(path: Path) -> Lineage:
    """Of a run directory, or of anything in one; of a snapshot. Raises UserError for neither."""
    found = Lineage()
    if is_snapshot(path):
        start = ("snapshot", path)
    elif (run := run_of(path)) is not None:
        start = ("run", run)
    else:
        raise UserError(
            "is neither a run directory nor a snapshot",
            where=str(path),
            fix="give a directory under runs/ made by an accord command, or a snapshot; of a "
            "store, `accord lineage STORE --models` names what learnt from it",
        )
    waiting = [start]
    while waiting:
        kind, place = waiting.pop(0)
        if str(place) in found.nodes:
            continue
        node, links = _read(kind, place)
        found.nodes[node.name] = node
        for link, parent_kind in links:
            found.links.append(link)
            if parent_kind in ("run", "snapshot", "store"):
                waiting.append((parent_kind, Path(link.parent)))
            elif link.parent not in found.nodes:
                found.nodes[link.parent] = Node(name=link.parent, kind=parent_kind)
    return found


def run_of(path: Path) -> Path | None:
    """The innermost run directory that is ``path`` or holds it."""
    return next((p for p in (path, *path.absolute().parents) if manifest_in(p) is not None), None)


def manifest_in(folder: Path) -> dict[str, Any] | None:
    """The manifest of a run; None for another folder, such as a checkpoint."""
    try:
        content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and "command" in content else None


Found = Iterator[tuple[Link, Kind]]


def _read(kind: str, place: Path) -> tuple[Node, Found]:
    name = str(place)
    if kind == "store":
        return Node(name=name, kind="store", facts=store_facts(place)), iter(())
    if kind == "snapshot":
        try:
            manifest = read_snapshot(place)
        except UserError as problem:
            return Node(name=name, kind="snapshot", facts={"problem": problem.what}), iter(())
        return Node(name=name, kind="snapshot", facts=_snapshot_facts(manifest)), _of_snapshot(
            place, manifest
        )
    run = manifest_in(place) or {}
    return Node(name=name, kind="run", facts=_run_facts(run)), _of_run(place, run)


def _run_facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("command", "status", "created", "git_commit", "seed")
    return {key: manifest[key] for key in keys if manifest.get(key) is not None}


def _snapshot_facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    counts = manifest.get("counts", {})
    keys = ("judgements", "prompts", "annotators", "sources", "guidelines", "consents", "licenses")
    gates = manifest.get("gates", [])
    return {
        "sha256": manifest["sha256"],
        "created": manifest.get("created_at"),
        **{key: counts[key] for key in keys if key in counts},
        "gates": {gate["name"]: gate["passed"] for gate in gates},
    }


# -- links -----------------------------------------------------------------------------------------


def _of_run(run: Path, manifest: Mapping[str, Any]) -> Found:
    parents, hashes = manifest.get("parents") or {}, manifest.get("parent_hashes") or {}
    snapshot = manifest.get("snapshot")
    for role, origin in parents.items():
        place = _place_of(str(origin), run)
        if role == "data" and snapshot is not None:
            yield _to_snapshot(run, str(snapshot), place)
        else:
            yield _to_parent(run, role, str(origin), place, hashes.get(role))
    for name, recorded in (manifest.get("outputs") or {}).items():
        state, now = _compared(recorded, run / name)
        if state != "matches":  # what it produced is no longer what it produced
            yield (
                Link(
                    child=str(run), role=f"produced {name}", parent=str(run / name),
                    state=state, recorded=recorded, now=now,
                ),
                "nothing" if state == "gone" else "file",
            )  # fmt: skip
    yield from _copied_from(run, manifest)


def _to_parent(
    run: Path, role: str, origin: str, place: Path | None, recorded: Any
) -> tuple[Link, Kind]:
    known = recorded if isinstance(recorded, str) else None
    if place is None:
        return _to_nothing_here(run, role, origin, known)
    kind, parent, detail = _kind_of(place, run)
    state, now = ("not recorded", None) if known is None else _compared(known, place)
    link = Link(
        child=str(run), role=role, parent=str(parent), state=state,
        recorded=known, now=now, detail=detail,
    )  # fmt: skip
    return link, kind


def _to_nothing_here(run: Path, role: str, origin: str, known: str | None) -> tuple[Link, Kind]:
    state: State = "gone"
    if known is not None and known.startswith(f"{origin}@"):
        state, origin = "by revision", known
    elif known is None and not _names_a_path(origin):
        state = "not recorded"
    kind: Kind = "nothing" if state == "gone" else "hub model"
    return Link(child=str(run), role=role, parent=origin, state=state, recorded=known), kind


def _kind_of(place: Path, run: Path) -> tuple[Kind, Path, str]:
    """What lies at a parent's place: its kind, its node, and what else to say of the link."""
    owner = run_of(place)
    if is_snapshot(place):
        return "snapshot", place, ""
    if place.suffix == ".db":
        return "store", place, "a store grows"
    if owner is not None and owner.absolute() not in (run.absolute(), *run.absolute().parents):
        inside = place.absolute().relative_to(owner.absolute()).as_posix()
        return "run", owner, "" if inside == "." else inside
    return ("model" if place.is_dir() else "file"), place, ""


def _to_snapshot(run: Path, recorded: str, data: Path | None) -> tuple[Link, Kind]:
    """The snapshot that a run learnt from: in the run itself if it was given a store."""
    own = run / "snapshot"
    place = own if own.exists() else data
    role = "labels"
    if place is None or not is_snapshot(place):
        where = str(own if data is not None and data.suffix == ".db" else data or "not known")
        link = Link(child=str(run), role=role, parent=where, state="gone", recorded=recorded)
        return link, "nothing"
    try:
        now, detail = str(read_snapshot(place)["sha256"]), ""
    except UserError as problem:
        now, detail = "", problem.what
    state: State = "matches" if now == recorded else "changed"
    return (
        Link(
            child=str(run), role=role, parent=str(place), state=state,
            recorded=recorded, now=now or None, detail=detail,
        ),
        "snapshot",
    )  # fmt: skip


def _of_snapshot(place: Path, manifest: Mapping[str, Any]) -> Found:
    parents = manifest.get("parents", {})
    origin = str(parents.get("store", ""))
    store = _place_of(origin, place)
    if store is None:
        yield Link(child=str(place), role="store", parent=origin, state="gone"), "nothing"
        return
    state, detail = snapshot_link(
        store, str(manifest["sha256"]), str(parents.get("judgements_sha256"))
    )
    yield (
        Link(child=str(place), role="store", parent=str(store), state=state, detail=detail),
        "store",
    )


def _copied_from(run: Path, manifest: Mapping[str, Any]) -> Found:
    """A run of several stages, such as a pipeline, holds a copy of what one of them trained."""
    made = {name: value for name, value in (manifest.get("outputs") or {}).items() if value}
    for path in sorted(run.rglob("manifest.json")):
        stage = manifest_in(path.parent)
        if stage is None or path.parent == run:
            continue
        for name in ("policy", "reward_model"):
            value = (stage.get("outputs") or {}).get(name)
            if value is not None and value == made.get(name):
                link = Link(
                    child=str(run), role=name, parent=str(path.parent), state="matches",
                    recorded=value, now=value, detail=name,
                )  # fmt: skip
                yield link, "run"


def _compared(recorded: str, place: Path) -> tuple[State, str | None]:
    try:
        now = artefact_hash(model_of(place))
    except OSError:
        return "gone", None
    return ("matches" if now == recorded else "changed"), now


def _place_of(origin: str, near: Path) -> Path | None:
    """Where a parent lies: as the manifest says it; for a relative path, seen from a folder above
    ``near``; or at its place in a run around ``near`` that was moved as a whole. None where there
    is nothing."""
    try:
        path, around = Path(origin).expanduser(), (near.absolute(), *near.absolute().parents)
        places = [path, *(folder / path for folder in around[1:])]
        for folder in around:
            name = (manifest_in(folder) or {}).get("name")
            if name in path.parts[:-1]:
                last = len(path.parts) - 1 - path.parts[::-1].index(name)
                places.append(folder.joinpath(*path.parts[last + 1 :]))
        return next((p for p in places if origin and p.exists()), None)
    except (OSError, ValueError, RuntimeError):
        return None


def _names_a_path(origin: str) -> bool:
    """Hub ids are NAME or OWNER/NAME."""
    return origin.startswith(("/", ".", "~")) or origin.count("/") > 1 or bool(Path(origin).suffix)
