"""The hash of an artefact follows its content, and nothing else."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

import cluster.runs.artefacts as artefacts
from cluster.runs.artefacts import artefact_hash


def model(path: Path, weights: bytes = b"weights") -> Path:
    (path / "deep").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(weights)
    (path / "deep" / "config.json").write_text("{}")
    return path


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"rows")
    assert artefact_hash(tmp_path / "rows.jsonl") == hashlib.sha256(b"rows").hexdigest()


def test_the_hash_of_a_folder_follows_names_and_content(tmp_path: Path) -> None:
    first = artefact_hash(model(tmp_path / "a"))
    assert artefact_hash(model(tmp_path / "copy")) == first
    assert artefact_hash(model(tmp_path / "b", b"weightt")) != first
    (tmp_path / "copy" / "deep" / "config.json").rename(tmp_path / "copy" / "config.json")
    assert artefact_hash(tmp_path / "copy") != first


def test_cards_and_hidden_files_are_no_part_of_it(tmp_path: Path) -> None:
    folder = model(tmp_path / "a")
    first = artefact_hash(folder)
    (folder / "model_card.md").write_text("a card")
    (folder / "deep" / "data_card.md").write_text("a card")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").write_text("")
    assert artefact_hash(folder) == first


def test_a_change_of_the_same_size_a_moment_later_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "a"
    for text in ("1", "2", "3"):
        file.write_text(text)
        assert artefact_hash(file) == hashlib.sha256(text.encode()).hexdigest()


def test_a_settled_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights"
    file.write_text("a")
    monkeypatch.setattr(artefacts, "_SETTLED_NS", -(10**18))
    first = artefact_hash(file)
    monkeypatch.setattr(artefacts, "digest_of", None)
    assert artefact_hash(file) == first
    os.utime(file, ns=(0, 0))
    with pytest.raises(TypeError):
        artefact_hash(file)  # another time: read again


def test_nothing_has_no_hash(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        artefact_hash(tmp_path / "gone")


def test_parents_are_known_by_content_hub_models_by_their_commit(tmp_path: Path) -> None:
    run = tmp_path / "sft"
    policy = model(run / "policy")
    (run / "manifest.json").write_text("{}")
    (tmp_path / "labels.db").write_bytes(b"a store grows")
    parents = {
        "model": "org/small",
        "sft": str(run),
        "data": str(tmp_path / "labels.db"),
        "elsewhere": "/nowhere/on/this/host",
    }
    config = {"model": {"path": "org/small", "revision": "c0ffee"}}
    assert artefacts.parent_hashes(parents, artefacts.revisions_in(config)) == {
        "model": "org/small@c0ffee",
        "sft": artefact_hash(policy),
        "data": None,
        "elsewhere": None,
    }
