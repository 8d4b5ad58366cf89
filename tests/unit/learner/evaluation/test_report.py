from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup

from cluster.contracts.errors import UserError
from learner.evaluation import charts, curves, panels, verdict
from learner.evaluation.lines import smooth, thin, window
from learner.evaluation.page import visible
from learner.evaluation.report import write_report
from learner.evaluation.run_files import RunFiles, write_atomic
from learner.evaluation.samples import Sample, write_samples

HOSTILE = "</script></pre><img src=x onerror=alert(1)>{{7*7}}{% raw %}\u202eevil\x1b[31m\u200b&amp;"
SHOWN = (
    HOSTILE.replace("\u202e", "⟨U+202E⟩").replace("\x1b", "⟨U+001B⟩").replace("\u200b", "⟨U+200B⟩")
)
FILES = (
    "manifest.json",
    "config.toml",
    "metrics.jsonl",
    "events.jsonl",
    "evaluation.json",
    "samples.jsonl",
    "reward_model.json",
    "stages.json",
    "preferences.json",
)
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """What a browser would make of the page: elements, ids, texts; checks the nesting."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.hrefs: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        self.ids += [value for key, value in attrs if key == "id" and value]
        self.hrefs += [value for key, value in attrs if key == "href" and value]
        for value in found.values():
            self.hrefs += [f"#{name}" for name in re.findall(r"url\(#([^)]+)\)", value or "")]
        self.hrefs += [f"#{name}" for name in (found.get("aria-labelledby") or "").split()]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data

    @property
    def text(self) -> str:
        return "\n".join(
            " ".join(t.split()) for tag, ts in self.texts.items() if tag != "style" for t in ts
        )


def metric_row(step: int) -> dict[str, float]:
    return {
        "step": step,
        "time": 2.0 * (step + 1),
        "objective/scores": step / 100,
        "objective/kl": step / 10,
        "completions/mean_length": 20 + step,
        "policy/entropy": 2.0,
        "async/staleness_mean": 1.0,
        "perf/throughput": 500.0,
        "perf/overlap_frac": 0.75,
        "time/step": 1.5,
        "rewards/rules/mean": 0.5,
        "value/explained_var": math.nan,
    }


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run = tmp_path / "run-1"
    run.mkdir()

    def put(name: str, value: Any) -> None:
        (run / name).write_text(json.dumps(value))

    def put_lines(name: str, values: list[Any]) -> None:
        (run / name).write_text("".join(json.dumps(value) + "\n" for value in values))

    put("manifest.json", {"commit": "abc123", "seed": 7, "parents": {"policy": "runs/sft-1"}})
    (run / "config.toml").write_text('[model]\npath = "m<b>"\n')
    put_lines("metrics.jsonl", [metric_row(step) for step in range(100)])
    events = [{"time": 1.7e9 + i, "kind": "swap", "detail": "v"} for i in range(50)]
    died = {
        "time": 1.7e9 + 53.5,
        "kind": "worker_lost",
        "detail": {"cause": "killed"},
        "worker": "rollout-1",
    }
    put_lines("events.jsonl", [*events, died])
    judged = {"judge": "gold", "policy": "after", "baseline": "before", "pairs": 100}
    counts = {"wins": 70, "ties": 0, "losses": 30, "mean_score_policy": 0.9}
    put("evaluation.json", {**judged, **counts, "win_rate": 0.7, "ci_low": 0.604, "ci_high": 0.781})
    pairs = [("good morning", "good morning to you", 0.0, 1.0), ("x y z", "x", 1.0, 0.5)]
    write_samples(
        run / "samples.jsonl",
        [
            Sample(prompt=f"prompt {i}", before=b, after=a, before_score=s, after_score=t)
            for i, (b, a, s, t) in enumerate(pairs)
        ],
    )
    bins = {"low": 0.5, "high": 0.6, "count": 10, "mean_probability": 0.55, "frequency": 0.6}
    put("reward_model.json", {"accuracy": 0.81, "ece": 0.05, "loss": 0.4, "reliability": [bins]})
    put("stages.json", [{"name": "sft", "seconds": 30.0}, {"name": "train", "seconds": 95.5}])
    put("preferences.json", {"pairs": 1234, "annotators": 3})
    return run


def test_the_page_is_whole_and_says_what_the_files_say(run_dir: Path) -> None:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    page = Page(path.read_text("utf-8"))
    for shown in (
        *("70.0%", "60.4% to 78.1%", "100 pairs, 70 wins", "2 min 6 s", "81.0%", "1234"),
        *("abc123", "runs/sft-1", "good morning to you", 'path = "m<b>"', "rollout-1"),
        *("largest improvement", "worst regression", "async/staleness_mean", "time/step"),
        *("worker_lost", "53.5 s"),
        "Correlation of reward and length over the steps: 1.",
    ):
        assert shown in page.text
    assert "cannot be shown" not in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 9
    assert not [name for name in FILES if not (run_dir / name).exists()]
    assert sorted(p.name for p in run_dir.iterdir()) == sorted(
        [*FILES, "report.html", "summary.json"]
    )
    assert len(path.read_bytes()) < 250_000


def test_the_page_needs_no_network_no_script_and_every_reference_resolves(run_dir: Path) -> None:
    html = write_report(run_dir).read_text("utf-8")
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    assert {href[1:] for href in page.hrefs} <= set(page.ids)
    assert all(href.startswith("#") for href in page.hrefs)
    for tag, attrs in page.tags:
        assert tag not in {"iframe", "object", "link", "form"}
        assert not [key for key in attrs if key.startswith("on") or key == "src"]
        assert tag != "script" or attrs["type"] == "application/json"
        if tag == "svg":
            assert attrs["role"] == "img"
    assert "default-src 'none'" in html
    assert not re.findall(r"https?://", html)
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    descriptions = page.texts["desc"]
    assert any("reward over 100 steps: from 0 to 0.99" in d for d in descriptions)


def test_the_summary_holds_the_key_figures(run_dir: Path) -> None:
    page = Page(write_report(run_dir).read_text("utf-8"))
    summary = json.loads((run_dir / "summary.json").read_text())
    assert json.loads(page.texts["script"][0]) == summary
    expected = {
        "run": "run-1",
        "steps": 100,
        "win_rate": 0.7,
        "ci_low": 0.604,
        "reward_first": pytest.approx(0.045),
        "reward_last": pytest.approx(0.945),
        "kl_last": pytest.approx(9.45),
        "overlap": 0.75,
        "wall_seconds": 125.5,
        "reward_model_ece": 0.05,
        "notable_events": 1,
        "missing": [],
    }
    assert {key: summary[key] for key in expected} == expected
    assert any("tokens on average" in text for text in summary["warnings"])
    before = (run_dir / "report.html").read_bytes()
    write_report(run_dir)
    assert (run_dir / "report.html").read_bytes() == before  # the same files, the same page


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts take most of a report's time; these tests do not look at them."""
    monkeypatch.setattr(charts, "_inline", lambda figure, name, title, alt: Markup("<svg></svg>"))


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("gone", FILES)
def test_a_missing_file_is_named_and_the_rest_shown(run_dir: Path, gone: str) -> None:
    (run_dir / gone).unlink()
    page = Page(write_report(run_dir).read_text("utf-8"))
    assert f"{gone}\n" in page.text
    assert "cannot be shown" in page.text
    assert json.loads((run_dir / "summary.json").read_text())["missing"] == [gone]


