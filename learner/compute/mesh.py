"""Which processes of a learner do what together: data, tensor and sequence parallelism.

Rank r of D x S x T processes has the place (d, s, t) with r = (d * S + s) * T + t, so that the
processes that talk most (tensor, then sequence) are neighbours, on one machine where it holds them.

    data      same s and t: other rows of the step; losses and metrics are summed over them
    sequence  same d and t: other positions of the same rows (`ulysses`)
    tensor    same d and s: other parts of the same weight matrices (`tensor_plan`)
    shards    same t:       data x sequence; gradients are summed over them, and `fully_shard`
                            deals the weights out to them

The processes of one d are a replica: they run the same microbatches and know the same loss.
`PAIRS` of `cluster.contracts.config.parallel_modes` says what goes together, and why the rest does
not; `require_heads` says it of a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from cluster.contracts.errors import UserError
from learner.compute.ranks import SINGLE, Ranks


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mesh:
    """This process's place, as `Ranks` of each kind; see above. everyone: all processes.

    device_mesh: torch's, with the dimensions "shard" and "tensor"; None without tensor parallelism,
    where `fully_shard` takes all processes.
    """

    everyone: Ranks = SINGLE
    data: Ranks = SINGLE
    sequence: Ranks = SINGLE
    tensor: Ranks = SINGLE
    shards: Ranks = SINGLE
    device_mesh: DeviceMesh | None = None

    @classmethod
    def of(
        cls,
        ranks: Ranks,
        *,
        tensor: int = 1,
        sequence: int = 1,
        device: torch.device | str = "cpu",
    ) -> Mesh:
        """The place of this process when `ranks` split matrices `tensor` ways and rows `sequence`
        ways. Every rank has to ask. Raises ValueError where that does not divide them."""
        if tensor < 1 or sequence < 1 or ranks.size % (tensor * sequence):
            raise ValueError(
                f"{ranks.size} processes cannot be split {tensor} (tensor) x {sequence} (sequence)"
            )
        if tensor * sequence == 1:
            return cls(everyone=ranks, data=ranks, shards=ranks)
        places = torch.arange(ranks.size).view(-1, sequence, tensor)
        shards = ranks if tensor == 1 else ranks.part(_lines(places.flatten(0, 1), 0))
        matrices = ranks.part(_lines(places, 2)) if tensor > 1 else SINGLE
        device_mesh = None
        if tensor > 1:
            device_mesh = DeviceMesh.from_group(
                [shards.group, matrices.group],
                torch.device(device).type,
                mesh=places.flatten(0, 1),
                mesh_dim_names=("shard", "tensor"),
            )
        return cls(
            everyone=ranks,
            data=ranks.part(_lines(places, 0)),
            sequence=ranks.part(_lines(places, 1)) if sequence > 1 else SINGLE,
            tensor=matrices,
            shards=shards,
            device_mesh=device_mesh,
        )

    @property
    def first(self) -> bool:
        """Whether this is the process that publishes and writes."""
        return self.everyone.first

    @property
    def shard_devices(self) -> DeviceMesh | None:
        """The mesh for `fully_shard`; None: all processes."""
        return None if self.device_mesh is None else self.device_mesh["shard"]

    @property
    def tensor_devices(self) -> DeviceMesh | None:
        """The mesh of a tensor plan; None without one."""
        return None if self.device_mesh is None else self.device_mesh["tensor"]


ALONE = Mesh()


def _lines(places: Tensor, dim: int) -> list[list[int]]:
    """The ranks along one dimension of the grid of places, for all others fixed."""
    lines: list[list[int]] = places.movedim(dim, -1).flatten(0, -2).tolist()
    return lines


def require_heads(model: Any, mesh: Mesh, section: str = "learner") -> None:
    """Raise UserError for a model whose attention heads `mesh` cannot deal out.

    Tensor parallelism splits heads and key-value heads alike. Sequence parallelism then splits the
    heads that are left, and repeats key-value heads where there are too few. section: of the
    config, for the message.
    """
    if mesh.tensor.size * mesh.sequence.size == 1:
        return
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    tensor, sequence = mesh.tensor.size, mesh.sequence.size
    if heads % tensor or keys % tensor:
        raise UserError(
            f"{type(model).__name__} has {heads} attention heads and {keys} key-value heads, which "
            f"{tensor} processes cannot split evenly",
            where=f"{section}.tensor_parallel",
            fix=f"set it to a divisor of {keys}",
        )
    if (heads // tensor) % sequence:
        raise UserError(
            f"{type(model).__name__} has {heads // tensor} attention heads on a process, which "
            f"{sequence} processes cannot split evenly",
            where=f"{section}.sequence_parallel",
            fix=f"set it to a divisor of {heads // tensor}",
        )
    if heads // tensor % _repeated(keys // tensor, sequence):
        raise UserError(
            f"{type(model).__name__} has {heads // tensor} attention heads and {keys // tensor} "
            f"key-value heads on a process, which {sequence} processes cannot split evenly",
            where=f"{section}.sequence_parallel",
            fix=f"set it to a divisor of {keys // tensor}",
        )


def _repeated(keys: int, sequence: int) -> int:
    """Key-value heads after repeating them until `sequence` divides them."""
    return int(torch.lcm(torch.tensor(keys), torch.tensor(sequence)))
