"""What the benchmarks' numbers mean: the arithmetic on cases worked out by hand, and the check."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from cluster.contracts.errors import AccordError, UserError
from cluster.measure.bench import common, overlap_processes
from cluster.measure.bench import overlap_metrics as metrics
from cluster.measure.bench.common import BenchOptions, BenchResult, regressions
from cluster.measure.bench.overlap import round_ratios
from cluster.measure.bench.overlap_metrics import Window
from cluster.measure.bench.overlap_run import RunMeasures, learner_spans
from cluster.runs.console import Reporter


def test_a_window_begins_and_ends_where_steps_end() -> None:
    ends = [10.0, 11.0, 13.0, 16.0, 20.0]
    window = metrics.window_of(ends, first=2, steps=3)
    assert (window.start, window.end) == (11.0, 20.0)
    assert window.step_s == pytest.approx(3.0)
    with pytest.raises(ValueError, match="5 steps"):
        metrics.window_of(ends, first=3, steps=3)
    with pytest.raises(ValueError, match="no window"):
        metrics.window_of(ends, first=0, steps=2)  # the first step has no step end before it


def test_overlap_of_two_sides() -> None:
    # Alone 2 s and 3 s: in turn 5 s a step, overlapped at best 3 s.
    assert metrics.ceiling(2.0, 3.0) == pytest.approx(5 / 3)
    assert metrics.overlap_efficiency([2.0, 3.0], 3.0) == pytest.approx(1.0)
    assert metrics.overlap_efficiency([2.0, 3.0], 4.0) == pytest.approx(0.75)
    assert metrics.realised(5.0, 3.0, [2.0, 3.0]) == pytest.approx(1.0)
    assert metrics.realised(5.0, 4.0, [2.0, 3.0]) == pytest.approx(0.5)
    assert metrics.realised(5.0, 5.0, [2.0, 3.0]) == pytest.approx(0.0)
    assert math.isnan(metrics.realised(3.0, 3.0, [2.0, 3.0]))


def test_two_cores_are_bound_by_the_fuller_one_or_by_both() -> None:
    assert metrics.cpu_bound_step(3.0, 2.0, 0.5) == 3.0
    assert metrics.cpu_bound_step(2.0, 3.0, 0.5) == 3.0
    assert metrics.cpu_bound_step(3.0, 3.0, 0.5) == pytest.approx(3.25)  # half of it on each


def test_bubble_counts_every_unit_and_waste_what_was_not_trained() -> None:
    assert metrics.bubble(15.0, 2, 10.0) == pytest.approx(0.25)
    assert metrics.waste(75, 100) == pytest.approx(0.25)
    assert metrics.waste(100, 100) == 0.0


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(v) for v in range(100, 0, -1)]
    assert metrics.percentile(values, 0.5) == 50.0
    assert metrics.percentile(values, 0.99) == 99.0
    assert metrics.percentile(values, 1.0) == 100.0
    assert metrics.percentile([7.0], 0.99) == 7.0
    assert math.isnan(metrics.percentile([], 0.5))


def test_spans_count_only_inside_the_window() -> None:
    window = Window(10.0, 20.0, 1)
    assert metrics.within([(5.0, 12.0), (13.0, 14.0), (19.0, 30.0), (40.0, 50.0)], window) == 4.0


def test_a_counter_is_read_between_its_samples() -> None:
    samples = [(0.0, 0.0), (10.0, 5.0), (20.0, 25.0)]
    assert metrics.at(samples, 5.0) == pytest.approx(2.5)
    assert metrics.at(samples, 15.0) == pytest.approx(15.0)
    assert metrics.at(samples, -1.0) == 0.0
    assert metrics.at(samples, 99.0) == 25.0
    assert metrics.grown(samples, Window(5.0, 15.0, 1)) == pytest.approx(12.5)
    assert metrics.grown([], Window(5.0, 15.0, 1)) == 0.0


def test_cores_are_split_whole() -> None:
    shares = metrics.split({"worker": 8.0, "learner": 6.0}, 2, Window(0.0, 10.0, 5))
    assert shares == pytest.approx({"worker": 0.4, "learner": 0.3, "idle": 0.3})
    assert sum(shares.values()) == pytest.approx(1.0)


def measured(**changed: Any) -> RunMeasures:
    values: dict[str, Any] = {
        "run": "r", "mode": "async", "window": Window(0.0, 40.0, 10), "trained": 1000.0,
        "generated": 1100.0, "worker_busy": 30.0, "learner_busy": 38.0, "learner_cpu": 25.0,
        "cpu": {"worker": 22.0, "learner": 26.0, "reward": 2.0, "controller": 1.0, "ray": 3.0},
        "elsewhere": 0.0, "pauses": [0.1, 0.3], "publishing": 0.8, "waiting": 0.2,
        "handing_over": 0.1, "no_core": 0.0, "staleness_mean": 1.5, "staleness_max": 2.0,
        "waste": 0.0,
    }  # fmt: skip
    return RunMeasures(**{**values, **changed})


def test_the_headline_of_a_round() -> None:
    found = {
        "async": measured(),
        "sync": measured(window=Window(0.0, 60.0, 10)),
        "colocated": measured(window=Window(0.0, 50.0, 10), elsewhere=8.0),
        # alone, over 4 steps: 2.5 s and 3.6 s a step
        "generate": {"steps": 4, "tokens": 600.0, "wall_s": 10.0, "cpu_s": 10.0},
        "learn": {"steps": 4, "tokens": 500.0, "wall_s": 14.4, "cpu_s": 10.0},
    }
    ratios = round_ratios(found)
    assert ratios["overlap efficiency"] == pytest.approx(3.6 / 4.0)
    assert ratios["speed-up over sync"] == pytest.approx(1.5)
    # A step's CPU: alone 2.5 s each; in the run 2 s (of the trained tokens) and 2.8 s on the cores.
    assert ratios["same, had nobody waited"] == pytest.approx(2.5 / 2.8)
    assert ratios["speed-up over colocated"] == pytest.approx(1.25)
    assert ratios["ceiling of speed-up"] == pytest.approx(6.1 / 3.6)
    assert ratios["overlap realised"] == pytest.approx(2.0 / 2.4)
    # 1100 tokens in 22 CPU-seconds against 60 a CPU-second; 1000 in 25 against 50.
    assert ratios["generation efficiency"] == pytest.approx(50 / 60)
    assert ratios["learner efficiency"] == pytest.approx(40 / 50)
    assert ratios["stall of generation"] == pytest.approx(0.01)
    assert ratios["stall of learner"] == pytest.approx(0.02)
    assert ratios["bubble, hand-over and publish"] == pytest.approx(1.1 / 40.0)
    # The worst of the three runs: 8 CPU-seconds of 50 s on every core.
    noise = 8.0 / (50.0 * (os.cpu_count() or 1))
    assert ratios["used by other processes"] == pytest.approx(noise)
    del found["colocated"]
    assert "speed-up over colocated" not in round_ratios(found)


def test_learner_spans_of_a_timeline(tmp_path: Path) -> None:
    def event(name: str, cat: str, ts: int, dur: int) -> dict[str, Any]:
        return {"name": name, "cat": cat, "ph": "X", "ts": ts, "dur": dur}

    events = [
        {"name": "thread_name", "ph": "M"},
        event("wait for batch", "learner", 0, 1_000_000),
        event("step 0", "learner", 1_000_000, 500_000),
        event("version 1", "weights", 1_500_000, 100_000),
        event("step 1", "learner", 1_500_000, 1_000_000),
        event("save", "learner", 2_500_000, 1_000_000),
    ]
    path = tmp_path / "timeline.json"
    path.write_text(json.dumps({"traceEvents": events}))
    assert learner_spans(path) == [(1.0, 1.5), (1.5, 2.5)]


def test_processes_are_sampled_with_their_descendants() -> None:
    sampler = overlap_processes.ProcessSampler(os.getpid())
    sampler.stop()
    used = sum(os.times()[:2])
    sampler._sample()
    _, seconds = sampler.by_role["controller"][-1]
    assert seconds == pytest.approx(used, abs=0.5)
    assert sampler.elsewhere[-1][1] > 0


RESULT = BenchResult(
    name="rollout",
    settings={"prompts": 3},
    rows=[{"": "plain", "tokens/s": 12345.6}, {"": "worker"}],
    ratios={"rate": 0.8, "pause": 4.0},
    tolerances={"rate": (0.7, math.inf), "pause": (-math.inf, 5.0)},
)


def test_a_ratio_is_held_against_its_limits_and_the_stored_one() -> None:
    assert regressions(RESULT, {}, 0.1) == []
    assert regressions(RESULT, {"rate": 0.85, "pause": 3.8}, 0.1) == []
    # Better than stored, in either direction, is no regression.
    assert regressions(RESULT, {"rate": 0.4, "pause": 9.0}, 0.1) == []
    (slow,) = regressions(RESULT, {"rate": 0.95}, 0.1)
    assert "rate = 0.8, stored 0.95" in slow
    (late,) = regressions(RESULT, {"pause": 3.0}, 0.1)
    assert "pause = 4, stored 3" in late


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ({"rate": 0.6, "pause": 4.0}, "rate = 0.6 is outside 0.7 to inf"),
        ({"rate": 0.8, "pause": 6.0}, "pause = 6 is outside -inf to 5"),
        ({"rate": math.nan, "pause": 4.0}, "rate was not measured"),
        ({"pause": 4.0}, "rate was not measured"),
    ],
)
def test_what_is_out_of_its_limits_is_named(ratios: dict[str, float], words: str) -> None:
    bad = BenchResult(name="x", settings={}, rows=[], ratios=ratios, tolerances=RESULT.tolerances)
    assert regressions(bad, {}, 0.1) == [words]


def run_fake(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: BenchResult, **how: Any
) -> None:
    from cluster.measure.bench import rollout

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(rollout, "measure", lambda options: found)
    given = {"json_file": None, "check": True} | how
    common.run_benchmark("rollout", BenchOptions(), reporter=Reporter(quiet=True), **given)


def test_a_benchmark_is_shown_stored_and_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = tmp_path / "rollout.json"
    run_fake(monkeypatch, tmp_path, RESULT, json_file=stored)
    record = json.loads(stored.read_text())
    assert record["ratios"] == RESULT.ratios
    assert record["tolerances"]["rate"] == [0.7, None]
    assert record["versions"]["python"]
    assert record["machine"]["cores"] == os.cpu_count()
    shown = capsys.readouterr().out
    assert "12,346" in shown
    assert "check: 2 ratios" in shown

    worse = BenchResult(
        name="rollout", settings={}, rows=[], ratios={"rate": 0.7, "pause": 4.0},
        tolerances=RESULT.tolerances,
    )  # fmt: skip
    # The file that is written is also the one that is checked against: as it was before.
    with pytest.raises(AccordError, match=r"rate = 0\.7, stored 0\.8"):
        run_fake(monkeypatch, tmp_path, worse, json_file=stored)


def test_an_unknown_benchmark_and_a_broken_record(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no benchmark 'speed'"):
        common.run_benchmark("speed", BenchOptions(), None, False, Reporter(quiet=True))
    (tmp_path / "rollout.json").write_text('{"rates": {}}')
    with pytest.raises(UserError, match="not a benchmark's record"):
        run_fake(monkeypatch, tmp_path, RESULT)
