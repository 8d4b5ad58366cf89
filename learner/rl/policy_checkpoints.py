"""The checkpoint of a learner of several policies: one of each, below `policies/`.

    policies/NAME/adapter/   the policy's adapter, in peft's layout
    policies/NAME/...        the rest of its state, see `learner.rl.checkpoint`
    trainer.json             what they share: version, and the KL controller of the first

A driver that goes back to a checkpoint writes another version and KL coefficient into the shared
`trainer.json`; these hold for all policies.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.contracts.config.policies import POLICIES
from cluster.contracts.durable import FileDigest, digest_of, sync, write_text
from cluster.contracts.errors import NotSaved, UserError
from learner.compute.ranks import Ranks
from learner.rl.checkpoint import Snapshot, TrainerState, restore_state, snapshot
from learner.trainer_file import TRAINER

SCHEMA = "accord.trainer.policies/1"


@dataclass(slots=True, kw_only=True, eq=False)
class PolicySnapshots:
    """As `Snapshot`, of several policies by name."""

    ranks: Ranks
    parts: Mapping[str, Snapshot]
    shared: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Of this process's share."""
        return sum(part.nbytes for part in self.parts.values())

    def write(self, directory: str | Path) -> tuple[FileDigest, ...]:
        """As `Snapshot.write`."""
        root = Path(directory)
        written = []
        for name, part in self.parts.items():
            place = f"{POLICIES}/{name}"
            files = part.write(root / place)
            written += [replace(file, name=f"{place}/{file.name}") for file in files]
        try:
            if self.ranks.first:
                text = json.dumps(self.shared, indent=2, allow_nan=False) + "\n"
                write_text(root / TRAINER, text)
                written.append(digest_of(root / TRAINER, TRAINER))
            for folder in (root, root / POLICIES):
                sync(folder)
        except OSError as problem:
            raise NotSaved(f"{root}: {problem}") from problem
        return tuple(sorted(written, key=lambda file: file.name))


def snapshot_of(state: TrainerState) -> Snapshot | PolicySnapshots:
    """Copy this process's share of a checkpoint of one policy or of several. Every rank has to call
    this."""
    if not state.policy:
        return snapshot(state)
    parts = {one.policy: snapshot(one) for one in state.each()}
    first = parts[state.policy]
    shared = {
        "schema": SCHEMA,
        "version": state.version,
        "kl": first.trainer["kl"],
        "policies": list(parts),
    }
    return PolicySnapshots(ranks=state.networks.ranks, parts=parts, shared=shared)


def restore(state: TrainerState, directory: str | Path) -> None:
    """Fill `state` with what `snapshot_of` and `write` left. Raises UserError as `restore_state`,
    and for a checkpoint of other policies."""
    root = Path(directory)
    if not state.policy:
        restore_state(state, root)
        return
    shared = _shared(root)
    theirs, ours = shared["policies"], [one.policy for one in state.each()]
    if theirs != ours:
        raise UserError(
            f"the checkpoint is of the policies {', '.join(theirs)}, the settings of "
            f"{', '.join(ours)}",
            where=str(root / TRAINER),
            fix="resume with the [[policies]] that the checkpoint was made with",
        )
    for one in state.each():
        restore_state(one, root / POLICIES / one.policy)
    moved = shared["kl"] != {**shared["kl"], **state.kl.state_dict()}
    for one in state.each():
        one.version = int(shared["version"])
        if moved:  # by a monitor that made the run go back
            kept = {key: value for key, value in shared["kl"].items() if key != "controller"}
            one.kl.load_state_dict(kept)


def _shared(root: Path) -> dict[str, Any]:
    try:
        shared: dict[str, Any] = json.loads((root / TRAINER).read_text(encoding="utf-8"))
        if shared["schema"] != SCHEMA:
            raise ValueError(f"its layout is {shared['schema']!r}, not that of several policies")
        return shared
    except (OSError, KeyError, ValueError) as problem:
        raise UserError(
            f"the checkpoint cannot be read: {problem}",
            where=str(root / TRAINER),
            fix="resume from another checkpoint of this run, with the settings it was made with",
        ) from problem
