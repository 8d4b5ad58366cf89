"""A run as Ray's dashboard shows it in Chromium, and every query of our Grafana panels asked of a
real Prometheus that scrapes the same run.

Debian: `apt-get install chromium prometheus`. Elsewhere ACCORD_PROMETHEUS names the program.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.contracts.live import read_live
from cluster.runs.grafana import build_dashboard, exported_name

pytestmark = pytest.mark.browser

DEADLINE_S = 120.0
RUN = "seen"
WORDS = ("battery", "screen", "hours", "broken", "great", "how", "long", "does", "it", "last")
CONFIG = """
[run]
dir = "{folder}/runs"
name = "seen"
[model]
path = "{folder}/policy"
[data]
prompts = "{folder}/prompts.jsonl"
[batch]
prompts_per_step = 4
samples_per_prompt = 2
steps = 100000
[rollout]
engine = "transformers"
max_tokens = 16
workers = 2
[staleness]
bound = 1
[evaluation]
every = 5
prompts = "{folder}/held_out.jsonl"
keep_best = false
[logging]
tensorboard = false
samples_every = 0
[cluster]
object_store_mb = 80
dashboard = true
[[reward.sources]]
type = "rules"
max_words = 1
"""


def until(
    reached: Callable[[], Any], what: str, page: Any = None, seconds: float = DEADLINE_S
) -> Any:
    """``page``: what happens in it is only noticed while it is asked to wait."""
    deadline = time.monotonic() + seconds
    while not (found := reached()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:.0f} s for {what}")
        if page is None:
            time.sleep(0.3)
        else:
            page.wait_for_timeout(300)
    return found


@dataclass(frozen=True)
class Seen:
    """The run that goes on."""

    path: Path
    dashboard: str
    page: str
    metrics_port: int
    token: str

    def ray(self, path: str) -> Any:
        """What Ray's dashboard answers."""
        known = {"Authorization": f"Bearer {self.token}"}
        answer = httpx.get(self.dashboard + path, headers=known, timeout=60)
        return answer.json()["data"]["result"]["result"]


def _ray_token() -> str:
    from cluster.machine.ray_token import token_file

    return os.environ.get("RAY_AUTH_TOKEN") or token_file().read_text().strip()


@pytest.fixture(scope="module")
def seen(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """A real run with Ray's dashboard on, until the tests are through."""
    from learner.models.tiny import fresh_model, train_tokenizer

    folder = tmp_path_factory.mktemp("seen")
    tokenizer = train_tokenizer([" ".join(WORDS)] * 3, 320, folder / "policy")
    fresh_model(tokenizer, folder / "policy", hidden=64, layers=2, heads=2, intermediate=64)
    rows = [{"prompt": [{"role": "user", "content": f"{WORDS[i % 10]} {i}"}]} for i in range(16)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    held = [{"prompt": [{"role": "user", "content": f"{word} broken"}]} for word in WORDS]
    (folder / "held_out.jsonl").write_text("\n".join(map(json.dumps, held)) + "\n")
    (folder / "c.toml").write_text(CONFIG.format(folder=folder))
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("RAY_GRAFANA", "RAY_PROM"))}
    with (folder / "err").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, str(repo_root / "launch.py"), "train", "c.toml"],
            cwd=folder,
            env=kept | {"ACCORD_NO_BOOTSTRAP": "1"},
            stdout=subprocess.DEVNULL,
            stderr=err,
            start_new_session=True,
        )
    path = folder / "runs" / RUN
    try:

        def trains() -> bool:
            assert process.poll() is None, (folder / "err").read_text()
            live = read_live(path)
            return live is not None and live.step >= 3 and live.tokens_per_s > 0

        until(trains, "a run that trains")
        live = read_live(path)
        assert live is not None
        events = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
        port = next(e["metrics_port"] for e in events if e["kind"] == "cluster")
        addresses = live.addresses
        yield Seen(path, addresses["dashboard"], addresses["page"], int(port), _ray_token())
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:  # with all that it has started
            os.killpg(process.pid, signal.SIGKILL)


