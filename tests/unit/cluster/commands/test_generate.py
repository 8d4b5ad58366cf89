"""`accord generate`: its limits on sampling reach the engine's settings."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from cluster.assembly import generate as assembly
from cluster.assembly.sampling import Sampling
from cluster.commands.generate import generate
from cluster.contracts.errors import UserError
from cluster.contracts.records import Prompt


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Sampling]:
    """What would have been sampled."""
    asked: list[Sampling] = []

    def sample(given: list[Sampling]) -> list[Any]:
        asked.extend(given)
        return [[]]

    prompt = Prompt(id="p", messages=(), token_ids=(1, 2))
    monkeypatch.setattr(assembly, "prompts_for", lambda *args, **keys: [prompt])
    here = contextlib.nullcontext({"started": True, "software": None})
    monkeypatch.setattr(assembly, "sampling_cluster", lambda cluster, rollout: here)
    monkeypatch.setattr("learner.models.hub.pinned", lambda model: model)
    monkeypatch.setattr(assembly, "sample_jobs", sample)
    return asked


def test_limits_become_keys_of_rollout(jobs: list[Sampling], tmp_path: Path) -> None:
    generate(
        "m", "p.jsonl", tmp_path / "out.jsonl", top_p=0.9, min_p=0.1, top_k=7, min_tokens=2,
        stop=["\n", "END"], quiet=True,
    )  # fmt: skip
    rollout = jobs[0].rollout
    assert (rollout.top_p, rollout.min_p, rollout.top_k, rollout.min_tokens) == (0.9, 0.1, 7, 2)
    assert rollout.stop == ("\n", "END")


def test_without_them_there_are_none(jobs: list[Sampling], tmp_path: Path) -> None:
    generate("m", "p.jsonl", tmp_path / "out.jsonl", quiet=True)
    assert not jobs[0].rollout.limits_tokens
    assert jobs[0].rollout.stop == ()


def test_a_limit_that_cannot_be_is_refused(jobs: list[Sampling], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="top_p"):
        generate("m", "p.jsonl", tmp_path / "out.jsonl", top_p=1.5, quiet=True)
