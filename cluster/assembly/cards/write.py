"""`accord card`: the cards of a run with its stages and snapshots, or of one snapshot."""

from __future__ import annotations

from pathlib import Path

from cluster.assembly.cards.data_card import write_data_card
from cluster.assembly.cards.model_card import write_model_card
from cluster.assembly.lineage import manifest_in
from cluster.contracts.errors import UserError
from cluster.contracts.rows.folders import is_snapshot
from cluster.runs.artefacts import MODELS


def write_cards(place: Path) -> list[Path]:
    """Of a snapshot its data card. Of a run the model card, and both kinds for what lies in it, as
    in a pipeline; none where there is neither. Raises UserError for another folder."""
    if is_snapshot(place):
        return [write_data_card(place)]
    if manifest_in(place) is None:
        raise UserError(
            "is neither a run directory nor a snapshot",
            where=str(place),
            fix="give a directory under runs/ made by an accord command, or a snapshot",
        )
    snapshots = sorted(path.parent for path in place.rglob("snapshot.json"))
    found = [write_data_card(folder) for folder in snapshots]
    inner = sorted(path.parent for path in place.rglob("manifest.json") if path.parent != place)
    runs = [path for path in inner if manifest_in(path) is not None and _has_model(path)]
    found += [write_model_card(run) for run in runs]
    if _has_model(place):
        found.append(write_model_card(place))
    return found


def _has_model(run: Path) -> bool:
    return any((run / name).is_dir() for name in MODELS)