# -- Ray's dashboard ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tab(seen: Seen, chromium: Any) -> Iterator[Any]:
    """A tab of a browser that has given Ray's token to its dashboard."""
    context = chromium.new_context(viewport={"width": 1400, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(1000 * DEADLINE_S)
    page.goto(seen.dashboard)
    page.fill("input[type=password]", seen.token)
    page.get_by_role("button", name="Submit").click()
    page.wait_for_selector("input[type=password]", state="detached")
    yield page
    context.close()


def frames(page: Any, part: str) -> list[Any]:
    return [frame for frame in page.frames if part in frame.url]


def tokens_per_s(frame: Any) -> str:
    figure = frame.locator(".figure", has_text="generated tokens per second")
    return str(figure.locator("strong").inner_text())


def test_the_metrics_tab_shows_the_run_and_its_throughput_moves(
    seen: Seen, tab: Any, keep_picture: Any
) -> None:
    amiss: list[str] = []
    tab.on("console", lambda m: amiss.append(m.text) if "Content Security" in m.text else None)
    tab.goto(f"{seen.dashboard}/#/metrics")
    frame = until(lambda: frames(tab, "/d/"), "the frame of the Metrics tab", tab)[0]
    frame.wait_for_selector("figure.plot polyline")
    assert frame.locator("h1").inner_text() == f"Accord: {RUN}"
    assert {"worker-0", "worker-1"} <= set(frame.locator("th[scope=row]").all_inner_texts())
    assert "The run waits for:" in frame.locator(".bottleneck").inner_text()
    step = frame.locator(".standing").inner_text()
    rate = tokens_per_s(frame)
    until(lambda: tokens_per_s(frame) != rate, "another throughput", tab)
    until(lambda: frame.locator(".standing").inner_text() != step, "another step", tab)
    keep_picture(tab, "ray-metrics", whole=False)
    assert amiss == []


def test_the_overview_shows_throughput_and_learner(seen: Seen, tab: Any, keep_picture: Any) -> None:
    tab.goto(f"{seen.dashboard}/#/overview")
    until(lambda: len(frames(tab, "/d-solo/")) == 2, "the two frames of the Overview", tab)
    titles = set()
    for frame in frames(tab, "/d-solo/"):
        frame.wait_for_selector("figure.plot polyline")
        titles.add(frame.locator("figcaption").inner_text().split(",")[0])
    assert titles == {"Generated tokens per second", "Learner"}
    keep_picture(tab, "ray-overview", whole=False)


def test_actors_and_steps_have_names(seen: Seen, tab: Any, keep_picture: Any) -> None:
    named = {f"{RUN}/{role}" for role in ("learner", "reward", "worker-0", "worker-1")}
    tab.goto(f"{seen.dashboard}/#/actors")
    until(
        lambda: all(tab.get_by_text(name).count() for name in named), "the names of the actors", tab
    )
    keep_picture(tab, "ray-actors", whole=False)
    tab.goto(f"{seen.dashboard}/#/jobs")
    tab.get_by_text("launch.py train").first.wait_for()
    keep_picture(tab, "ray-jobs", whole=False)
    tasks = seen.ray("/api/v0/tasks/summarize")["node_id_to_summary"]["cluster"]["summary"]
    assert [name for name in tasks if "tok/s, staleness" in name and name.startswith("step ")]


def test_the_page_is_for_who_has_its_token_and_for_the_dashboards_frame(seen: Seen) -> None:
    place, _, token = seen.page.partition("?token=")
    assert httpx.get(f"{place}d/some-uid/", timeout=60).status_code == 401
    answer = httpx.get(f"{place}{token}/d/some-uid/?theme=dark", timeout=60)
    assert 'data-theme="dark"' in answer.text
    allowed = answer.headers["content-security-policy"].split("frame-ancestors ")[1].split()
    assert seen.dashboard in allowed
    assert all(origin.endswith(f":{seen.dashboard.rpartition(':')[2]}") for origin in allowed)
    other = f"{place}{token}/d/some-uid/?var-SessionName=session_of_somebody"
    told = httpx.get(other, timeout=60).text
    assert "No run of Accord is in" in told
    assert "session_of_somebody" in told


# -- Prometheus -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prometheus(seen: Seen, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    program = shutil.which(os.environ.get("ACCORD_PROMETHEUS", "prometheus"))
    if program is None:
        pytest.skip("no Prometheus: apt-get install prometheus, or name it in ACCORD_PROMETHEUS")
    folder = tmp_path_factory.mktemp("prometheus")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "p.yml").write_text(
        "global: {scrape_interval: 1s}\n"
        "scrape_configs:\n"
        f"- {{job_name: ray, static_configs: [{{targets: ['127.0.0.1:{seen.metrics_port}']}}]}}\n"
    )
    process = subprocess.Popen(
        [
            program,
            f"--config.file={folder}/p.yml",
            f"--storage.tsdb.path={folder}/db",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=error",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(30)


def answers(prometheus: str, query: str) -> list[Any]:
    try:
        answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": query}, timeout=60)
    except httpx.TransportError:  # it is still starting
        return []
    if answer.status_code == 503:  # so is this
        return []
    assert answer.status_code == 200, f"{query}: {answer.text}"
    return list(answer.json()["data"]["result"])


def test_every_query_of_our_panels_has_an_answer(prometheus: str) -> None:
    dashboard = build_dashboard()
    queries = {
        target["expr"].replace("$run", RUN)
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    }
    queries.add(f"count by (run) ({exported_name('run/step')})")  # the list of runs
    empty = set(queries)

    def answered() -> bool:
        for query in list(empty):
            if answers(prometheus, query):
                empty.discard(query)
        return not empty

    deadline = time.monotonic() + 60
    while not answered() and time.monotonic() < deadline:
        time.sleep(1.0)
    assert sorted(empty) == []
    assert len(queries) > 25
    by_worker = answers(prometheus, f'ray_accord_live_worker_version{{run="{RUN}"}}')
    assert {row["metric"]["worker"] for row in by_worker} == {"worker-0", "worker-1"}
    assert answers(prometheus, "ray_accord_live_tokens_per_sec") == []  # a name that nobody writes
