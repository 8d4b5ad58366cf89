"""`accord status` of a run in progress: what it waits for, and the view that is kept fresh."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster.runs.run import Run
from cluster.runs.status import read_status, status_lines
from cluster.runs.watch import watch


@pytest.fixture
def run(tmp_path: Path, run_dirs: ModuleType) -> Run:
    made: Run = run_dirs.training(tmp_path, "r")
    return made


def seen_while(run: Run, run_dirs: ModuleType, *texts: str, ends: int = 2) -> str:
    """What a terminal shows of a run that ends after some looks."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=140, height=60, color_system=None)
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        run_dirs.add_step(run, 40 + len(looks))
        for text in texts:
            run.event("worker_lost", worker=text, cause=text)
        if len(looks) == ends:
            run_dirs.end(run, "finished")

    watch(run, console, sleep)
    assert len(looks) == ends
    return out.getvalue()


def test_status_says_what_a_run_waits_for(run: Run) -> None:
    lines = "\n".join(status_lines(run))
    assert "generated 931 tokens/s, learner waiting for 1.5 s, 2 of 8 groups ready" in lines
    assert "waits for: rollout. The learner waited 80 % of the last minute" in lines
    assert "advice: Add workers: accord scale RUN 4." in lines
    assert "does not answer: worker-2" in lines
    assert "Ray dashboard: http://127.0.0.1:8265 (`ray get-auth-token` prints the token" in lines
    status = json.loads(json.dumps(read_status(run)))
    assert status["live"]["bottleneck"]["stage"] == "rollout"
    assert status["heartbeat_age_s"] < 60


def test_old_numbers_are_not_shown_as_todays(run: Run, run_dirs: ModuleType) -> None:
    run_dirs.touch(run.path / "live.json", 60)
    lines = "\n".join(status_lines(run))
    assert "the run's process has not reported for 60 s" in lines
    assert "waits for" not in lines


def test_the_view_follows_the_run_to_its_end(run: Run, run_dirs: ModuleType) -> None:
    shown = seen_while(run, run_dirs, "worker-0")
    assert "r: running (train), step 40 of 60" in shown
    assert "step 41 of 60" in shown
    assert "worker-2" in shown
    assert "serving, silent" in shown
    assert "worker_lost: worker worker-0" in shown
    assert "r: finished (train), step 42 of 60" in shown


def test_hostile_text_moves_no_cursor(run: Run, run_dirs: ModuleType) -> None:
    calm = seen_while(run, run_dirs)
    fresh = run_dirs.training(run.path.parent, "hostile")
    shown = seen_while(fresh, run_dirs, *run_dirs.HOSTILE.values())
    for control in "\x00\x07\x9b\u202e\u200b":
        assert control not in shown
    assert "\x1b[31m" not in shown
    assert "\x1b[2K" in calm  # rich's own


@pytest.mark.parametrize("file", ["live.json", "control.json", "events.jsonl", "metrics.jsonl"])
def test_a_damaged_file_ends_no_view(run: Run, run_dirs: ModuleType, file: str) -> None:
    for content in ("[" * 100_000, "{}", "\x00", '{"workers": [{"name": {}}], "bottleneck": []}'):
        (run.path / file).write_text(content)
        assert status_lines(run)


def test_fields_of_another_kind_are_shown_as_unknown(run: Run) -> None:
    live = json.loads((run.path / "live.json").read_text())
    live["workers"][0] = {"name": 7, "status": None, "tokens_per_s": "many"}
    live |= {"tokens_per_s": None, "staleness": {"mean": "x"}}
    (run.path / "live.json").write_text(json.dumps(live))
    assert "generated ? tokens/s" in "\n".join(status_lines(run))


def test_without_a_terminal_it_is_shown_once(run: Run) -> None:
    import launch

    done = CliRunner().invoke(launch.app, ["status", str(run.path), "--watch"])
    assert done.exit_code == 0
    assert done.output.startswith("r: running (train), step 40 of 60")
