"""The offline loop: exact whatever the microbatches, exact across a stop, honest about time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cluster.contracts.config.base import ModelConfig
from cluster.contracts.config.offline import FitConfig
from cluster.contracts.errors import UserError
from cluster.contracts.metrics import Metric, mean
from learner.compute.microbatches import token_row
from learner.models.load import load_policy
from learner.offline.fit import fit
from learner.offline.sft import SftRow, SftTask


@dataclass(frozen=True)
class Row:
    value: float
    weight: float = 1.0

    def __len__(self) -> int:
        return 4


def tiny_problem(seed: int = 0) -> tuple[nn.Module, Callable[..., Any], list[Row]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss(rows: Sequence[Row], denominator: float) -> tuple[Tensor, list[Metric]]:
        x = torch.tensor([[row.value] for row in rows])
        total = (model(x) - x.square()).square().sum()
        return total / denominator, [mean("train/loss", float(total.detach()), len(rows))]

    return model, loss, [Row(i / 10) for i in range(-10, 11)]


CONFIG = FitConfig(
    epochs=6, rows_per_step=4, lr=0.01, weight_decay=0.1, checkpoint_every=5, eval_every=7
)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("stop_after", [1, 5, 13])
def test_stopped_and_continued_is_bit_equal_to_uninterrupted(
    tmp_path: Path, stop_after: int
) -> None:
    model, loss, rows = tiny_problem()
    whole = fit(model, rows, loss, CONFIG, seed=3)
    expected = weights(model)
    steps: list[int] = []
    model, loss, rows = tiny_problem()
    first = fit(
        model,
        rows,
        loss,
        CONFIG,
        seed=3,
        checkpoint=tmp_path,
        on_step=lambda step, part, numbers: steps.append(step),
        should_stop=lambda: len(steps) == stop_after,
    )
    assert (first.finished, first.steps) == (False, stop_after)
    model, loss, rows = tiny_problem(seed=99)  # the checkpoint has to bring everything
    second = fit(model, rows, loss, CONFIG, seed=3, checkpoint=tmp_path)
    assert (second.finished, second.steps, whole.steps) == (True, 36, 36)
    for name, value in weights(model).items():
        assert torch.equal(value, expected[name]), name


def test_without_the_optimiser_state_a_resume_would_differ(tmp_path: Path) -> None:
    """The check above can fail: Adam's moments matter here."""
    model, loss, rows = tiny_problem()
    fit(model, rows, loss, CONFIG, seed=3)
    expected = weights(model)
    other, other_loss, rows = tiny_problem()
    fit(other, rows, other_loss, CONFIG.model_copy(update={"betas": (0.0, 0.95)}), seed=3)
    assert not torch.equal(weights(other)["0.weight"], expected["0.weight"])


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    model, loss, rows = tiny_problem()
    fit(model, rows, loss, CONFIG, seed=3, checkpoint=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000030", "step-00000035"]
    with pytest.raises(UserError, match="another configuration or other data"):
        fit(model, rows[1:], loss, CONFIG, seed=3, checkpoint=tmp_path)
    with pytest.raises(UserError, match="another configuration"):
        fit(model, rows, loss, CONFIG.model_copy(update={"lr": 0.5}), seed=3, checkpoint=tmp_path)
    (tmp_path / "step-00000035" / "state" / "rank-00000.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="damaged"):
        fit(model, rows, loss, CONFIG, seed=3, checkpoint=tmp_path)
    assert json.loads((tmp_path / "step-00000030" / "state.json").read_text())["step"] == 30


def test_evaluation_comes_at_intervals_and_at_the_end() -> None:
    model, loss, rows = tiny_problem()
    seen: dict[int, float] = {}

    def on_step(step: int, part: float, numbers: Any) -> None:
        if "eval/loss" in numbers:
            seen[step] = numbers["eval/loss"]
        if "train/loss" in numbers:
            assert numbers["train/grad_norm"] > 0
            assert 0 < part <= 1

    result = fit(
        model,
        rows,
        loss,
        CONFIG,
        evaluate=lambda: [mean("eval/loss", float(loss(rows, 21)[0].detach()), 1)],
        on_step=on_step,
    )
    assert list(seen) == [7, 14, 21, 28, 35, 36]
    assert result.numbers["eval/loss"] == seen[36] < seen[7]


def test_time_ends_a_run_with_the_schedule_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("learner.offline.fit.time.monotonic", lambda: now[0])
    rates: list[float] = []

    def on_step(step: int, part: float, numbers: Any) -> None:
        now[0] += 1.0
        rates.append(numbers["train/lr"])

    model, loss, rows = tiny_problem()
    config = FitConfig(
        epochs=1000, max_seconds=20, rows_per_step=4, lr=1.0, schedule="linear", warmup_ratio=0.2
    )
    result = fit(model, rows, loss, config, on_step=on_step)
    assert result.steps == 20
    assert rates[0] < 0.01
    assert max(rates) == pytest.approx(1.0, abs=0.01)
    assert rates[-1] < 0.1


def test_no_rows_is_an_error() -> None:
    model, loss, _ = tiny_problem()
    with pytest.raises(UserError, match="no rows are left"):
        fit(model, [], loss, CONFIG)


def test_loss_and_gradient_do_not_depend_on_the_microbatch_budget(tiny_policy: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (12, 3, 7, 25, 18, 5, 9, 9):
        ids = torch.randint(5, 270, (length,), generator=generator).tolist()
        rows.append(SftRow(token_row(ids, [False, False, *[True] * (length - 2)])))
    outcomes = []
    for budget in (16, 60, 10_000):
        policy = load_policy(ModelConfig(path=str(tiny_policy)))
        task = SftTask(policy, "float32", torch.device("cpu"))
        numbers: list[Any] = []
        config = FitConfig(
            max_steps=2, epochs=2, lr=1e-3, rows_per_step=8, tokens_per_microbatch=budget, eps=1e-4
        )
        fit(policy, rows, task.loss, config, on_step=lambda s, f, n, to=numbers: to.append(n))
        outcomes.append((numbers, weights(policy)))
    for numbers, trained in outcomes[1:]:
        for step in range(2):
            for name in ("train/loss", "train/grad_norm"):
                assert numbers[step][name] == pytest.approx(outcomes[0][0][step][name], rel=1e-5)
        for name, value in trained.items():
            torch.testing.assert_close(value, outcomes[0][1][name], rtol=1e-4, atol=1e-6)