def test_an_empty_run_has_a_report_that_names_everything(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path).read_text("utf-8"))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["missing"] == sorted(FILES)
    assert summary["win_rate"] is None
    assert all(f"{name}\n" in page.text for name in FILES)
    with pytest.raises(UserError, match="not a run directory"):
        write_report(tmp_path / "none")


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\x00\xff\xfe",
        b"[1, 2",
        b"[]",
        b"{}",
        b"null",
        b'"text"',
        b"[" * 5000,
        b'{"step": 1, "time": 1e999, "win_rate": "x", "pairs": {}, "reliability": [1]}',
        b'[{"name": 5, "seconds": Infinity, "detail": {}}]',
        b'{"step": null, "kind": null, "parents": 4, "ece": ' + b"9" * 400 + b"}",
    ],
)
@pytest.mark.parametrize("charted", [False, True])
def test_damaged_files_never_stop_the_report(tmp_path: Path, damage: bytes, charted: bool) -> None:
    for name in (*FILES, "labels.json"):
        (tmp_path / name).write_bytes(damage)
    if charted:
        (tmp_path / "metrics.jsonl").write_text(json.dumps(metric_row(0)) + "\n")
    Page(write_report(tmp_path).read_text("utf-8"))
    json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.usefixtures("undrawn")
