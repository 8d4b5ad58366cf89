"""Pieces of several processes become a model, block by block; what is missing or wrong is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cluster.contracts.durable import digest_of, digests_below
from cluster.contracts.errors import NotSaved
from learner import pieces
from learner.model_files import LAYOUT, PARTS, STATE, Layout, complete
from learner.pieces import INDEX, FileTable, Piece, Stored, index_text, row_blocks, tensors_in

WHOLE = np.arange(7 * 6, dtype=np.float32).reshape(7, 6)
CUTS = {  # how a 7 x 6 matrix may lie on four processes
    "rows": [((0, 0), (2, 6)), ((2, 0), (2, 6)), ((4, 0), (2, 6)), ((6, 0), (1, 6))],
    "columns": [((0, 0), (7, 2)), ((0, 2), (7, 2)), ((0, 4), (7, 2)), ((0, 6), (7, 0))],
    "both": [((0, 0), (4, 3)), ((0, 3), (4, 3)), ((4, 0), (3, 3)), ((4, 3), (3, 3))],
}


def write_pieces(folder: Path, cut: list[tuple[tuple[int, int], tuple[int, int]]]) -> None:
    """One file for each process, and the index."""
    folder.mkdir(parents=True)
    found = []
    for rank, (at, size) in enumerate(cut):
        part = WHOLE[at[0] : at[0] + size[0], at[1] : at[1] + size[1]]
        tensors = {"w": np.ascontiguousarray(part)}
        if rank == 1:
            tensors["n"] = np.array(5, dtype=np.int64)
        save_file(tensors, folder / f"rank-{rank:05d}.safetensors")
        found.append(Piece(f"rank-{rank:05d}.safetensors", at, size))
    one = Piece("rank-00001.safetensors", (), ())
    index = {"w": Stored("F32", (7, 6), tuple(found)), "n": Stored("I64", (), (one,))}
    (folder / INDEX).write_text(index_text(index))


@pytest.fixture(params=CUTS)
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_pieces(tmp_path / PARTS, CUTS[request.param])
    layout = Layout.of({"model.w": WHOLE.nbytes, "n": 8}, {"model.w": "w", "n": "n"})
    (tmp_path / PARTS / LAYOUT).write_text(layout.text())
    return tmp_path


@pytest.mark.parametrize("chunk", [1, 48, 1 << 20])
def test_pieces_become_the_whole(root: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "CHUNK", chunk)
    index, table = pieces.read_index(root / PARTS), FileTable()
    blocks = list(row_blocks(root / PARTS, "w", index["w"], table))
    # One row where it is larger than a chunk.
    assert max(len(block) for block in blocks) <= max(chunk, 24)
    files = complete(root, digests_below(root))
    assert [file.name for file in files] == ["policy/model.safetensors"]
    assert files == digests_below(root)
    found = load_file(root / "policy" / "model.safetensors")
    assert found.keys() == {"model.w", "n"}
    assert np.array_equal(found["model.w"], WHOLE)
    assert found["n"] == 5


def test_a_process_whose_file_is_missing_leaves_no_checkpoint(root: Path) -> None:
    files = digests_below(root)
    (root / PARTS / "rank-00002.safetensors").unlink()
    with pytest.raises(NotSaved, match=r"rank-00002\.safetensors does not hold the piece of w"):
        complete(root, files)
    assert not (root / "policy").exists()


def test_pieces_of_the_other_tensors_are_looked_at_too(tmp_path: Path) -> None:
    write_pieces(tmp_path / STATE, CUTS["rows"])
    files = digests_below(tmp_path)
    assert complete(tmp_path, files) == files
    path = tmp_path / STATE / "rank-00003.safetensors"
    save_file({"w": np.zeros((2, 6), np.float32)}, path)
    with pytest.raises(NotSaved, match=r"rank-00003\.safetensors does not hold the piece of w"):
        complete(tmp_path, files)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(NotSaved, match="is cut off"):
        complete(tmp_path, files)


def test_files_of_limited_size() -> None:
    sizes = {"a": 6, "b": 5, "c": 5, "d": 30, "e": 1}
    layout = Layout.of(sizes, {name: name.upper() for name in sizes}, limit=10)
    assert [list(names) for names in layout.files.values()] == [["a"], ["b", "c"], ["d"], ["e"]]
    assert list(layout.files)[1] == "model-00002-of-00004.safetensors"
    assert layout.files["model-00003-of-00004.safetensors"] == {"d": "D"}
    assert layout.nbytes == 47


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cut off"),
        (b"\xff" * 16, "cut off"),
        (b"\x02" + b"\0" * 7 + b"[]", "no safetensors"),
        (b"\x02" + b"\0" * 7 + b"{]", "no safetensors"),
    ],
)
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        tensors_in(tmp_path / "x")


def test_what_is_written_is_hashed_as_it_is(tmp_path: Path) -> None:
    entry: Any = pieces.Entry("w", "F32", (7, 6), lambda: [WHOLE[:3], WHOLE[3:]])
    written = pieces.write_tensors(tmp_path / "f", "f", [entry])
    assert written == digest_of(tmp_path / "f", "f")
    assert np.array_equal(load_file(tmp_path / "f")["w"], WHOLE)
    short = pieces.Entry("w", "F32", (7, 6), lambda: [WHOLE[:3]])
    with pytest.raises(ValueError, match="bytes for"):
        pieces.write_tensors(tmp_path / "f", "f", [short])
    assert json.loads(index_text({})) == {}
