"""What callbacks are told, and how they end a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from cluster.assembly.listeners import Listeners, check_callbacks
from cluster.contracts.callbacks import STOP, Answer, Callback, StepInfo
from cluster.contracts.errors import UserError
from cluster.contracts.samples import SampleInfo

NUMBERS = {"objective/scores": 0.5}


class Told(Callback):
    """Notes what it is told; answers what ``answers`` holds for it."""

    def __init__(self, **answers: Answer) -> None:
        self.answers = answers
        self.heard: list[tuple[object, ...]] = []

    def on_step(self, info: StepInfo) -> Answer:
        self.heard.append(("step", info.step, info.steps, info.metrics["objective/scores"]))
        return self.answers.get("step")

    def on_samples(self, samples: Sequence[SampleInfo]) -> Answer:
        self.heard.append(("samples", samples[0].step))
        return self.answers.get("samples")

    def on_checkpoint(self, path: Path, step: int) -> Answer:
        self.heard.append(("checkpoint", path.name, step))
        return self.answers.get("checkpoint")


@pytest.fixture
def with_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory; files of its completions need only exist."""
    (tmp_path / "rollouts").mkdir()

    def read(run_dir: Path, step: int) -> list[SampleInfo]:
        return [
            SampleInfo(step=step, group=0, sample=0, prompt_id="p", prompt=(), completion="text")
        ]

    monkeypatch.setattr("cluster.assembly.listeners.read_samples", read)
    return tmp_path


def file_of(run: Path, step: int) -> Path:
    path = run / "rollouts" / f"step-{step - 1:06d}.parquet"
    path.touch()
    return path


def test_steps_samples_and_checkpoints_are_told(with_samples: Path) -> None:
    told = Told()
    listeners = Listeners([told], with_samples, steps=3)
    listeners.write(1, NUMBERS)  # its completions are not on disk yet
    file_of(with_samples, 1)
    listeners.write(2, NUMBERS)
    listeners.checkpoint(Path("step-000002"), 2)
    file_of(with_samples, 2)
    listeners.close()
    assert told.heard == [
        ("step", 1, 3, 0.5),
        ("step", 2, 3, 0.5),
        ("samples", 1),
        ("checkpoint", "step-000002", 2),
        ("samples", 2),
    ]


def test_completions_of_steps_before_a_resume_and_of_lost_steps_are_not_told(
    with_samples: Path,
) -> None:
    file_of(with_samples, 1)
    os.utime(file_of(with_samples, 2), (1.0, 1.0))  # trained before the interrupt, then lost
    told = Told()
    listeners = Listeners([told], with_samples, steps=3, first_step=1)
    listeners.write(2, NUMBERS)
    assert told.heard == [("step", 2, 3, 0.5)]
    file_of(with_samples, 2)  # trained again
    listeners.close()
    assert told.heard[1:] == [("samples", 2)]


@pytest.mark.parametrize("hook", ["step", "samples", "checkpoint"])
def test_stop_stops_the_run_and_nobody_is_told_more(with_samples: Path, hook: str) -> None:
    asked: list[bool] = []
    told, second = Told(**{hook: STOP}), Told()
    listeners = Listeners(
        [told, second], with_samples, steps=9, request_stop=lambda: asked.append(True)
    )
    file_of(with_samples, 1)  # written while the run goes on
    listeners.write(1, NUMBERS)
    listeners.checkpoint(Path("step-000001"), 1)
    listeners.write(2, NUMBERS)
    listeners.close()
    assert (listeners.stopped, asked) == (True, [True])
    assert told.heard[-1][0] == hook
    assert len(second.heard) == len(told.heard) - 1


def test_an_exception_asks_for_a_stop_and_is_kept(tmp_path: Path) -> None:
    asked: list[bool] = []

    def broken(info: StepInfo) -> None:
        raise KeyError("no such metric")

    listeners = Listeners([broken], tmp_path, steps=9, request_stop=lambda: asked.append(True))
    listeners.write(1, NUMBERS)
    listeners.write(2, NUMBERS)
    assert isinstance(listeners.problem, KeyError)
    assert asked == [True]


def test_any_other_answer_is_a_mistake(tmp_path: Path) -> None:
    listeners = Listeners([lambda info: True], tmp_path, steps=9)  # type: ignore[list-item,return-value]
    listeners.write(1, NUMBERS)
    assert "returned True" in str(listeners.problem)
    assert "accord.STOP" in str(listeners.problem)


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(UserError, match="is no callback"):
        check_callbacks([Told], save_rollouts=True)  # type: ignore[list-item]
    with pytest.raises(UserError, match="is no callback"):
        check_callbacks(["print"], save_rollouts=True)  # type: ignore[list-item]


def test_samples_need_saved_rollouts() -> None:
    with pytest.raises(UserError, match="save_rollouts is false"):
        check_callbacks([Told()], save_rollouts=False)
    check_callbacks([lambda info: None], save_rollouts=False)
