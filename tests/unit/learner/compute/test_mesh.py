"""Which processes do what together; groups of real processes are in rl/test_ranks.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.contracts.errors import UserError
from learner.compute.mesh import ALONE, Mesh, require_heads
from learner.compute.ranks import Ranks


class Planned(Ranks):
    """Ranks that form groups without torch.distributed."""

    def part(self, groups: Any) -> Ranks:
        own = next(list(group) for group in groups if self.rank in group)
        assert sorted(rank for group in groups for rank in group) == list(range(self.size))
        return Ranks(own.index(self.rank), len(own), group=tuple(own))


def test_neighbours_split_rows_and_the_distant_ones_share_the_step() -> None:
    meshes = [Mesh.of(Planned(rank, 4), sequence=2) for rank in range(4)]
    assert [mesh.sequence.group for mesh in meshes] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [mesh.data.group for mesh in meshes] == [(0, 2), (1, 3), (0, 2), (1, 3)]
    assert [mesh.shards.size for mesh in meshes] == [4] * 4
    assert [mesh.first for mesh in meshes] == [True, False, False, False]


def test_alone_and_data_parallel_need_no_groups() -> None:
    assert ALONE.first
    ranks = Ranks(1, 3)
    mesh = Mesh.of(ranks)
    assert mesh.data is mesh.shards is mesh.everyone is ranks
    with pytest.raises(ValueError, match=r"3 processes cannot be split 2 \(tensor\)"):
        Mesh.of(ranks, tensor=2)


def model(heads: int, keys: int) -> Any:
    text = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=keys)
    return SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))


@pytest.mark.parametrize(
    ("heads", "keys", "tensor", "sequence", "words"),
    [
        (8, 2, 4, 1, "8 attention heads and 2 key-value heads, which 4 processes"),
        (6, 2, 2, 2, "3 attention heads on a process, which 2 processes"),
        (12, 4, 1, 6, ""),
        (12, 4, 1, 3, ""),
        (8, 2, 1, 4, ""),
        (8, 8, 2, 4, ""),
        (6, 4, 1, 3, "6 attention heads and 4 key-value heads on a process"),
    ],
)
def test_heads_are_split_evenly_or_refused(
    heads: int, keys: int, tensor: int, sequence: int, words: str
) -> None:
    mesh = Mesh(tensor=Ranks(0, tensor), sequence=Ranks(0, sequence))
    if not words:
        require_heads(model(heads, keys), mesh)
        return
    with pytest.raises(UserError, match=words):
        require_heads(model(heads, keys), mesh)
