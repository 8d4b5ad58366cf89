"""From a policy back to the labels, and what is said when a link no longer holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from cluster.assembly.lineage import lineage_of
from cluster.assembly.lineage_text import lineage_lines, models_of
from cluster.contracts.config.preferences import SnapshotConfig
from cluster.contracts.errors import UserError
from cluster.runs.artefacts import output_hashes
from cluster.runs.run import Run
from reward_service.preferences.forget import forget
from reward_service.preferences.records import Candidate, Item, Judgement
from reward_service.preferences.snapshot import write_snapshot
from reward_service.preferences.store import PreferenceStore

WHEN = "2026-01-02T03:04:05+00:00"


class Settings(BaseModel):
    seed: int = 3


def store_in(folder: Path) -> PreferenceStore:
    store = PreferenceStore(folder / "p.db")
    items = [
        Item(
            id=f"i{n}",
            messages=({"role": "user", "content": f"question {n}"},),
            completions=(Candidate(text=f"yes {n}", run="runs/sft"), Candidate(text=f"no {n}")),
            source="s",
            license="MIT",
            created_at=WHEN,
        )
        for n in range(6)
    ]
    judgements = [
        Judgement(
            id=f"{who}/{item.id}", item_id=item.id, annotator_id=who, answer="ranking",
            ranks=(1, 2), consent="c1", created_at=WHEN, guideline_version="g1",
        )
        for item in items
        for who in ("alice", "bob")
    ]  # fmt: skip
    store.add(items, judgements)
    return store


def trained(folder: Path, name: str, model: str, **manifest: Any) -> Run:
    run = Run.create(str(folder / "runs"), name, "train", Settings(), **manifest)
    (run.path / model).mkdir()
    (run.path / model / "model.safetensors").write_text(f"weights of {name}")
    run.update_manifest(status="finished", outputs=output_hashes(run.path))
    return run


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """sft ─▶ reward model (from a snapshot of a store) ─▶ policy."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    labels = write_snapshot(store_in(tmp_path), tmp_path / "labels", SnapshotConfig())
    parents = {"model": "org/base", "data": str(rows)}
    sft = trained(tmp_path, "sft", "policy", parents=parents)
    start = str(sft.path / "policy")
    reward = trained(
        tmp_path, "reward", "reward_model", snapshot=labels.sha256,
        parents={"model": start, "data": str(labels.path)},
    )  # fmt: skip
    parents = {"policy": start, "reward/model": str(reward.path / "reward_model")}
    return trained(tmp_path, "policy", "policy", parents=parents).path


def states(policy: Path) -> dict[str, str]:
    return {f"{Path(link.child).name} {link.role}": link.state for link in lineage_of(policy).links}


WHOLE = {
    "policy policy": "matches",
    "policy reward/model": "matches",
    "sft model": "not recorded",
    "sft data": "matches",
    "reward model": "matches",
    "reward labels": "matches",
    "labels store": "matches",
}


def test_from_a_policy_to_the_labels(policy: Path) -> None:
    assert states(policy) == WHOLE
    assert states(policy / "policy") == WHOLE
    found = lineage_of(policy)
    assert not found.broken
    facts = {Path(node.name).name: node.facts for node in found.nodes.values()}
    assert facts["labels"]["consents"] == {"c1": 12}
    assert facts["labels"]["guidelines"] == {"g1": 12}
    assert facts["labels"]["licenses"] == {"MIT": 12}
    assert facts["labels"]["annotators"] == 2
    assert facts["p.db"]["labels"] == 12
    text = "\n".join(lineage_lines(found))
    assert "alice" not in text
    assert text.endswith("7 links, none is broken; 1 not checked, as no hash was recorded")
    assert json.loads(json.dumps(found.record()))["broken"] == 0


