"""Which policy a run directory stands for."""

from __future__ import annotations

import json
from pathlib import Path

from cluster.contracts.config.policies import POLICIES
from cluster.contracts.errors import UserError
from cluster.runs.checkpoints import in_order, step_of

ADAPTER_CONFIG = "adapter_config.json"
ADAPTERS = "adapters"
"""Folder of a finished run with several policies: the adapter of each, by its name."""


def policy_directory(path: str) -> str:
    """A run directory stands for the policy it produced or, while it trains, for that of its newest
    checkpoint; anything else is taken as it is."""
    run = Path(path)
    if names := adapter_names(run):
        raise UserError(
            f"is a run of several policies: {', '.join(names)}",
            where=path,
            fix=f"say which one: {run / ADAPTERS / names[0]}, or --adapter {names[0]} where a "
            "command has it",
        )
    if (run / "policy").is_dir():
        return str(run / "policy")
    found = [path / "policy" for path in in_order(run / "checkpoints")]
    if found := [path for path in found if path.is_dir()]:
        return str(found[-1])
    if (run / "manifest.json").is_file():
        raise UserError(
            "is a run without a policy",
            where=path,
            fix="wait for its first checkpoint, or give a run of sft, dpo, train or quickstart",
        )
    return path


def adapter_names(run: Path) -> list[str]:
    """Of the policies of a run that has several, as its result or its newest checkpoint has them;
    else none."""
    checkpoints = reversed(in_order(run / "checkpoints"))
    for place in (run / ADAPTERS, *(path / POLICIES for path in checkpoints)):
        if place.is_dir():
            return sorted(folder.name for folder in place.iterdir())
    return []


def adapter_directory(run: str, name: str) -> str:
    """The folder of a policy's adapter: of the run's result or, while it trains, of its newest
    checkpoint. ``name``: or the path of an adapter on the model ``run``. Raises UserError for a
    name that the run does not have, and for an adapter of another model."""
    root = Path(run)
    if (Path(name).expanduser() / ADAPTER_CONFIG).is_file():
        _require_base(name, run)
        return name
    checkpoints = reversed(in_order(root / "checkpoints"))
    saved = (path / POLICIES / name / "adapter" for path in checkpoints)
    for folder in (root / ADAPTERS / name, *saved):
        if folder.is_dir():
            return str(folder)
    there = ", ".join(adapter_names(root))
    raise UserError(
        f"no adapter {name!r}: it is no folder with adapter_config.json, and "
        + (f"the adapters here are {there}" if there else "there are no adapters here"),
        where=run,
        fix="give one of these names, or the folder of an adapter"
        if there
        else "give the folder of an adapter, or a run with [[policies]]",
    )


def _require_base(adapter: str, model: str) -> None:
    config = json.loads((Path(adapter).expanduser() / ADAPTER_CONFIG).read_text("utf-8"))
    base = str(config.get("base_model_name_or_path"))
    if base != model and Path(base).absolute() != Path(model).absolute():
        raise UserError(
            f"the adapter was trained on {base}, not on {model}",
            where=adapter,
            fix=f"give the model that it was trained on: {base}",
        )


def version_of(policy: str) -> str:
    """`step 40` for the policy of a checkpoint; `the final policy` for a run's result."""
    folder = Path(policy).parent.name
    return f"step {step_of(folder)}" if folder.startswith("step-") else "the final policy"
