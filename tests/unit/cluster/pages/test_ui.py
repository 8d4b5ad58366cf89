"""The pages of `accord ui`, over run directories that the real writers made."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from fastapi.testclient import TestClient

from cluster.contracts.errors import UserError
from cluster.pages.library import library_of
from cluster.pages.ui import ui_app
from cluster.runs.control import ask

PARTS = ("facts", "curves", "workers", "events")
PLACES = ("run", "events", "samples", "files", *(f"part/{name}" for name in PARTS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, run_dirs: ModuleType) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    run_dirs.one_of_each(folder, "ppo")
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    # An error in a page is an error of the test, not a page about an error.
    with TestClient(ui_app(library_of(folder))) as client:
        yield client


def text_of(html: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def test_the_first_page_tells_the_state_of_every_run(client: TestClient) -> None:
    rows = re.findall(r"<tr[^>]*>.*?</tr>", client.get("/").text, re.DOTALL)
    states = {}
    for row in rows[1:]:
        key = re.findall(r'value="([^"]+)"', row)[0]
        states[key] = re.findall(r'class="status[^>]*>([^<]+)<', row)[0]
    assert states == {
        "live": "running",
        "hostile": "running",
        "first": "finished",
        "second": "finished",
        "quick": "finished",
        "quick/ppo": "finished",
        "gone": "dead",
        "torn": "dead",
        "cut": "damaged",
    }
    live = text_of(next(row for row in rows if 'value="live"' in row))
    assert "step" not in live
    assert "40 of 60" in live
    assert re.search(r"reward \+0\.\d{3}", live)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "key", ["live", "hostile", "first", "gone", "torn", "cut", "quick", "quick/ppo"]
)
def test_every_state_of_a_run_has_every_page(client: TestClient, key: str, place: str) -> None:
    answer = client.get(f"/{place}/{key}")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"


def test_a_running_run_shows_numbers_bottleneck_and_workers(client: TestClient) -> None:
    told = text_of(client.get("/run/live").text)
    assert "The run waits for: rollout." in told
    assert "Add workers: accord scale RUN 4." in told
    assert "931" in told
    assert "KL is above its budget." in told
    assert "serving, does not answer" in told  # worker-2
    html = client.get("/part/workers/live").text
    assert html.count("lost-mark") == 1
    assert "worker-1 served" in html
    assert "its process was killed" in html


def test_old_numbers_are_not_shown_as_todays(
    client: TestClient, folder: Path, run_dirs: ModuleType
) -> None:
    run_dirs.training(folder, "quiet")
    run_dirs.touch(folder / "quiet" / "live.json", 60)
    assert "The run waits for" not in client.get("/run/quiet").text


def test_curves_are_drawn_with_ticks_and_told_in_words(client: TestClient) -> None:
    html = client.get("/part/curves/first").text
    assert html.count("<figure") == 6
    assert "reward over 60 steps: from" in html
    points = re.findall(r'points="([^"]+)"', html)
    assert all(re.fullmatch(r"(\d+\.\d,\d+\.\d ?)+", one) for one in points)


def test_a_page_follows_a_run(client: TestClient, folder: Path, run_dirs: ModuleType) -> None:
    run = run_dirs.training(folder, "going", steps=5)
    assert "step 5 of 60" in text_of(client.get("/part/facts/going").text)
    run_dirs.add_step(run, 6)
    run.event("worker_lost", worker="worker-0", cause="the network")
    assert "step 6 of 60" in text_of(client.get("/part/facts/going").text)
    assert "over 6 steps" in client.get("/part/curves/going").text
    assert "the network" in client.get("/part/events/going").text
    assert "paused" not in client.get("/part/facts/going").text
    ask(run.path, paused=True)
    assert "paused" in client.get("/part/facts/going").text
    run_dirs.end(run, "stopped")
    told = client.get("/part/facts/going").text
    assert "stopped" in told
    assert "paused" not in told


def test_a_run_that_went_away_is_a_page_that_says_so(
    client: TestClient, folder: Path, run_dirs: ModuleType
) -> None:
    run = run_dirs.training(folder, "passing", steps=5)
    assert client.get("/run/passing").status_code == 200
    (run.path / "manifest.json").unlink()
    assert client.get("/run/passing").status_code == 404
    assert "There is no run passing" in client.get("/part/facts/passing").text


# -- completions ----------------------------------------------------------------------------------


def scores(html: str) -> list[float]:
    return [float(found) for found in re.findall(r"score (-?[\d.]+) <span", html)]


def test_completions_are_ordered_searched_and_told_with_versions(client: TestClient) -> None:
    best = client.get("/samples/live").text
    assert scores(best) == sorted(scores(best), reverse=True)
    assert scores(best)[0] == 0.875
    worst = client.get("/samples/live?order=worst").text
    assert scores(worst)[0] == -1.0
    drawn = client.get("/samples/live?order=random").text
    assert scores(drawn) != scores(best)
    assert drawn == client.get("/samples/live?order=random").text
    assert "sampled by policy versions 38 to 39, staleness 1" in best
    assert "cut at rollout.max_tokens" in best
    assert "brief +0.875, kind +0.500" in best
    found = client.get("/samples/live?find=PART 3").text
    assert "2 of 16 completions of step 40" in found
    assert "completions of step 1;" in client.get("/samples/live?step=1").text


def test_pages_of_completions(client: TestClient) -> None:
    first, second = client.get("/samples/live").text, client.get("/samples/live?page=2").text
    assert len(scores(first)) == 12
    assert len(scores(second)) == 4
    assert "page 1 of 2" in first
    assert scores(client.get("/samples/live?page=999").text) == scores(second)


def test_before_and_after(client: TestClient) -> None:
    html = client.get("/samples/quick").text
    assert "prompts, before and after training" in html
    assert "Before" in html


def test_bad_questions_are_answered_plainly(client: TestClient) -> None:
    assert "holds no completions of step 7" in client.get("/samples/live?step=7").text
    assert "is damaged" in client.get("/samples/torn").text
    for path in (
        "/samples/live?step=x",
        "/samples/live?page=-1",
        "/samples/live?find=" + "x" * 300,
        "/sample/40/x/live",
    ):
        assert client.get(path).status_code == 422, path
    assert client.get("/sample/40/99/live").status_code == 404
    assert client.get("/samples/live?order=nonsense").status_code == 200


def test_hostile_texts_are_text(client: TestClient, run_dirs: ModuleType) -> None:
    pages = [client.get(f"/{place}/{key}").text for place in PLACES for key in ("hostile", "quick")]
    step = 40
    pages += [client.get(f"/sample/{step}/{at}/hostile").text for at in range(16)]
    for html in pages:
        assert "<script>window" not in html
        assert "<img" not in html
        assert "javascript:" not in "".join(re.findall(r'(?:href|src)="([^"]*)"', html))
        for hidden in "\x00\x07\x1b\x9b\u202e\u202c\u2066\u2069\u200b\ufeff\u2028\u2029\x85":
            assert hidden not in html, hex(ord(hidden))
    together = "".join(pages)
    assert "&lt;script&gt;window.broken = 1" in together
    assert "⟨U+202E⟩001$" in together
    assert "⟨U+001B⟩[31m" in together
    assert "{{ 7 * 7 }}" in together


def test_a_completion_of_a_megabyte_is_cut_and_has_a_page_of_its_own(client: TestClient) -> None:
    listed = client.get("/samples/hostile?find=xxxx").text
    assert len(listed) < 200_000
    place = re.findall(r'href="(/sample/[^"]+)"', listed)[0]
    assert "x" * 1_000_000 in client.get(place).text


# -- files ----------------------------------------------------------------------------------------


def test_files_are_downloaded_whole_and_never_shown(client: TestClient, folder: Path) -> None:
    assert "rollouts/step-000039.parquet" in client.get("/files/live").text
    for name in ("config.toml", "rollouts/step-000039.parquet"):
        answer = client.get("/download/live", params={"file": name})
        assert answer.content == (folder / "live" / name).read_bytes()
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["content-disposition"].startswith("attachment;")


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../first/config.toml",
        "rollouts/../../first/config.toml",
        "/etc/hostname",
        "rollouts",
        "rollouts/",
        "no-such-file",
        "x\0y",
        "x" * 5000,
        "way-out",
        "way-out-folder/config.toml",
        "pipe",
    ],
)
def test_nothing_outside_a_run_is_handed_out(folder: Path, client: TestClient, name: str) -> None:
    run = folder / "live"
    for link, target in (("way-out", "first/config.toml"), ("way-out-folder", "first")):
        if not (run / link).is_symlink():
            (run / link).symlink_to(folder / target)
    if not (run / "pipe").exists():
        os.mkfifo(run / "pipe")
    assert client.get("/download/live", params={"file": name}).status_code == 404
    listed = client.get("/files/live").text
    assert "way-out" not in listed
    assert "pipe" not in listed


@pytest.mark.parametrize("key", ["live/..", "%2e%2e", "first/rollouts", "x"])
def test_only_run_directories_are_shown(client: TestClient, key: str) -> None:
    for place in PLACES:
        assert client.get(f"/{place}/{key}").status_code in (404, 422)


def test_a_key_is_never_made_a_path(folder: Path) -> None:
    for key in ("..", ".", "", "live/..", "../" + folder.name + "/live", "/etc", "live/\0"):
        assert library_of(folder).shelf(key) is None


def test_a_report_opens_in_a_sandbox(client: TestClient) -> None:
    answer = client.get("/report/first")
    assert "The report" in answer.text
    assert answer.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
    assert client.get("/report/live").status_code == 404


# -- comparison -----------------------------------------------------------------------------------


def test_runs_are_compared(client: TestClient) -> None:
    html = client.get("/compare?run=first&run=second&run=live").text
    told = text_of(html)
    assert "Comparison of 3 runs" in told
    assert "61.0% 51.0% to 71.0%" in told
    assert "not evaluated" in told
    assert html.count("<polyline") >= 3 * 6
    assert "A over 60 steps" in html
    assert "C over 40 steps" in html


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("", 400),
        ("?run=first", 400),
        ("?run=first&run=first", 400),
        ("?run=" + "&run=".join(["first", "second", "live", "gone", "torn"]), 400),
        ("?run=first&run=none", 404),
        ("?run=torn&run=cut", 200),
    ],
)
def test_what_cannot_be_compared_is_said(client: TestClient, query: str, status: int) -> None:
    assert client.get(f"/compare{query}").status_code == status


# -- what is served, and what it costs ------------------------------------------------------------


def test_one_run_alone(folder: Path) -> None:
    client = TestClient(ui_app(library_of(folder / "quick")))
    assert client.get("/run/quick/ppo").status_code == 200
    assert client.get("/run/first").status_code == 404
    assert "first" not in client.get("/").text


def test_a_place_that_is_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        library_of(tmp_path / "none")
    client = TestClient(ui_app(library_of(tmp_path)))
    assert "There are no runs in this folder yet" in client.get("/").text


def test_a_hundred_runs_are_read_once(
    tmp_path: Path, run_dirs: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster.pages import library

    first = run_dirs.training(tmp_path, "run-000", steps=2)
    for n in range(1, 100):
        path = tmp_path / f"run-{n:03d}"
        path.mkdir()
        for name in ("manifest.json", "config.toml", "metrics.jsonl"):
            (path / name).write_bytes((first.path / name).read_bytes())
    read: list[str] = []
    overview = library.overview
    monkeypatch.setattr(
        library, "overview", lambda path, key, **kw: read.append(key) or overview(path, key, **kw)
    )
    client = TestClient(ui_app(library_of(tmp_path)))
    assert client.get("/part/runs").text.count("<tr") == 101
    assert len(read) == 100
    client.get("/part/runs")
    assert len(read) == 100
    run_dirs.add_step(first, 3)
    client.get("/part/runs")
    assert len(read) == 101


def test_a_million_lines_cost_a_glance(tmp_path: Path, run_dirs: ModuleType) -> None:
    run = run_dirs.training(tmp_path, "long", steps=2)
    with (run.path / "metrics.jsonl").open("w") as file:
        for start in range(1, 1_000_001, 50_000):
            file.write(
                "".join(
                    f'{{"step": {step}, "time": {step}.0, "objective/scores": {step % 97}.5}}\n'
                    for step in range(start, start + 50_000)
                )
            )
    client = TestClient(ui_app(library_of(tmp_path)))
    begun = time.process_time()
    html = client.get("/run/long").text
    assert time.process_time() - begun < 5.0  # reading all of it takes longer
    assert "1000000 of 60" in text_of(html)
    assert "Some steps are left out" in html
    assert len(html) < 500_000


def test_a_run_of_another_release_has_a_page(tmp_path: Path, run_dirs: ModuleType) -> None:
    run = run_dirs.training(tmp_path, "r")
    live = json.loads((run.path / "live.json").read_text())
    live["workers"][0] = {"name": 7, "status": None, "tokens_per_s": "many", "busy": {}}
    live |= {"tokens_per_s": None, "staleness": {"mean": "x", "new": 1}, "added": True}
    (run.path / "live.json").write_text(json.dumps(live))
    client = TestClient(ui_app(library_of(tmp_path)))
    for place in PLACES:
        assert client.get(f"/{place}/r").status_code == 200
