"""`accord runs` and `accord status`: what a run's files say, whole, damaged or half written."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from pydantic import BaseModel

from cluster.contracts.durable import write_json
from cluster.contracts.errors import UserError
from cluster.runs.driver import Driver
from cluster.runs.overview import find_runs, overview, size, span
from cluster.runs.run import Run
from cluster.runs.status import headline, read_status, status_lines
from cluster.runs.steer import scale_workers


class Batch(BaseModel):
    steps: int = 10


class Config(BaseModel):
    batch: Batch = Batch()


def make(folder: Path, name: str = "r", command: str = "train", steps: int = 4) -> Run:
    run = Run.create(str(folder), name, command, Config())
    now = time.time()
    rows = [
        {"step": s, "time": now - 2.0 * (steps - s), "objective/scores": s / 10}
        for s in range(1, steps + 1)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run.path / "metrics.jsonl").write_text(text + '{"step": 99, "ti')  # being written
    return run


def kill(run: Run) -> None:
    """As kill -9 leaves a run: the lock is there, its process is not."""
    dead = Driver.of_this_process().record() | {"pid": 2**22 + 1}
    write_json(run.path / "driver.lock", dead)


def test_a_running_run_tells_its_step_and_the_time_left(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.event("cluster", address="h:1", dashboard="127.0.0.1:8265")
    for kind, worker in (
        ("worker_serving", "worker-0"),
        ("worker_serving", "worker-1"),
        ("worker_lost", "worker-0"),
    ):
        run.event(kind, worker=worker)
    with run.lock():
        status = read_status(run)
        lines = status_lines(run)
    assert (status["status"], status["step"], status["steps"]) == ("running", 4, 10)
    assert status["seconds_left"] == pytest.approx(12.0)
    assert status["workers"] == ["worker-1"]
    assert (status["driver"]["pid"], status["driver_alive"]) == (os.getpid(), True)
    assert lines[0].startswith("r: running (train), step 4 of 10, reward +0.400, 12 s left, last")
    assert "  workers serving: 1 (worker-1)" in lines
    assert any(line.startswith("  Ray dashboard: http://127.0.0.1:8265") for line in lines)
    assert lines[-1] == "  events: cluster 1, worker_lost 1, worker_serving 2"


def test_a_killed_run_is_dead_and_says_how_to_continue(tmp_path: Path) -> None:
    run = make(tmp_path)
    kill(run)
    status = read_status(run)
    assert (status["status"], status["driver_alive"], status["workers"]) == ("dead", False, [])
    assert status["seconds_left"] is None
    assert f"  continue: accord train --resume {run.path}" in status_lines(run)
    with pytest.raises(UserError, match=r"(?s)ended without recording how.*train --resume"):
        scale_workers(run.path, 2, 0.0)


def test_a_run_on_another_host_is_believed(tmp_path: Path) -> None:
    run = make(tmp_path)
    elsewhere = Driver.of_this_process().record() | {"host": "elsewhere"}
    write_json(run.path / "driver.lock", elsewhere)
    status = read_status(run)
    assert (status["status"], status["driver_alive"]) == ("running", None)
    assert "not visible from here" in "\n".join(status_lines(run))


def test_an_alarm_is_shown_until_it_ends(tmp_path: Path) -> None:
    run = make(tmp_path)
    for alarm, change in (("kl", "start"), ("length", "start"), ("kl", "end")):
        run.event("alarm", alarm=alarm, change=change, text=f"{alarm} is off")
    assert read_status(run)["alarms"] == ["length is off"]
    assert "  alarm: length is off" in status_lines(run)


def test_who_runs_on_which_core_is_shown(tmp_path: Path) -> None:
    run = make(tmp_path)
    assert read_status(run)["cores"] is None
    rows = [{"cores": "core 0", "roles": ["1 rollout worker", "Ray"]}, "nonsense"]
    run.event("cores_dealt_out", step=2, cores=rows, why="so")
    assert read_status(run)["cores"] == rows
    assert "  core 0: 1 rollout worker, Ray" in status_lines(run)
    run.event("cluster")  # the run was started again: its roles are where they start
    assert read_status(run)["cores"] is None


def test_a_finished_run_is_finished_whoever_lives(tmp_path: Path) -> None:
    run = make(tmp_path, steps=10)
    kill(run)
    run.update_manifest(status="finished")
    assert headline(overview(run.path)) == "r: finished (train), step 10 of 10, reward +1.000"


def test_runs_are_found_with_their_stages_and_a_bad_one_hides_no_other(tmp_path: Path) -> None:
    quick = make(tmp_path, "quick", "quickstart")
    make(quick.path, "ppo")
    bad = make(tmp_path, "bad")
    (bad.path / "manifest.json").write_text("{")
    (tmp_path / "no-run").mkdir()
    found = {str(path.relative_to(tmp_path)): overview(path).status for path in find_runs(tmp_path)}
    assert found == {"bad": "damaged", "quick": "running", "quick/ppo": "running"}
    with pytest.raises(UserError, match="is damaged"):
        read_status(bad)


def test_a_run_without_metrics_has_an_overview(tmp_path: Path) -> None:
    run = Run.create(str(tmp_path), "r", "sft", Config())
    facts = overview(run.path)
    assert (facts.step, facts.steps, facts.latest_text()) == (0, None, "")
    assert facts.size_bytes == sum(p.stat().st_size for p in run.path.iterdir())


def test_rows_that_are_no_metrics_are_passed_over(tmp_path: Path) -> None:
    run = make(tmp_path)
    with (run.path / "metrics.jsonl").open("w") as file:
        for row in ('{"step": 2, "time": null}', '{"step": null}', "[1]", "nonsense", "{}"):
            file.write(row + "\n")
    facts = overview(run.path)
    assert (facts.step, facts.seconds_left, facts.latest()) == (2, None, None)


# The same in every test process: it is part of the names of tests.
HERE = {**Driver.of_this_process().record(), "started": 0}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", '{"status": "running", "created": "0001-01-01T00:00:00+14:00"}'),
        ("manifest.json", '{"status": ["running"], "name": {"a": 1}, "command": 7}'),
        ("manifest.json", "[" * 100_000),
        ("manifest.json", "\x00\xff"),
        ("driver.lock", '{"pid": 1e400, "host": "h", "boot": "b"}'),
        ("driver.lock", json.dumps({**HERE, "pid": 2**70})),
        ("driver.lock", json.dumps({**HERE, "pid": -1})),
        ("driver.lock", "[" * 100_000),
        ("metrics.jsonl", '{"step": 1' + "0" * 400 + ', "objective/scores": 1}\n'),
        ("metrics.jsonl", '{"step": NaN, "time": Infinity}\n{"step": true}\n'),
        ("metrics.jsonl", '{"step": 3, "time": 1' + "0" * 400 + ', "objective/scores": "x"}\n' * 3),
        ("events.jsonl", "[" * 100_000 + "\n\x00\n"),
        ("config.toml", "batch = 3"),
        ("config.toml", "[batch]\nsteps = inf"),
    ],
)
def test_a_damaged_file_does_not_hide_the_run(tmp_path: Path, name: str, content: str) -> None:
    run = make(tmp_path)
    (run.path / name).write_bytes(content.encode("latin-1"))
    assert [path.name for path in find_runs(tmp_path)] == ["r"]
    facts = overview(run.path)
    json.dumps(facts.record())
    assert headline(facts)
    if facts.status != "damaged":
        assert status_lines(run)


def test_a_process_of_a_number_that_none_can_have_is_dead(tmp_path: Path) -> None:
    run = make(tmp_path)
    for pid in (2**70, -1, 0):
        write_json(run.path / "driver.lock", Driver.of_this_process().record() | {"pid": pid})
        assert overview(run.path).status == "dead", pid


def test_a_driver_on_another_host_that_went_silent_is_told_from_a_running_one(
    tmp_path: Path,
) -> None:
    run = make(tmp_path)
    elsewhere = Driver.of_this_process().record() | {"host": "elsewhere"}
    write_json(run.path / "driver.lock", elsewhere)
    (run.path / "live.json").write_text("{}")
    assert overview(run.path).status == "running"
    long_ago = time.time() - 600
    for path in run.path.iterdir():
        os.utime(path, (long_ago, long_ago))
    assert overview(run.path).status == "silent"
    assert "its host may be down" in "\n".join(status_lines(run))
    # Offline training writes no such file: nothing can be told from its age.
    (run.path / "live.json").unlink()
    assert overview(run.path).status == "running"


def test_spans_and_sizes_are_short() -> None:
    spans = [span(s) for s in (0.2, 75, 600, 7200, 400_000)]
    assert spans == ["0 s", "75 s", "10 min", "2.0 h", "4.6 days"]
    sizes = [size(b) for b in (0, 812, 3_100_000, 105_000_000, 2_400_000_000, 7 * 10**12)]
    assert sizes == ["0 B", "812 B", "3.1 MB", "105 MB", "2.4 GB", "7.0 TB"]