def test_a_line_half_written_by_a_live_run_is_left_out_and_said(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as out:
        out.write('{"step": 100, "objective/sco')
    write_report(run_dir)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["steps"] == 100
    assert "not complete yet" in summary["notes"]["metrics.jsonl"][0]
    assert "not complete yet" in (run_dir / "report.html").read_text("utf-8")


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new " * 10_000 + "\ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_step_repeated_after_a_resume_counts_once_as_last_written(tmp_path: Path) -> None:
    steps = [(2, 3.0), (0, 1.0), (1, 2.0), (1, 5.0)]
    lines = [json.dumps({"step": s, "objective/scores": v}) for s, v in steps]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, "oops", lines[1]]))
    files = RunFiles(tmp_path)
    rows = files.metrics() or []
    assert [(row["step"], row["objective/scores"]) for row in rows] == [(0, 1), (1, 5), (2, 3)]
    assert files.notes == {"metrics.jsonl": ["line 5 is not a JSON object and is left out"]}


def poison_samples(run: Path) -> None:
    write_samples(
        run / "samples.jsonl",
        [Sample(prompt=HOSTILE, before=HOSTILE, after=HOSTILE, before_score=0, after_score=1)],
    )


def poison_json(name: str, value: Any) -> Callable[[Path], None]:
    return lambda run: (run / name).write_text(json.dumps(value)) and None


