"""Which policy a run directory stands for."""

from __future__ import annotations

from pathlib import Path

from cluster.contracts.errors import UserError
from cluster.runs.checkpoints import in_order, step_of


def policy_directory(path: str) -> str:
    """A run directory stands for the policy it produced or, while it trains, for that of its newest
    checkpoint; anything else is taken as it is."""
    run = Path(path)
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


def version_of(policy: str) -> str:
    """`step 40` for the policy of a checkpoint; `the final policy` for a run's result."""
    folder = Path(policy).parent.name
    return f"step {step_of(folder)}" if folder.startswith("step-") else "the final policy"
