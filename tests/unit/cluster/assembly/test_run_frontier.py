"""Checkpoints of a run: what they gained, and how far they moved."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.assembly.contest import Written
from cluster.assembly.run_frontier import frontier_of, frontier_rows, kl_to
from cluster.contracts.config.base import ModelConfig
from cluster.contracts.config.evaluate import EvaluateConfig
from cluster.contracts.config.file import dump_toml, load_config
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import UserError
from tests.unit.cluster.assembly.test_contest import rollout


def a_model(folder: Path, seed: int) -> Path:
    from learner.models.tiny import fresh_model, train_tokenizer

    tokenizer = train_tokenizer(["how long does it last"], 300, folder)
    return fresh_model(
        tokenizer, folder, hidden=16, layers=1, heads=2, intermediate=16, seed=seed,
        initializer_range=0.3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two checkpoints: the one of step 5 is the start itself, that of step 10 is another."""
    folder = tmp_path_factory.mktemp("frontier")
    start = a_model(folder / "start", 0)
    tree = {
        "model": {"path": str(start)},
        "data": {"prompts": "p"},
        "reward": {"sources": [{"type": "rules", "max_words": 3, "name": "brief"}]},
    }
    run = folder / "run"
    for step, seed in ((5, 0), (10, 1)):
        a_model(run / "checkpoints" / f"step-{step:06d}" / "policy", seed)
    (run / "checkpoints" / "step-000015").mkdir()  # without a policy
    (run / "config.toml").write_text(dump_toml(TrainConfig.model_validate(tree)))
    return run


def test_every_checkpoint_is_compared_with_the_start(run: Path) -> None:
    found, words = frontier_of(run)
    assert found.steps == {"step 5": 5, "step 10": 10}
    words += ["data.prompts=p", "judge.sources=[{type='rules'}]"]
    config = load_config(EvaluateConfig, None, words)
    assert list(config.contestants) == ["step 5", "step 10", "baseline"]
    assert config.contestants["baseline"].path == str(run.parent / "start")


def test_distance_score_and_reward_of_each(run: Path) -> None:
    found, words = frontier_of(run)
    words += ["data.prompts=p", "judge.sources=[{type='rules'}]"]
    config = load_config(EvaluateConfig, None, words)
    texts = [("one two", "x"), ("one two three four", "y"), ("a", "b")]
    written = Written(
        tuple(config.contestants),
        (tuple(tuple(rollout(f"q{n}", t) for n, t in enumerate(own)) for own in texts),),
    )
    record = {"policies": [{"policy": n, "mean_score": 1.0} for n in config.contestants]}
    rows = frontier_rows(config, found, written, record)
    assert rows["frontier_note"] == ""
    assert [row["step"] for row in rows["frontier"]] == [0, 5, 10]
    start, same, other = rows["frontier"]
    assert (start["kl"], same["kl"], same["distance"]) == (0.0, 0.0, 0.0)
    assert other["kl"] != 0.0
    assert start["reward"] == same["reward"] > other["reward"]


def test_kl_is_the_mean_of_the_log_ratio(run: Path) -> None:
    from learner.models.load import load_policy

    start, other = (
        ModelConfig(path=str(path))
        for path in (run.parent / "start", run / "checkpoints" / "step-000010" / "policy")
    )
    rollouts = [rollout("q", "x")]
    one, _ = kl_to(load_policy(start), other, rollouts)
    back, error = kl_to(load_policy(other), start, rollouts)
    assert one == pytest.approx(-back)  # of the same completion, the ratio the other way round
    assert error == 0.0


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run of `accord train`"):
        frontier_of(tmp_path)
