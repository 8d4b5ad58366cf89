"""Rows split over processes give the numbers and gradients of whole rows, wherever the cut falls,
and so does a vocabulary of which each has a part.

The processes are threads here: what they exchange goes through a list instead of a network. Real
processes are compared in tests/unit/learner/rl/test_ranks.py.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from learner.algorithms.logprobs import VocabularyPart, chunked_linear_logprobs
from learner.algorithms.token_sets import TokenSets
from learner.compute.mesh import Mesh
from learner.compute.ranks import SINGLE, Ranks
from learner.models.heads import SharedValueHead
from learner.models.packed_attention import use_packed_attention
from learner.rl.forward import Networks, policy_outputs
from learner.rl.microbatch import Microbatch, make_microbatch, make_pack, part_of
from learner.rl.rollouts import Ragged, RolloutBatch, SampledFrom

VOCAB = 13
# Every length of prompt and response that a cut into two or four can fall on.
SHAPES = list(itertools.product(range(1, 6), range(1, 7)))


class Threads:
    """What the ranks of one group meet over."""

    def __init__(self, size: int) -> None:
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=120)

    def all(self, rank: int, given: Tensor) -> list[Tensor]:
        self.slots[rank] = given
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found


class ThreadRanks(Ranks):
    """A rank that is a thread; group: the `Threads`."""

    def exchange(self, parts: Tensor) -> Tensor:
        every = self.group.all(self.rank, parts.contiguous())
        return torch.stack([given[self.rank] for given in every])

    def largest_(self, tensor: Tensor) -> None:
        tensor.copy_(torch.stack(self.group.all(self.rank, tensor.clone())).amax(0))

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            tensor.copy_(torch.stack(self.group.all(self.rank, tensor.clone())).sum(0))


def on_ranks(size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What `work` returns on each of `size` ranks."""
    threads = Threads(size)
    ranks = [ThreadRanks(rank, size, group=threads) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(work, one) for one in ranks]
        return [future.result(180) for future in futures]


def ragged(rows: list[list[int]], dtype: Any = np.int32) -> Ragged:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return Ragged(np.array([x for row in rows for x in row], dtype=dtype), offsets)


def make_batch(limited: bool) -> RolloutBatch:
    """One row for each of SHAPES; with `limited`, every token was one of two or three."""
    draw = np.random.default_rng(5)
    prompts = [draw.integers(2, VOCAB, p).tolist() for p, _ in SHAPES]
    answers = [draw.integers(2, VOCAB, n).tolist() for _, n in SHAPES]
    response = ragged(answers)
    sampled = None
    if limited:
        ids = [[token, 0, 1] for token in response.values.tolist()]
        counts = np.full(len(ids), 3)
        sampled = SampledFrom(set_of=np.arange(len(ids)), counts=counts, ids=ragged(ids))
    zeros = ragged([[0] * len(row) for row in answers])
    return RolloutBatch(
        group_ids=np.arange(len(SHAPES)),
        prompt_ids=ragged(prompts),
        response_ids=response,
        behaviour_logp=zeros,
        versions=zeros,
        sampled_from=sampled,
        truncated=np.zeros(len(SHAPES), dtype=bool),
        scores=np.zeros(len(SHAPES)),
        parts={},
        table=SimpleNamespace(),  # type: ignore[arg-type]
    )


def make_networks(heads: int, keys: int, checkpointed: bool, packed: bool) -> Networks:
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=4 * heads,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    model = Qwen2ForCausalLM(config).eval()
    use_packed_attention(model)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    value = SharedValueHead(4 * heads)
    torch.nn.init.normal_(value.linear.weight)
    return Networks(
        policy=model,
        reference=None,
        value=value,
        shared=True,
        compute_dtype="float32",
        device=torch.device("cpu"),
        packed=packed,
    )


def outcome(networks: Networks, whole: Microbatch, ranks: Ranks) -> tuple[dict[str, Tensor], Any]:
    """(numbers by name, gradients of a loss that mixes tokens of a row) of one rank."""
    micro = part_of(whole, ranks)
    out = policy_outputs(
        networks.policy, micro, 0.8, "float32", entropy=True, entropy_gradient=True
    )
    assert out.entropy is not None
    values, after = networks.values(micro, out.hidden)
    weights = torch.sin(torch.arange(out.logp.numel(), dtype=torch.float32)).view_as(out.logp)
    # Products of numbers of different positions: the ratio of a whole completion is such a one.
    loss = (out.logp * weights).sum() + out.logp.sum(1).square().sum() + out.entropy.sum()
    loss = loss + (values * weights).square().sum() + (after * values.sum(1)).sum()
    modules = [networks.policy, networks.value]
    params = [p for module in modules for p in module.parameters()]
    grads = torch.autograd.grad(loss, params)
    numbers = {"logp": out.logp, "entropy": out.entropy, "values": values, "after": after}
    numbers["loss"] = loss
    return {name: tensor.detach() for name, tensor in numbers.items()}, grads


