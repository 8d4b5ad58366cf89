"""One hold on a run directory: lock, status, sinks, and what an interrupt leaves to be done."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.assembly.run_session import RunSession, how_to_continue, run_session
from cluster.contracts.config.offline import SftConfig
from cluster.contracts.errors import Fatal, UserError
from cluster.runs.artefacts import artefact_hash
from cluster.runs.console import Reporter
from cluster.runs.control import ask, read_wishes
from cluster.runs.driver import LOCK
from cluster.runs.run import Run


def config() -> SftConfig:
    return SftConfig.model_validate({"model": {"path": "m"}, "data": {"path": "d.jsonl"}})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(str(tmp_path), "r", "train", config())


def status(run: Run) -> str:
    return str(json.loads((run.path / "manifest.json").read_text())["status"])


def kinds(run: Run) -> list[str]:
    file = run.path / "events.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line)["kind"] for line in lines]


class Closing:
    closed = False

    def write(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None:
        self.closed = True


def held(
    run: Run, problem: BaseException | None = None, *, span: bool = False, **keys: Any
) -> Closing:
    """A session that ends with ``problem``; returns a sink of it."""
    sink = Closing()
    with run_session(run, Reporter(quiet=True), **keys) as session:
        session.sinks.append(sink)
        if span:
            session.timeline.span("learner", "step 0", 1.0, 2.0)
        assert (run.path / LOCK).exists()
        if problem is not None:
            raise problem
    return sink


def test_a_session_holds_the_lock_closes_its_sinks_and_records_the_end(run: Run) -> None:
    assert held(run).closed
    assert status(run) == "finished"
    assert not (run.path / LOCK).exists()
    assert not (run.path / "timeline.json").exists()  # nothing was on it


def test_the_timeline_is_written_when_something_was_on_it(run: Run) -> None:
    with pytest.raises(Fatal):
        held(run, Fatal("the learner died"), span=True)
    assert json.loads((run.path / "timeline.json").read_text())["traceEvents"]
    assert status(run) == "failed"
    assert kinds(run)[-1] == "run_failed"


def test_a_mistake_before_anything_was_done_leaves_nothing_behind(run: Run) -> None:
    with pytest.raises(UserError):
        held(run, UserError("no such file", where="x"))
    assert not run.path.exists()


def test_a_mistake_in_a_run_that_goes_on_leaves_it_there(run: Run) -> None:
    with pytest.raises(UserError):
        held(run, UserError("no such file", where="x"), resumed=config(), step=3)
    assert status(run) == "failed"
    assert kinds(run) == ["resumed", "run_failed"]


def test_an_interrupt_says_how_to_continue_also_when_quiet(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.path / "checkpoints" / "step-000009").mkdir(parents=True)
    (run.path / "checkpoints" / "step-000012").mkdir()
    (run.path / "checkpoints" / ".staging-000013").mkdir()
    with pytest.raises(KeyboardInterrupt):
        held(run, KeyboardInterrupt())
    assert status(run) == "interrupted"
    assert capsys.readouterr().err == (
        f"stopped after step 12; to continue: accord train --resume {run.path}\n"
    )


def test_what_can_be_continued_depends_on_the_command(tmp_path: Path, run: Run) -> None:
    assert how_to_continue(run) == (
        f"stopped before the first checkpoint; to continue: accord train --resume {run.path}"
    )
    sft = Run.create(str(tmp_path), "s", "sft", config())
    assert how_to_continue(sft) == (
        f"stopped before the first checkpoint; to continue: accord sft --resume {sft.path}"
    )
    judged = Run.create(str(tmp_path), "e", "evaluate", config())
    assert how_to_continue(judged) == (
        f"what was finished is kept in {judged.path}; the same command goes on from there"
    )
    sampled = Run.create(str(tmp_path), "b", "best-of-n", config())
    assert how_to_continue(sampled) == f"what was finished is kept in {sampled.path}"


def test_what_a_person_should_know_is_said(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with run_session(run, Reporter()) as session:
        session.start.begins("learner", "worker-0")
        session.event("learner_ready", version=0, seconds=1.0)
        session.event("worker_serving", worker="worker-0", engine="vllm 1", note="no GPU here")
        session.event("worker_lost", worker="worker-0", cause="killed")
        session.event("checkpoint", step=1)
    said = capsys.readouterr().err
    assert [line.partition(":")[0].strip() for line in said.splitlines()] == [
        "starting",
        "learner",
        "worker-0",
        "no GPU here",
        "worker-0",
    ]
    assert isinstance(session, RunSession)
    assert kinds(run) == [
        *("learner_ready", "started", "worker_serving", "started"),
        *("worker_lost", "checkpoint"),
    ]


def test_a_resume_forgets_the_stop_that_ended_the_run_and_a_start_keeps_one(run: Run) -> None:
    """Asked for while models load, a stop must not be lost."""
    ask(run.path, stop=True, workers=3)
    held(run)
    assert read_wishes(run.path).stop
    held(run, resumed=config())
    after = read_wishes(run.path)
    assert (after.stop, after.workers) == (False, 3)


def test_what_a_run_produced_is_in_the_manifest_by_its_hash(run: Run) -> None:
    with run_session(run, Reporter(quiet=True)) as session:
        (session.path / "policy").mkdir()
        (session.path / "policy" / "model.safetensors").write_bytes(b"weights")
        (session.path / "evaluation.json").write_text("{}")
    outputs = json.loads((run.path / "manifest.json").read_text())["outputs"]
    assert outputs == {
        name: artefact_hash(run.path / name) for name in ("policy", "evaluation.json")
    }
