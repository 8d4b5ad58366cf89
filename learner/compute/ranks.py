"""The processes of one learner, and what they tell each other.

Each process ("rank") reads the whole step and runs its share of the microbatches. Losses carry the
denominator of the whole minibatch, so sums over ranks are the numbers one process would have had.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.contracts.errors import PeerLost
from cluster.contracts.metrics import Metric, merge
from cluster.weights.stores import gloo_listens_on, store_on

T = TypeVar("T")

_BUCKET_BYTES = 1 << 28
"""So much is summed at once: a copy of it is what a sum needs beside the tensors."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of its learner, or among some of them (see `mesh.Mesh`); by default
    it is alone, without torch.distributed.

    Every rank has to make the same calls in the same order. One that waits for the others longer
    than `timeout_s`, or whose peer has died, raises PeerLost.
    group: torch's process group of these; None: all of the learner.
    """

    rank: int = 0
    size: int = 1
    timeout_s: float = 1800.0
    group: Any = field(default=None, compare=False, repr=False)

    @property
    def first(self) -> bool:
        """Whether this is the rank that publishes and writes."""
        return self.rank == 0

    def deal(self, items: Sequence[T], cost: Callable[[T], float]) -> list[tuple[T, bool]]:
        """This rank's share of `items`: pairs (item, whether it counts), as many on every rank.

        Dearest first, forth and back over the ranks, so that what ranks do side by side costs
        about the same. Where `items` do not come out even, the cheapest is repeated without
        counting: with sharded weights every rank has to take part in every pass.
        """
        if self.size == 1 or not items:
            return [(item, True) for item in items]
        ordered = sorted(items, key=lambda item: -cost(item))  # stable
        share = []
        for start in range(0, len(ordered), self.size):
            at = start + (self.rank if start // self.size % 2 == 0 else self.size - 1 - self.rank)
            share.append((ordered[at], True) if at < len(ordered) else (ordered[-1], False))
        return share

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over ranks, the same bits on every rank."""
        if self.size == 1:
            return
        for bucket in _buckets(list(tensors)):
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in bucket])
            with self._named("add up tensors"):
                dist.all_reduce(flat, group=self.group)
            parts = flat.split([tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.detach().copy_(part.view_as(tensor))

    def exchange(self, parts: Tensor) -> Tensor:
        """[size, ...]: part i goes to rank i; returned are, in order of ranks, those meant for this
        one."""
        if self.size == 1:
            return parts
        parts = parts.contiguous()
        found = torch.empty_like(parts)
        with self._named("exchange tensors"):
            dist.all_to_all_single(found, parts, group=self.group)
        return found

    def gather(self, item: T) -> list[T]:
        """What every rank gives, in their order. It travels as a pickle: small things only."""
        if self.size == 1:
            return [item]
        found: list[Any] = [None] * self.size
        with self._named("tell each other something"):
            dist.all_gather_object(found, item, group=self.group)
        return found

    @classmethod
    def along(cls, tensor: Tensor, dim: str) -> Ranks:
        """The ranks over which a DTensor is sharded along one dimension of its mesh."""
        mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
        group = mesh.get_group(dim)
        return cls(mesh.get_local_rank(dim), group.size(), group=group)

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over ranks."""
        total = tensor.clone()
        self.sum_([total])
        return total

    def add_(self, tensor: Tensor) -> None:
        """`sum_` of one tensor."""
        self.sum_([tensor])

    def largest_(self, tensor: Tensor) -> None:
        """Replace a tensor by its element-wise maximum over ranks."""
        if self.size > 1:
            with self._named("compare tensors"):
                dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)

    def joined(self, part: Tensor) -> Tensor:
        """The parts of ranks, of one shape, end to end along the last dimension; no gradient."""
        if self.size == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.size)]
        with self._named("join tensors"):
            dist.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)

    def gather_metrics(self, metrics: Iterable[Metric]) -> list[Metric]:
        """Metrics of all ranks, merged."""
        found = self.gather(list(metrics))
        return list(merge(metric for part in found for metric in part).values())

    def total(self, number: float, device: torch.device) -> float:
        """The sum of a number over ranks."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number, dtype=torch.float64, device=device)
        self.sum_([tensor])
        return float(tensor)

    def from_first(self, value: T) -> T:
        """What the first rank gives as `value`; that of the others does not matter."""
        if self.size == 1:
            return value
        found: list[Any] = [value if self.first else None]
        with self._named("hear the first"):
            dist.broadcast_object_list(found, src=0)
        said: T = found[0]
        return said

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            with self._named("meet"):
                dist.barrier(group=self.group)

    def part(self, groups: Sequence[Sequence[int]]) -> Ranks:
        """This process among those of the group that holds it; ``groups`` are ranks, each in one.
        Every rank has to ask, also one that is alone in its group."""
        own = SINGLE
        for ranks in groups:
            # With a timeout of its own: torch would give a new group half an hour.
            with self._named("form a group"):
                group = dist.new_group(list(ranks), timeout=timedelta(seconds=self.timeout_s))
            if self.rank in ranks:
                own = Ranks(list(ranks).index(self.rank), len(ranks), self.timeout_s, group)
        return own

    def leave(self) -> None:
        """Let go of the others; nothing may be asked of them afterwards."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def _named(self, purpose: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as problem:
            raise PeerLost(
                f"process {self.rank} of the learner's {self.size} could not {purpose} with the "
                f"others (one has ended, or did not come in time): {problem}"
            ) from problem


SINGLE = Ranks()


def meeting_place(host: str, timeout_s: float) -> Any:
    """The store (`port` is its free port) at which ranks find each other; rank 0 keeps it. It
    listens on ``host`` only."""
    return store_on(host, timedelta(seconds=timeout_s))


def join(
    rank: int,
    size: int,
    place: tuple[str, int] | Any,
    *,
    gpu: bool,
    timeout_s: float,
    host: str = "127.0.0.1",
    device: int = 0,
) -> Ranks:
    """Meet the other ranks: over NCCL with a GPU each, over gloo without. ``host``: the address of
    this process's node, the only one that gloo listens on.

    place: the store of `meeting_place` on rank 0, its (host, port) elsewhere. timeout_s: how long
    any later collective may wait. device: the GPU of this process among those that it sees.
    Raises PeerLost when the others do not come.
    """
    wait = timedelta(seconds=timeout_s)
    gloo_listens_on(host)
    try:
        store: Any = place
        if isinstance(place, tuple):
            host, port = place
            store = dist.TCPStore(host, port, is_master=False, timeout=wait)
        if gpu:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if gpu else "gloo", store=store, rank=rank, world_size=size, timeout=wait
        )
        dist.barrier()
    except RuntimeError as problem:
        raise PeerLost(
            f"the learner's {size} processes did not find each other: {problem}"
        ) from None
    return Ranks(rank, size, timeout_s)


_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched_processes() -> int | None:
    """How many processes torchrun (or what else sets its variables) has started, this one among
    them; None where nothing has."""
    return int(os.environ["WORLD_SIZE"]) if all(os.environ.get(n) for n in _LAUNCHED) else None


def join_launched(*, gpu: bool, timeout_s: float) -> Ranks:
    """`join` the processes that torchrun started, on one host or several, by its variables."""
    master, wait = os.environ["MASTER_ADDR"], timedelta(seconds=timeout_s)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((master, 9))  # sends nothing; it finds this host's address towards it
            gloo_listens_on(probe.getsockname()[0])
        if gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if gpu else "gloo", timeout=wait)
        dist.barrier()
    except (OSError, RuntimeError, ValueError) as problem:
        raise PeerLost(
            f"the processes that torchrun started did not find each other: {problem}"
        ) from None
    return Ranks(dist.get_rank(), dist.get_world_size())


def is_sharded(tensor: Tensor) -> bool:
    """Whether each rank holds a part of `tensor` only."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """`tensor`, put together from all ranks if it is sharded (each has to ask for it)."""
    if not is_sharded(tensor):
        return tensor
    full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return full


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype together, up to `_BUCKET_BYTES` (or a single larger one)."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        bucket: list[Tensor] = []
        used = 0
        for tensor in (t for t in tensors if t.dtype == dtype):
            if bucket and used + tensor.nbytes > _BUCKET_BYTES:
                yield bucket
                bucket, used = [], 0
            bucket.append(tensor)
            used += tensor.nbytes
        if bucket:
            yield bucket