@pytest.mark.parametrize(
    ("size", "heads", "keys", "layout", "checkpointed", "limited"),
    [
        (2, 4, 2, "padded", False, False),
        (2, 4, 1, "padded", True, True),
        (2, 2, 2, "packed", True, False),
        (4, 4, 2, "padded", False, False),
        (3, 6, 2, "packed", False, True),
    ],
)
def test_split_rows_give_the_numbers_and_gradients_of_whole_rows(
    size: int, heads: int, keys: int, layout: str, checkpointed: bool, limited: bool
) -> None:
    packed = layout == "packed"
    batch = make_batch(limited)
    whole = (make_pack if packed else make_microbatch)(batch, range(len(batch)), "cpu")
    wanted, grads = outcome(make_networks(heads, keys, checkpointed, packed), whole, SINGLE)

    # One for each thread, made here: threads would draw from one random generator.
    every = [make_networks(heads, keys, checkpointed, packed) for _ in range(size)]

    def work(ranks: Ranks) -> Any:
        return outcome(every[ranks.rank], whole, ranks)

    found = on_ranks(size, work)
    for numbers, _ in found:
        for name, tensor in wanted.items():
            scale = tensor.abs().max()
            assert (numbers[name] - tensor).abs().max() < 2e-6 * scale, name
    total = [torch.stack(parts).sum(0) for parts in zip(*(part for _, part in found), strict=True)]
    for got, grad in zip(total, grads, strict=True):
        assert (got - grad).abs().max() < 1e-5 * grad.abs().max()
    assert min(grad.abs().max() for grad in grads) > 0


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("limited", [False, True])
def test_parts_of_a_vocabulary_give_the_numbers_of_the_whole(
    size: int, keep: bool, limited: bool
) -> None:
    torch.manual_seed(size)
    hidden, weight, bias = torch.randn(40, 6), 2 * torch.randn(12, 6), torch.randn(12)
    labels = torch.randint(12, (40,))
    sets = None
    if limited:
        ids = torch.stack([labels, (labels + 1) % 12, (labels + 5) % 12], dim=1)
        sets = TokenSets(
            set_of=torch.arange(40),
            keeps=torch.ones(40, dtype=torch.bool),
            offsets=torch.arange(0, 123, 3),
            ids=ids.flatten(),
        )

    def outcome(part: VocabularyPart | None, rows: slice) -> list[Tensor]:
        given = [x.clone().requires_grad_() for x in (hidden, weight[rows], bias[rows])]
        logp, entropy = chunked_linear_logprobs(
            given[0], given[1], labels, 0.7, given[2], 16, True, keep=keep, sets=sets, part=part
        )
        loss = (logp * torch.linspace(-1, 1, 40)).sum() + entropy.square().sum()
        return [logp.detach(), entropy.detach(), *torch.autograd.grad(loss, given)]

    def work(ranks: Ranks) -> list[Tensor]:
        width = 12 // size
        begin = ranks.rank * width
        part = VocabularyPart(start=begin, add=ranks.add_, largest=ranks.largest_)
        return outcome(part, slice(begin, begin + width))

    found, wanted = on_ranks(size, work), outcome(None, slice(None))
    for parts in found:
        for got, number in zip(parts[:3], wanted[:3], strict=True):
            assert (got - number).abs().max() < 2e-6 * number.abs().max()
    for at in (3, 4):
        rows = torch.cat([parts[at] for parts in found])
        assert (rows - wanted[at]).abs().max() < 2e-6 * wanted[at].abs().max()


def test_each_token_belongs_to_one_process() -> None:
    batch = make_batch(limited=False)
    whole = make_microbatch(batch, range(len(batch)), "cpu")
    parts = [part_of(whole, Ranks(rank, 4)) for rank in range(4)]
    targets = torch.cat([part.targets for part in parts])
    assert sorted(targets.tolist()) == sorted(whole.targets.tolist())
    ended = torch.cat([part.ended for part in parts if part.ended is not None])
    assert sorted(ended.tolist()) == list(range(len(batch)))
    # A response that begins at the first position of a part is predicted by the part before.
    width = parts[0].input_ids.shape[1]
    first = [row for row, (p, _) in enumerate(SHAPES) if p == width]
    assert first
    assert all(row * whole.width in parts[0].targets.tolist() for row in first)
    assert part_of(whole, SINGLE) is whole
    assert Mesh().sequence is SINGLE
