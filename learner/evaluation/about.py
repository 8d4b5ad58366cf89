"""What a run is: its command, model, data and time, and which files such a run writes. Pure."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

from learner.evaluation.run_files import Row

# Files that only some commands write: their absence elsewhere is nothing missing.
WRITTEN_BY = {
    "evaluation.json": {"evaluate", "quickstart"},
    "samples.jsonl": {"evaluate", "quickstart"},
    "stages.json": {"quickstart"},
    "preferences.json": {"quickstart"},
    "reward_model.json": {"reward-model", "quickstart"},
    "metrics.jsonl": {"train", "sft", "reward-model", "dpo", "quickstart"},
    "events.jsonl": {"train", "quickstart"},
    "pipeline.json": {"pipeline"},
}


def expected(name: str, command: str | None) -> bool:
    """Whether a run of ``command`` has such a file; of an unknown command, it may have any."""
    commands = WRITTEN_BY.get(name)
    known = command in set().union(*WRITTEN_BY.values())
    return commands is None or not known or command in commands


def about(manifest: Row, config: str | None) -> list[tuple[str, str]]:
    """(what, which) in the order a reader asks; what the files do not say is left out."""
    tree = _tree(config)
    parents = manifest.get("parents")
    origin = parents if isinstance(parents, dict) else {}
    found = (
        ("command", _word(manifest, "command")),
        ("status", _word(manifest, "status")),
        ("begun", _word(manifest, "created").replace("T", " ")[:16]),
        ("model", _at(tree, "model", "path") or str(origin.get("model", ""))),
        ("policy", _at(tree, "policy", "path")),
        ("baseline", _at(tree, "baseline", "path")),
        ("data", _at(tree, "data", "prompts") or _at(tree, "data", "path")),
        ("algorithm", _algorithm(tree)),
    )
    return [(what, which) for what, which in found if which]


def _tree(config: str | None) -> Mapping[str, Any]:
    try:
        return tomllib.loads(config or "")
    except (tomllib.TOMLDecodeError, RecursionError):
        return {}


def _word(manifest: Row, key: str) -> str:
    value = manifest.get(key)
    return value if isinstance(value, str) else ""


def _at(tree: Mapping[str, Any], section: str, key: str) -> str:
    table = tree.get(section)
    value = table.get(key) if isinstance(table, dict) else None
    return value if isinstance(value, str) else ""


def _algorithm(tree: Mapping[str, Any]) -> str:
    advantage, loss = _at(tree, "algorithm", "advantage"), _at(tree, "algorithm", "loss")
    return f"{advantage} advantage, {loss} loss" if advantage and loss else advantage