@pytest.mark.parametrize(
    ("poison", "at_least"),
    [
        (poison_samples, 3),
        (poison_json("evaluation.json", {"judge": HOSTILE, "policy": HOSTILE, "wins": HOSTILE}), 3),
        (poison_json("manifest.json", {"parents": {HOSTILE: HOSTILE}, HOSTILE: HOSTILE}), 4),
        (poison_json("stages.json", [{"name": HOSTILE, "detail": HOSTILE, "seconds": HOSTILE}]), 5),
        (poison_json("events.jsonl", {"kind": HOSTILE, "detail": HOSTILE, "time": HOSTILE}), 4),
        (poison_json("preferences.json", {HOSTILE: HOSTILE}), 2),
        (
            poison_json(
                "labels.json",
                {
                    "counts": {"licenses": {HOSTILE: 1}, "annotators": HOSTILE},
                    "gates": [{"name": HOSTILE, "why": HOSTILE}],
                    "quality": {"annotators": {HOSTILE: {"labels": HOSTILE}}, "agreement": HOSTILE},
                },
            ),
            6,
        ),
        (poison_json("reward_model.json", {"accuracy": HOSTILE, "ece": HOSTILE}), 0),
        (
            poison_json(
                "metrics.jsonl", {"step": 1, f"time/{HOSTILE}": 1, "objective/kl": HOSTILE}
            ),
            1,
        ),
        (lambda run: (run / "config.toml").write_text(HOSTILE, "utf-8"), 1),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_hostile_text_is_shown_and_does_nothing(
    run_dir: Path, poison: Callable[[Path], None], at_least: int
) -> None:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text(lines[0])  # fewer charts to draw
    poison(run_dir)
    html = write_report(run_dir).read_text("utf-8")
    page = Page(html)
    assert page.text.count(SHOWN) >= at_least
    assert "\u202e" not in html
    assert "\x1b" not in html
    assert "<img" not in html.lower()
    assert not {tag for tag, _ in page.tags} & {"b", "img", "iframe", "object", "form"}
    assert sum(tag == "script" for tag, _ in page.tags) == 1


@pytest.mark.usefixtures("undrawn")
def test_a_hostile_folder_name_stays_text(run_dir: Path) -> None:
    target = run_dir.with_name("<b>\u202e{{7*7}}")
    shutil.move(run_dir, target)
    html = write_report(target).read_text("utf-8")
    page = Page(html)
    assert page.texts["h1"] == ["<b>⟨U+202E⟩{{7*7}}"]
    assert "\u202e" not in html
    assert json.loads(page.texts["script"][0])["run"] == target.name


def test_readable_text_of_any_script_is_left_alone() -> None:
    plain = "naïve 中文 שלום می‌خواهم 👩‍🔬 a\tb\nc"
    assert visible(plain) == plain
    assert visible("a\ud800\u2066\ufeff\r") == "a⟨U+D800⟩⟨U+2066⟩⟨U+FEFF⟩⟨U+000D⟩"


def test_long_curves_are_thinned_with_their_spikes() -> None:
    y = [math.sin(i / 500) for i in range(20_000)]
    y[12_345] = 99.0
    x, kept = thin(range(20_000), y)
    assert len(x) <= 300
    assert 99.0 in kept
    assert (x[0], x[-1]) == (0, 19_999)
    assert x == sorted(x)
    assert thin([1, 2], [3, 4]) == ([1, 2], [3, 4])


def test_warnings_name_what_they_saw() -> None:
    rows = [metric_row(step) | {"completions/mean_length": 20.0} for step in range(30)]
    judged = {"win_rate": 0.3, "ci_low": 0.2, "ci_high": 0.4}
    figures = panels.summary("r", rows, judged, {}, [], [])
    assert verdict.warnings(figures, None, None) == [
        "The training reward rose, but the judge prefers the baseline."
    ]
    loops = Sample(prompt="p", before="a b c d e f", after="a b c a b c a b c")
    stats = panels.sample_stats([loops])
    calm = panels.summary("r", rows, {}, {}, [], [])
    assert "57% of their 3-grams" in verdict.warnings(calm, stats, None)[0]
    assert verdict.warnings(calm, None, None) == []
    assert verdict.warnings(calm, None, 0.9) != []


def test_wall_time_of_a_live_run_is_read_from_either_kind_of_clock() -> None:
    assert panels.wall_seconds([{"time": 2.0}, {"time": 30.0}], []) == 30.0
    assert panels.wall_seconds([{"time": 1.7e9}, {"time": 1.7e9 + 30}], []) == 30.0
    assert panels.wall_seconds([{"step": 0, "time": 1.7e9, "run/elapsed_s": 7.0}], []) == 7.0
    assert panels.wall_seconds([], []) is None


def test_only_everyday_events_are_folded() -> None:
    kinds = ["checkpoint", "checkpoint_damaged", "worker_lost", "swap", "something_new", None]
    notable = [kind for kind in kinds if panels.notable({"kind": kind})]
    assert notable == ["checkpoint_damaged", "worker_lost", "something_new", None]


def manifest_of(run: Path, command: str, status: str = "finished") -> None:
    content = {"command": command, "status": status, "created": "2026-01-02T03:04:05+0000"}
    (run / "manifest.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("command", "kept", "sections"),
    [
        ("sft", ["metrics.jsonl"], {"headline", "curves", "lineage", "config"}),
        ("evaluate", ["evaluation.json", "samples.jsonl"], {"headline", "samples", "hacking"}),
        ("reward-model", ["metrics.jsonl", "reward_model.json"], {"reward-model", "curves"}),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_only_what_belongs_to_a_command_is_missed(
    run_dir: Path, command: str, kept: list[str], sections: set[str]
) -> None:
    for name in FILES:
        if name not in (*kept, "config.toml"):
            (run_dir / name).unlink()
    manifest_of(run_dir, command)
    page = Page(write_report(run_dir).read_text("utf-8"))
    assert "cannot be shown" not in page.text
    assert json.loads((run_dir / "summary.json").read_text())["missing"] == []
    assert sections <= set(page.ids)
    assert {href[1:] for href in page.hrefs} <= set(page.ids)
    for absent in {"reward-model", "events", "samples", "timing"} - sections - {"timing"}:
        assert absent not in page.ids


@pytest.mark.parametrize("gone", ["metrics.jsonl", "events.jsonl"])
@pytest.mark.usefixtures("undrawn")
def test_what_a_command_should_have_written_is_missed(run_dir: Path, gone: str) -> None:
    manifest_of(run_dir, "train")
    (run_dir / gone).unlink()
    page = Page(write_report(run_dir).read_text("utf-8"))
    assert f"{gone}\n" in page.text
    assert "cannot be shown" in page.text


@pytest.mark.usefixtures("undrawn")
def test_the_title_says_what_the_run_is_and_what_came_of_it(run_dir: Path) -> None:
    manifest_of(run_dir, "train", "interrupted")
    (run_dir / "config.toml").write_text(
        '[model]\npath = "my-model"\n[data]\nprompts = "p.jsonl"\n[algorithm]\nadvantage = "rloo"\n'
        'loss = "ppo"\n'
    )
    page = Page(write_report(run_dir).read_text("utf-8"))
    for shown in (
        "The run was interrupted. The policy is better than the baseline: it wins 70.0%",
        *("my-model", "p.jsonl", "rloo advantage, ppo loss", "2026-01-02 03:04"),
    ):
        assert shown in page.text


@pytest.mark.parametrize(
    ("rate", "low", "high", "says"),
    [
        (0.7, 0.6, 0.8, "is better than the baseline"),
        (0.3, 0.2, 0.4, "is worse than the baseline"),
        (0.52, 0.45, 0.6, "No difference between policy and baseline can be told"),
    ],
)
def test_the_verdict_follows_the_interval(rate: float, low: float, high: float, says: str) -> None:
    judged = {"win_rate": rate, "ci_low": low, "ci_high": high}
    figures = panels.summary("r", [], judged, {}, [], [])
    assert says in verdict.verdict(figures, {}, [], [])


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ([0.0, 1.0], "The reward rose from 0 to 1 over 2 steps"),
        ([1.0, 0.0], "The reward fell from 1 to 0"),
        ([0.50, 0.52], "The reward hardly changed over 2 steps (0.5 to 0.52)"),
    ],
)
def test_the_verdict_of_a_training_run(scores: list[float], says: str) -> None:
    rows = [
        {"step": step, "objective/scores": score, "rewards/std": 0.5, "objective/kl": 521.3}
        for step, score in enumerate(scores)
    ]
    figures = panels.summary("r", rows, {}, {}, [], [])
    told = verdict.verdict(figures, {"status": "finished"}, rows, [])
    assert told.startswith(says)
    assert "5.2e+02" not in told


def test_a_failed_run_says_why(run_dir: Path) -> None:
    events = [{"kind": "run_failed", "cause": "worker-0 died\n  fix: more memory"}]
    figures = panels.summary("r", [], {}, {}, [], [])
    told = verdict.verdict(figures, {"status": "failed"}, [], events)
    assert told == "The run failed. Cause: worker-0 died"


@pytest.mark.usefixtures("undrawn")
def test_alarms_stand_at_the_top_with_their_steps(run_dir: Path) -> None:
    alarm = {"kind": "alarm", "time": 1.0, "value": 1.0, "limit": 1.0}
    lines = [
        {**alarm, "alarm": "kl-budget", "change": "start", "step": 12, "text": "The KL is high."},
        {**alarm, "alarm": "kl-budget", "change": "end", "step": 30, "text": "over"},
        {**alarm, "alarm": "entropy-collapse", "change": "start", "step": 40, "text": "Too sure."},
        {**alarm, "alarm": "entropy-collapse", "change": "again", "step": 60, "text": "Still so."},
    ]
    with (run_dir / "events.jsonl").open("a") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)
    html = write_report(run_dir).read_text("utf-8")
    for shown in (
        "From step 12 to 30: The KL is high.",
        "From step 40 to the end: Too sure. At step 60: Still so.",
        "an alarm begins, or the run goes back to a checkpoint (step 12, 40)",
    ):
        assert shown in html
    assert html.index("Too sure.") < html.index('id="headline"')
    assert json.loads((run_dir / "summary.json").read_text())["notable_events"] == 1


@pytest.mark.usefixtures("undrawn")
def test_cells_hold_words_and_no_json(run_dir: Path) -> None:
    preferences = {"agreement": {"annotators": 3, "raw": 0.81234}, "labels": [1, 2], "left": None}
    (run_dir / "preferences.json").write_text(json.dumps(preferences))
    page = Page(write_report(run_dir).read_text("utf-8"))
    assert "annotators 3, raw 0.812" in page.text
    assert '{"' not in page.text.replace(page.texts["script"][0], "")  # that is for programs


@pytest.mark.usefixtures("undrawn")
def test_a_judge_that_was_the_reward_is_a_warning(run_dir: Path) -> None:
    judged = json.loads((run_dir / "evaluation.json").read_text())
    (run_dir / "evaluation.json").write_text(json.dumps({**judged, "judge_was_reward": ["rm"]}))
    page = Page(write_report(run_dir).read_text("utf-8"))
    assert "The judge (rm) is what the policy was trained on" in page.text


def test_one_curve_per_reward_source_and_generation_does_not_end_at_zero() -> None:
    rows = [
        {
            "step": step,
            "rewards/brief/mean": 0.5,
            "rewards/kind/mean": 0.1,
            "rollout/tokens_per_s": 0.0 if step > 7 else 100.0,
        }
        for step in range(10)
    ]
    drawn = "".join(map(str, curves.curves(rows)))
    assert "Reward source brief, mean" in drawn
    assert "Reward source kind, mean" in drawn
    assert "generated over 8 steps: from 100 to 100" in drawn
    one = "".join(map(str, curves.curves([{"step": 1, "rewards/brief/mean": 0.5}])))
    assert "Reward source" not in one


def test_smoothing_takes_the_mean_of_what_is_around_a_point() -> None:
    line = [float(i) for i in range(50)]
    assert smooth(line, 5)[2:-2] == pytest.approx(line[2:-2])
    assert window(19) == 1
    assert window(60) == 7
    noisy = [0.0, 3.0, 0.0, 3.0, 0.0, 3.0, 0.0]
    assert smooth(noisy, 3) == pytest.approx([1.5, 1.0, 2.0, 1.0, 2.0, 1.0, 1.5])


def test_a_reward_source_may_have_any_name() -> None:
    rows = [{"step": 1, "rewards/\u0001<b>&$/mean": 0.5, "rewards/\ud800\u202e/mean": 0.1}]
    drawn = "".join(map(str, curves.curves(rows)))
    assert "Reward source ⟨U+0001⟩&lt;b&gt;&amp;$, mean" in drawn
    assert "⟨U+D800⟩⟨U+202E⟩" in drawn


def test_the_report_tells_what_a_reward_model_likes(run_dir: Path) -> None:
    figures = {
        "accuracy": 0.8,
        "length": {"correlation": 0.42, "accuracy_chosen_shorter": None},
        "ensemble": {"members": 3, "disagreement": 0.2},
        "slices": {"<b>refunds": {"pairs": 12, "accuracy": 0.75}, "odd": 3},
        "drift": "no",
    }
    (run_dir / "reward_model.json").write_text(json.dumps(figures))
    report = write_report(run_dir).read_text()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["reward_model_length_correlation"] == 0.42
    assert summary["reward_model_ensemble_members"] == 3
    assert "reward_model_length_accuracy_chosen_shorter" not in summary
    assert "correlation of score and length" in report
    assert "&lt;b&gt;refunds" in report
    assert "<b>refunds" not in report


def rated(policy: str, rating: float, **more: Any) -> dict[str, Any]:
    counts = {"win_rate": 0.7, "wins": 7, "ties": 0, "losses": 3}
    around = {"ci_low": rating - 20, "ci_high": rating + 20}
    return {"policy": policy, "rating": rating, **around, **counts, **more}


def test_a_ranking_is_shown_with_its_pairs_and_categories(tmp_path: Path) -> None:
    rate = {"win_rate": 0.25, "ci_low": 0.1, "ci_high": 0.4, "wins": 1, "ties": 0, "losses": 3}
    record = {
        "judge": "people",
        "ranking": [rated("tall" + HOSTILE, 90.0), rated("small", -90.0)],
        "policies": [{"policy": "small", "path": "runs/x" + HOSTILE, "mean_score": 0.5}],
        "comparisons": [{"policy": "tall", "baseline": "small", **rate}],
        "categories": {"math": {"small": rate}, "odd": 3},
        "people": {"annotators": 2, "agreement": {"percent_agreement": 0.8}},
        "not_judged": 1,
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(record))
    text = write_report(tmp_path).read_text("utf-8")
    page = Page(text)
    tables = "|".join(page.texts["td"] + page.texts["th"] + page.texts["caption"])
    for words in ("tall" + SHOWN, "+90", "25.0%", "math", "annotators", "By category"):
        assert words in tables, words
    assert "is the best of 2 policies" in text
    assert "window.broken" not in text
    assert len(re.findall(r'class="chart"', text)) == 1
    record["ranking"] = [rated("tall", 5.0), rated("small", -5.0), {"policy": "broken"}]
    (tmp_path / "evaluation.json").write_text(json.dumps(record))
    assert "which of the two is better cannot be told" in write_report(tmp_path).read_text("utf-8")


def test_reward_and_judge_are_drawn_against_distance(tmp_path: Path) -> None:
    rows = [
        {
            "step": step, "objective/scores": step, "objective/kl": step,
            "evaluation/score": -step, "evaluation/kl": 2.0 * step,
        }
        for step in range(1, 5)
    ]  # fmt: skip
    evaluation: dict[str, Any] = {
        "frontier": [{"step": n, "kl": float(n), "score": n % 2, "reward": n} for n in range(3)]
    }
    found = panels.frontier_charts(rows, evaluation)
    assert [text.split(" is ")[0].removeprefix("The highest of ") for _, text in found] == [
        "the training reward",
        "the judge's score",
        "the judge's score of the checkpoints",
        "the training reward of the checkpoints",
    ]
    assert "-1, at step 1, 1.41 from" in found[1][1]
    assert len(panels.frontier_charts(rows, None)) == 2
    assert panels.frontier_charts([], {"frontier": [3]}) == []
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    page = write_report(tmp_path).read_text("utf-8")
    assert len(set(re.findall(r'id="(frontier[\w-]*-title)"', page))) == 2
