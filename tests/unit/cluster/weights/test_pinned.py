"""Copies through pinned buffers, with stand-ins for what only a GPU has."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cluster.weights.pinned import PinnedCopies


class Event:
    def __init__(self, log: list[str], name: str) -> None:
        self._log, self._name = log, name

    def synchronize(self) -> None:
        self._log.append(self._name)


def test_on_a_cpu_nothing_is_copied() -> None:
    tensor = torch.arange(3)
    ((_, found),) = PinnedCopies(torch.device("cpu")).on_device([("t", tensor)])
    assert found is tensor


def test_two_buffers_take_turns_and_each_waits_for_its_own_copy_before() -> None:
    log: list[str] = []
    sizes: list[int] = []
    made = 0

    def allocate(nbytes: int) -> Tensor:
        sizes.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    def mark(device: torch.device) -> Event:
        nonlocal made
        made += 1
        return Event(log, f"copy {made}")

    with FakeTensorMode(allow_non_fake_inputs=True):
        copies = PinnedCopies(torch.device("cuda", 0), allocate, mark)
        given = [(f"t{i}", torch.ones(i + 1, 4, dtype=torch.bfloat16)) for i in range(4)]
        given.append(("there", torch.ones(2, device="cuda:0")))
        found = dict(copies.on_device(given))
        assert {str(tensor.device) for tensor in found.values()} == {"cuda:0"}
        assert all(found[name].shape == tensor.shape for name, tensor in given)
        assert found["there"] is given[-1][1]
    assert log == ["copy 1", "copy 2"], (
        "the third takes the first's buffer, the fourth the second's"
    )
    assert sizes == [8, 16, 24, 32], "they grow"


def test_the_bytes_are_those_given() -> None:
    copies = PinnedCopies(torch.device("meta"), lambda n: torch.empty(n, dtype=torch.uint8))
    tensor = torch.randn(5, 3).to(torch.bfloat16)
    copies._copy(tensor)
    held = copies._buffers[0]
    assert held is not None
    assert torch.equal(held.view(torch.bfloat16).view(5, 3), tensor)
