"""Cards say what the record says, and that the rest is not known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.assembly.cards.markdown import cell, code, license_of
from cluster.assembly.cards.model_card import write_model_card
from cluster.assembly.cards.write import write_cards
from cluster.assembly.lineage import lineage_of
from cluster.contracts.config.preferences import PreferencesConfig, SnapshotConfig
from cluster.contracts.errors import UserError
from cluster.contracts.rows.folders import read_snapshot
from tests.unit.cluster.assembly.test_lineage import store_in, trained


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """A policy from a hub model and a snapshot, and an evaluation of it beside."""
    from cluster.assembly.preferences import take_snapshot

    settings = PreferencesConfig(snapshot=SnapshotConfig(test_fraction=0.5))
    labels = take_snapshot(store_in(tmp_path), tmp_path / "labels", settings)
    run = trained(
        tmp_path, "dpo", "policy", snapshot=labels.sha256,
        parents={"model": "org/base", "data": str(labels.path)},
    )  # fmt: skip
    run.update_manifest(parent_hashes={"model": "org/base@c0ffee"})
    outputs = json.loads((run.path / "manifest.json").read_text())["outputs"]
    evaluation(tmp_path / "runs" / "mine", outputs["policy"], 0.75)
    evaluation(tmp_path / "runs" / "anothers", "0" * 64, 0.25)
    return run.path


def evaluation(folder: Path, judged: str, rate: float) -> None:
    folder.mkdir()
    manifest = {"command": "evaluate", "parents": {}, "parent_hashes": {"policy": judged}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = {"win_rate": rate, "ci_low": rate - 0.1, "ci_high": rate + 0.1, "judge": "gold | x"}
    (folder / "evaluation.json").write_text(json.dumps(found))


def head_of(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8").split("---")[1])


def test_the_card_of_a_model(policy: Path) -> None:
    (card,) = write_cards(policy)
    assert card == policy / "model_card.md"
    head = head_of(card)
    assert head["license"] == "unknown"
    assert head["base_model"] == ["org/base"]
    assert head["datasets"] == ["labels"]
    assert head["tags"] == ["accord", "rlhf", "policy"]
    text = card.read_text("utf-8")
    assert "| mine | gold \\| x | 75.0% (65.0% to 85.0%) |" in text
    assert "anothers" not in text, "an evaluation of another model"
    assert "| consents | c1: 12 |" in text
    assert "The licence of the base model is not recorded." in text
    assert "Harm and refusals were not measured." in text
    assert "alice" not in text
    assert not lineage_of(policy).broken, "a card is no part of what it describes"


def test_the_card_of_a_snapshot(policy: Path) -> None:
    labels = policy.parents[1] / "labels"
    (card,) = write_cards(labels)
    assert head_of(card)["license"] == "mit"
    text = card.read_text("utf-8")
    assert "train_rankings.parquet" in text
    assert "| equal labels | 100.0% |" in text
    assert "No quality gate was set." in text
    assert "alice" not in text
    assert read_snapshot(labels)["sha256"]


def test_the_cards_of_all_that_lies_in_a_run(policy: Path) -> None:
    whole = policy.parent
    (whole / "manifest.json").write_text(json.dumps({"command": "pipeline", "name": "runs"}))
    assert write_cards(whole) == [policy / "model_card.md"]
    with pytest.raises(UserError, match="is neither a run directory nor a snapshot"):
        write_cards(policy / "checkpoints")
    assert write_cards(whole / "mine") == []
    with pytest.raises(UserError, match="there is nothing to describe"):
        write_model_card(whole / "mine")


def test_the_text_of_others_stays_text() -> None:
    assert cell("a|b\n<script> [x](y) `c`") == "a\\|b &lt;script> \\[x](y) \\`c\\`"
    assert code("a\n```\nb") == ["````", "a\n```\nb", "````"]


@pytest.mark.parametrize(
    ("names", "found"),
    [(["MIT"], "mit"), (["MIT", "unknown"], "unknown"), ([], "unknown"), (["My own"], "other")],
)
def test_which_licence_stands_in_the_head(names: list[str], found: str) -> None:
    assert license_of(names) == found
