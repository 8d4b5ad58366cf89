"""Tensors come back bit for bit on any mesh: written by four processes and read by four, two and
one, sharded by rows, by columns, by both, or not at all; moments in 8 bits, too.

This file is also the program that each of the four processes runs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learner.compute.lean_adamw import LeanAdamW
from learner.compute.ranks import SINGLE, join, meeting_place, whole
from learner.compute.stored import (
    StoredTensors,
    copied,
    moments_of,
    plain_groups,
    restore_groups,
    restore_moments,
)
from learner.model_files import STATE, complete

ROOT = Path(__file__).resolve().parents[4]
TIMEOUT_S = 120.0
SHAPES = {"rows": (10, 6), "few": (3,), "long": (256, 64), "one": (1, 4), "count": ()}


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    made["half"] = torch.randn(6, 10, generator=generator).bfloat16()
    made["ids"] = torch.arange(12).reshape(4, 3)
    made["none"] = torch.empty(0, 3)
    return made


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return all(torch.equal(whole(found[name]), tensor) for name, tensor in wanted.items())


def test_one_process_reads_what_it_wrote(tmp_path: Path) -> None:
    given = tensors(1)
    taken = copied(given, SINGLE)
    given["rows"].add_(1.0)  # training goes on
    files = taken.write(tmp_path, STATE)
    assert complete(tmp_path, files) == tuple(sorted(files, key=lambda file: file.name))
    found = {name: torch.zeros_like(tensor) for name, tensor in given.items()}
    with StoredTensors.indexed(tmp_path / STATE) as stored:
        for name, tensor in found.items():
            stored.fill(name, tensor)
        with pytest.raises(ValueError, match=r"rows has shape \[10, 6\], not \[6, 10\]"):
            stored.fill("rows", torch.zeros(6, 10))
        with pytest.raises(ValueError, match="rows is F32, not BF16"):
            stored.fill("rows", torch.zeros(10, 6, dtype=torch.bfloat16))
        with pytest.raises(KeyError):
            stored.fill("other", torch.zeros(1))
    assert same(found, tensors(1))


def test_an_index_that_does_not_cover_a_tensor_is_refused(tmp_path: Path) -> None:
    copied({"rows": torch.ones(4, 2)}, SINGLE).write(tmp_path, STATE)
    path = tmp_path / STATE / "index.json"
    index = json.loads(path.read_text())
    index["rows"]["pieces"] = []
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="rows: pieces of 0 elements for 8"):
        StoredTensors.indexed(tmp_path / STATE)
    index["rows"]["pieces"] = [
        {"file": "../rank-00000.safetensors", "offsets": [0, 0], "sizes": [4, 2], "coded": False}
    ]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is not the name of a file beside the index"):
        StoredTensors.indexed(tmp_path / STATE)


def test_settings_of_groups_are_found_by_the_names_of_parameters(tmp_path: Path) -> None:
    """Another mesh divides parameters into other groups."""
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("a", "b")})
    a, b = (list(model[name].parameters()) for name in ("a", "b"))
    two = torch.optim.AdamW([{"params": a, "lr": 0.5}, {"params": b}], lr=0.25, betas=(0.5, 0.75))
    groups = json.loads(json.dumps(plain_groups(two, named(model))))
    three = torch.optim.AdamW([{"params": b[:1]}, {"params": a}, {"params": b[1:]}], lr=9.0)
    restore_groups(three, groups, named(model))
    assert [group["lr"] for group in three.param_groups] == [0.25, 0.5, 0.25]
    assert three.param_groups[0]["betas"] == (0.5, 0.75)
    with pytest.raises(KeyError, match=r"a\.weight"):
        restore_groups(three, groups[1:], named(model))


@pytest.mark.torchao
def test_moments_in_eight_bits_come_back_as_the_same_codes(tmp_path: Path) -> None:
    model, optimizer = trained(None, None, lean, 2)
    save(tmp_path, model, optimizer, SINGLE)
    fresh, other = trained(None, None, lean, 0)
    load(tmp_path, fresh, other)
    weight, again = model[0].weight, fresh[0].weight
    assert torch.equal(weight, again)
    for key in ("exp_avg", "exp_avg_sq"):
        mine, theirs = optimizer.state[weight][key], other.state[again][key]
        assert type(theirs) is type(mine) is not Tensor
        assert torch.equal(mine.codes, theirs.codes)
        assert torch.equal(mine.scale, theirs.scale)
    assert other.state[again]["step"] == 2


# -- what each of the four processes does ----------------------------------------------------


@dataclass
class Among:
    """A part of the processes, as far as `copied` asks."""

    rank: int
    group: Any
    size: int

    def gather(self, item: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, item, group=self.group)
        return found


class Case:
    """Tensors, zero or dealt out, on one mesh. None: not sharded."""

    def __init__(self, mesh: Any, placements: list[Any] | None) -> None:
        self.mesh, self.placements = mesh, placements

    def deal(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        from torch.distributed.tensor import distribute_tensor

        if self.placements is None:
            return {name: tensor.clone() for name, tensor in given.items()}
        last = max(getattr(where, "dim", 0) for where in self.placements)
        return {
            name: tensor.clone()
            if tensor.ndim <= last
            else distribute_tensor(tensor, self.mesh, self.placements, src_data_rank=None)
            for name, tensor in given.items()
        }


def trained(mesh: Any, tensor_mesh: Any, make: Any, steps: int) -> tuple[Any, Any]:
    """A small model and an optimiser after `steps`; the same numbers on any mesh."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 512), nn.Linear(512, 64))
    if tensor_mesh is not None:
        parallelize_module(model, tensor_mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    if mesh is not None:
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = make(model.parameters())
    for _ in range(steps):
        model(torch.ones(2, 64)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def lean(params: Any) -> LeanAdamW:
    return LeanAdamW([{"params": list(params)}], 0.01, (0.9, 0.95), 1e-8, eight_bits=True)


def named(model: Any) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def save(folder: Path, model: Any, optimizer: Any, ranks: Any) -> None:
    parameters = dict(model.named_parameters())
    taken = copied(parameters | moments_of(optimizer, named(model)), ranks)
    files = taken.write(folder, STATE)
    told = ranks.gather((files, plain_groups(optimizer, named(model))))
    if ranks.rank == 0:
        complete(folder, [file for theirs, _ in told for file in theirs])
        (folder / "groups.json").write_text(json.dumps(told[0][1]))
    ranks.gather(None)


def load(folder: Path, model: Any, optimizer: Any) -> None:
    with StoredTensors.indexed(folder / STATE) as stored:
        for name, parameter in model.named_parameters():
            stored.fill(name, parameter)
        restore_moments(optimizer, stored, named(model))
    restore_groups(optimizer, json.loads((folder / "groups.json").read_text()), named(model))


@torch.no_grad()
def values(model: Any, optimizer: Any) -> dict[str, Tensor]:
    found = dict(model.named_parameters()) | moments_of(optimizer, named(model))
    return {name: whole(tensor) for name, tensor in found.items()}


def plain(tensor: Any) -> Tensor:
    result: Tensor = tensor.dequantize() if hasattr(tensor, "codes") else tensor
    return result.detach()


def check_models(rank: int, ranks: Any, two: Any, folder: Path, make: Any, kind: str) -> list[str]:
    """4 -> 2 -> 1 -> 4 and back to tensor parallelism; what differed."""
    from torch.distributed.device_mesh import init_device_mesh

    wrong = []
    four = init_device_mesh("cpu", (4,))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    starts = {"four": (four, None), "grid": (grid["data"], grid["tensor"])}
    if kind == "adamw8bit":
        del starts["grid"]  # columns begin within a block, and are rounded once more
    for start, meshes in starts.items():
        model, optimizer = trained(*meshes, make, 2)
        wanted = {name: plain(t) for name, t in values(model, optimizer).items()}
        save(folder / f"{kind}-{start}", model, optimizer, ranks)
        source = folder / f"{kind}-{start}"
        for other, (data, tensor, members) in {
            "two": (two[0], None, 2),
            "one": (None, None, 1),
            "four": (four, None, 4),
            "grid": (grid["data"], grid["tensor"], 4),
        }.items():
            if other not in ("two", "one", *starts):
                continue
            if rank < members:
                model, optimizer = trained(data, tensor, make, 0)
                load(source, model, optimizer)
                found = {name: plain(t) for name, t in values(model, optimizer).items()}
                wrong += [
                    f"{kind}: {start} -> {other}: {name}"
                    for name, value in wanted.items()
                    if not torch.equal(found[name], value)
                ]
                if other == "two":
                    save(folder / f"{kind}-{start}-two", model, optimizer, two[1])
            ranks.gather(None)
            if other == "two":
                source = folder / f"{kind}-{start}-two"
    return wrong


def work(rank: int, port: int, folder: Path) -> None:
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    torch.set_num_threads(1)
    ranks = join(rank, 4, ("127.0.0.1", port), gpu=False, timeout_s=TIMEOUT_S)
    pair = torch.distributed.new_group([0, 1])
    two = DeviceMesh.from_group(pair, "cpu") if rank < 2 else None
    grid = init_device_mesh("cpu", (2, 2))
    cases = {
        "rows": Case(init_device_mesh("cpu", (4,)), [Shard(0)]),
        "columns": Case(init_device_mesh("cpu", (4,)), [Shard(1)]),
        "both": Case(grid, [Shard(0), Shard(1)]),
        "kept-twice": Case(grid, [Shard(0), Replicate()]),
        "whole": Case(None, None),
    }
    wrong = []
    for wrote, case in cases.items():
        given = tensors(5)
        taken = copied(case.deal(given), ranks)
        files = [f for theirs in ranks.gather(taken.write(folder / wrote, STATE)) for f in theirs]
        if rank == 0:
            complete(folder / wrote, files)
        ranks.barrier()
        held = sum(ranks.gather(taken.nbytes))
        if held != sum(tensor.nbytes for tensor in given.values()):
            wrong.append(f"{wrote}: {held} bytes were written")
        for read, other in cases.items():
            found = other.deal({name: torch.zeros_like(t) for name, t in given.items()})
            with StoredTensors.indexed(folder / wrote / STATE) as stored:
                for name, tensor in found.items():
                    stored.fill(name, tensor)
            if not same(found, given):
                wrong.append(f"{wrote} -> {read}")
    among = (two, Among(rank, pair, 2))
    made = {"adamw": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True)}
    if importlib.util.find_spec("torchao") is not None:  # an extra of the package
        made["adamw8bit"] = lean
    for kind, make in made.items():
        wrong += check_models(rank, ranks, among, folder, make, kind)
    (folder / f"wrong-{rank}.json").write_text(json.dumps(wrong))
    ranks.barrier()
    ranks.leave()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parallel
def test_any_mesh_reads_what_any_mesh_wrote(tmp_path: Path) -> None:
    store = meeting_place("127.0.0.1", TIMEOUT_S)
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(store.port), str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(4)
    ]
    try:
        assert [process.wait(300) for process in processes] == [0] * 4
    finally:
        for process in processes:
            process.kill()
            process.wait(10)
    for rank in range(4):
        assert json.loads((tmp_path / f"wrong-{rank}.json").read_text()) == []
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors"}


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
