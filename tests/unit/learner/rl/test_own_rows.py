"""Which rows of a step each process has."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from cluster.contracts.errors import Fatal
from learner.compute.ranks import Ranks
from learner.rl.microbatch import Microbatches
from learner.rl.own_rows import OwnRows, deal_rows, deal_units, minibatches
from learner.rl.rollouts import Ragged, RolloutBatch, SampledFrom, read_batch


@pytest.fixture(scope="module")
def batch(world: ModuleType, tiny: Path) -> RolloutBatch:
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    table = world.table_of(world.make_groups(model, groups=6, samples=4, seed=2))
    return read_batch([table], range(6), 4)


def test_every_minibatch_is_shared_about_evenly() -> None:
    draw = np.random.default_rng(0)
    lengths = draw.lognormal(5, 0.7, size=(128, 8))
    # 128 groups of 8 whose rows fall into 4 minibatches of each of 2 epochs.
    where = draw.integers(0, 4, size=(2, 128, 8))
    costs = np.stack(
        [(lengths * (where[e] == m)).sum(axis=1) for e in range(2) for m in range(4)], axis=1
    )
    owner = deal_units(costs, 8)
    loads = np.stack([costs[owner == rank].sum(axis=0) for rank in range(8)])
    unevenness = loads.max(axis=0) / loads.mean(axis=0)
    turns = np.stack([costs[np.arange(128) % 8 == rank].sum(axis=0) for rank in range(8)])
    assert unevenness.max() < 1.2 < (turns.max(axis=0) / turns.mean(axis=0)).max()
    alone = deal_units(costs.sum(axis=1, keepdims=True), 8)
    whole = np.array([costs[alone == rank].sum() for rank in range(8)])
    assert whole.max() < 1.01 * whole.mean()


def test_every_rank_gets_something_and_fewer_groups_than_ranks_are_refused() -> None:
    costs = np.array([[9.0, 0.0], [0.0, 8.0], [7.0, 0.0]])
    assert sorted(deal_units(costs, 3).tolist()) == [0, 1, 2]
    with pytest.raises(Fatal, match="a step of 3 groups cannot be shared by 4"):
        deal_units(costs, 4)


@pytest.mark.parametrize("advantage", ["grpo", "gae"])
def test_rows_are_dealt_once_and_groups_stay_together(
    world: ModuleType, tiny: Path, batch: RolloutBatch, advantage: str
) -> None:
    settings = world.make_settings(
        tiny,
        algorithm={"advantage": advantage},
        learner={"minibatches": 3, "epochs": 2},
        batch={"prompts_per_step": 6, "samples_per_prompt": 4},
    )
    shares = [deal_rows(batch, settings, 5, Ranks(rank, 4)) for rank in range(4)]
    assert all((share.owner == shares[0].owner).all() for share in shares)
    rows = [np.flatnonzero(share.owner == rank) for rank, share in enumerate(shares)]
    for share, held in zip(shares, rows, strict=True):
        own = share.batch
        assert own.group_ids.tolist() == batch.group_ids[held].tolist()
        assert own.scores.tolist() == batch.scores[held].tolist()
        assert own.table.column("sample").to_pylist() == (held % 4).tolist()
        for place, row in enumerate(held):
            assert share.place[row] == place
            for name in ("prompt_ids", "response_ids", "behaviour_logp", "versions"):
                ours, theirs = getattr(own, name).row(place), getattr(batch, name).row(row)
                assert ours.tolist() == theirs.tolist()
    groups = [set(batch.group_ids[held].tolist()) for held in rows]
    assert (sum(map(len, groups)) == 6) == (advantage == "grpo")
    # Every rank runs as many passes, and each row of a minibatch counts on one of them.
    parts = minibatches(settings, 5, len(batch))
    assert len(parts) == 6
    for part in parts:
        made = [Microbatches(share, 24, "cpu").of(part.tolist()) for share in shares]
        assert len({len(micros) for micros in made}) == 1
        counted = [
            int(held[row])
            for held, micros in zip(rows, made, strict=True)
            for micro in micros
            if micro.counts
            for row in micro.rows.tolist()
        ]
        assert sorted(counted) == part.tolist()


def test_sets_of_tokens_go_with_their_rows(batch: RolloutBatch) -> None:
    tokens = batch.response_ids
    count = len(tokens.values)
    sets = SampledFrom(
        set_of=np.arange(count),
        counts=np.ones(count, dtype=np.int64),
        ids=Ragged(tokens.values, np.arange(count + 1)),
    )
    taken = dataclasses.replace(batch, sampled_from=sets).take(np.array([3, 1]))
    assert taken.sampled_from is not None
    found = taken.sampled_from.ids.values[taken.sampled_from.set_of]
    assert found.tolist() == [*tokens.row(3), *tokens.row(1)] == taken.response_ids.values.tolist()
    alone = OwnRows.all_of(batch)
    assert alone.batch is batch
    assert alone.place.tolist() == list(range(24))
