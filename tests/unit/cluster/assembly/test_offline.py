"""Which rows of a store or snapshot an offline run learns from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.assembly.offline import with_pairs
from cluster.contracts.config.offline import DpoConfig, RewardModelConfig
from cluster.contracts.config.preferences import SnapshotConfig
from cluster.runs.run import Run
from learner.offline.datasets import read_rankings
from reward_service.preferences.records import Candidate, Item, Judgement
from reward_service.preferences.snapshot import write_snapshot
from reward_service.preferences.store import PreferenceStore

WHEN = "2026-01-02T03:04:05+00:00"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two pairs and a tie."""
    made = PreferenceStore(tmp_path / "p.db")
    ranks = [(1, 2), (2, 1), (1, 1)]
    for n, places in enumerate(ranks):
        item = Item(
            id=f"i{n}", messages=({"role": "user", "content": f"question {n}"},),
            completions=(Candidate(text="yes"), Candidate(text="no")),
            source="s", license="MIT", created_at=WHEN,
        )  # fmt: skip
        judgement = Judgement(
            id=f"j{n}", item_id=item.id, annotator_id="ann", answer="ranking", ranks=places,
            strength=2.0, consent="c1", created_at=WHEN,
        )  # fmt: skip
        made.add([item], [judgement])
    return made.path


def given(kind: Any, data: Path, **keys: Any) -> Any:
    return kind.model_validate({"model": {"path": "m"}, "data": {"path": str(data)}, **keys})


@pytest.mark.parametrize("of", ["store", "snapshot"])
def test_ties_of_a_store_reach_a_reward_model_that_learns_from_ties(
    store: Path, tmp_path: Path, of: str
) -> None:
    data = store
    if of == "snapshot":
        data = tmp_path / "labels"
        write_snapshot(PreferenceStore(store), data, SnapshotConfig(test_fraction=0))
    config = given(RewardModelConfig, data, tie_threshold=0.5, use_margin=True)
    run = Run.create(str(tmp_path), "r", "reward-model", config)
    found = with_pairs(config, run)
    rows = read_rankings(found.data.path, found.data.split, ties=True).items
    assert sorted((row.shape.tie, row.shape.margin) for row in rows) == [
        (False, 2.0), (False, 2.0), (True, None)
    ]  # fmt: skip
    assert json.loads((run.path / "manifest.json").read_text())["snapshot"]


def test_others_get_the_pairs(store: Path, tmp_path: Path) -> None:
    for kind in (RewardModelConfig, DpoConfig):
        config = given(kind, store)
        run = Run.create(str(tmp_path), kind.__name__, "x", config)
        found = with_pairs(config, run)
        assert found.data.split == "train"
        assert len(read_rankings(found.data.path, found.data.split).items) == 2