@pytest.mark.parametrize(
    ("what", "link", "state"),
    [
        ("rows changed", "sft data", "changed"),
        ("rows gone", "sft data", "gone"),
        ("weights", "policy policy", "changed"),
        ("snapshot gone", "reward labels", "gone"),
        ("snapshot changed", "reward labels", "changed"),
        ("store gone", "labels store", "gone"),
        ("forgotten", "labels store", "forgotten"),
    ],
)
def test_a_link_that_no_longer_holds(policy: Path, what: str, link: str, state: str) -> None:
    root = policy.parents[1]
    if what == "rows changed":
        (root / "rows.jsonl").write_text("{}\n{}\n")
    elif what == "rows gone":
        (root / "rows.jsonl").unlink()
    elif what == "weights":
        (root / "runs" / "sft" / "policy" / "model.safetensors").write_text("others")
    elif what == "snapshot gone":
        shutil.rmtree(root / "labels")
    elif what == "snapshot changed":
        (root / "labels" / "train.parquet").chmod(0o644)
        (root / "labels" / "train.parquet").write_text("other rows")
    elif what == "store gone":
        (root / "p.db").unlink()
    else:
        forget(PreferenceStore(root / "p.db"), "annotator", "bob")
    found = states(policy)
    assert found[link] == state
    lines = lineage_lines(lineage_of(policy))
    assert "links are broken" in lines[-1]
    if what == "forgotten":
        (line,) = [line for line in lines if "FORGOTTEN" in line]
        assert "6 judgements, by annotator" in line
        assert "bob" not in line


def test_runs_that_moved_together_keep_their_links(
    policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = policy.parents[1]
    monkeypatch.chdir(root)
    rows = Path("rows.jsonl")
    moved = trained(root, "again", "policy", parents={"data": str(rows)})
    monkeypatch.chdir("/")
    assert states(moved.path) == {"again data": "matches"}


def test_a_run_that_moved_as_a_whole_keeps_its_links(policy: Path) -> None:
    root = policy.parents[1]
    whole = Run.create(str(root / "runs"), "whole", "pipeline", Settings())
    sft = trained(whole.path.parent, "sft", "policy")
    shutil.move(sft.path, whole.path / "sft")
    (whole.path / "base").mkdir()
    (whole.path / "base" / "model.safetensors").write_text("base")
    parents = {"model": str(whole.path / "base"), "policy": str(whole.path / "sft" / "policy")}
    last = Run.create(str(whole.path), "policy", "train", Settings(), parents=parents)
    assert last.path.is_dir()
    shutil.move(whole.path, root / "elsewhere")
    found = states(root / "elsewhere" / "policy")
    assert found == {"policy model": "matches", "policy policy": "matches"}


def test_a_run_of_stages_leads_to_the_one_whose_model_it_holds(policy: Path) -> None:
    whole = Run.create(str(policy.parents[1]), "whole", "quickstart", Settings())
    shutil.copytree(policy, whole.path / "ppo")
    shutil.copytree(policy / "policy", whole.path / "policy")
    whole.update_manifest(outputs=output_hashes(whole.path))
    found = states(whole.path)
    assert found["whole policy"] == "matches"
    assert found["ppo policy"] == "matches"


def test_which_models_learnt_from_a_store(policy: Path) -> None:
    root = policy.parents[1]
    copy = root / "runs" / "copied"  # names no parent by path, but holds the same weights
    shutil.copytree(policy / "policy", copy / "policy")
    outputs = output_hashes(copy)
    (copy / "manifest.json").write_text(json.dumps({"command": "train", "outputs": outputs}))
    labels = {"sha256": lineage_of(root / "labels").nodes[str(root / "labels")].facts["sha256"]}
    found = models_of(root / "p.db", [root / "runs"])
    names = [str((root / "runs" / name).resolve()) for name in ("copied", "policy", "reward")]
    assert found == [{**labels, "path": str(root / "labels"), "models": names}]
    assert models_of(root / "labels", [root / "runs"]) == found
    with pytest.raises(UserError, match="is neither a snapshot nor a preference store"):
        models_of(root / "rows.jsonl", [])
    with pytest.raises(UserError, match="is neither a run directory nor a snapshot"):
        lineage_of(root / "rows.jsonl")
