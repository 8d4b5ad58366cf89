"""The page in Ray's dashboard, over a real socket: what is open, what is framed, what it shows."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.contracts.live import (
    Bottleneck,
    History,
    LearnerView,
    LiveView,
    QueueView,
    RewardView,
    StalenessView,
    WeightsView,
    WorkerView,
)
from cluster.pages.access import Access
from cluster.pages.ray_tab import OPEN_PATHS, LiveBoard, ray_tab
from cluster.pages.server import PageServer

TOKEN = "the-token-of-this-test"
DASHBOARD = "http://127.0.0.1:8265"
HOSTILE = "<script>alert(1)</script>"


def view(at: float = 0.0, workers: int = 2, **changes: Any) -> LiveView:
    moments = (1_000.0, 1_002.0, 1_004.0)
    return replace(
        LiveView(
            run="mine",
            time=1_000.0 + at,
            step=41,
            steps=100,
            elapsed_s=60.0,
            tokens_per_s=1234.0,
            workers=tuple(
                WorkerView(name=f"worker-{i}", status="serving", tokens_per_s=100.0 + i)
                for i in range(workers)
            ),
            workers_by_status={"serving": workers},
            learner=LearnerView(state="training", state_s=3.0),
            rewards=RewardView(),
            queue=QueueView(ready=1, per_step=4),
            weights=WeightsView(published=41, held=40, sending=True),
            staleness=StalenessView(bound=1, mean=0.5, max=1.0),
            bottleneck=Bottleneck(
                stage="reward", shares={"rollout": 0.4, "reward": 0.6}, why="Because.", advice="Do."
            ),
            history=History(
                moments, (1.0, 2.0, 3.0), (0.1, 0.2, 0.3), (None, 0.5, 1.0), (0, 1, 2), (2, 2, 2)
            ),
            addresses={},
        ),
        **changes,
    )


class Site:
    def __init__(self, board: LiveBoard) -> None:
        self.board = board
        access = Access(token=TOKEN, framed_by=(DASHBOARD,), open_paths=OPEN_PATHS)
        self.server = PageServer(ray_tab(board), access, "127.0.0.1", 0)

    def get(self, path: str) -> tuple[int, dict[str, str], str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read().decode()
        connection.close()
        return answer.status, {n.lower(): v for n, v in answer.getheaders()}, body


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(LiveBoard(tmp_path, "session_ours"))
    yield made
    made.server.stop()


def test_rays_head_finds_a_grafana_and_a_prometheus_without_the_token(site: Site) -> None:
    assert json.loads(site.get("/api/health")[2]) == {"database": "ok"}
    for path in ("/api/v1/query?query=up", "/api/v1/query_range?query=up"):
        assert json.loads(site.get(path)[2])["status"] == "success"


@pytest.mark.parametrize("path", ["/", "/d/uid/", "/d-solo/uid/x?panelId=41", "/parts/whole"])
def test_nothing_of_the_run_is_told_without_the_token(site: Site, path: str) -> None:
    site.board(view())
    status, _, body = site.get(path)
    assert (status, "mine" in body) == (401, False)
    assert site.get(f"/wrong{path}")[0] == 401
    assert site.get(f"/{TOKEN}{path}")[0] == 200


def test_the_frame_has_all_it_needs_below_its_token(site: Site) -> None:
    site.board(view())
    _, headers, body = site.get(f"/{TOKEN}/d/uid/?theme=dark&var-SessionName=session_ours")
    assert f"frame-ancestors {DASHBOARD}" in headers["content-security-policy"]
    assert "x-frame-options" not in headers
    assert 'data-theme="dark"' in body
    assert f'href="/{TOKEN}/static/pages.css"' in body
    assert f'data-live="/{TOKEN}/parts/whole?theme=dark' in body
    assert site.get(f"/{TOKEN}/static/pages.css")[0] == 200
    assert site.get(f"/{TOKEN}/static/pages.js")[0] == 200


def test_the_page_says_where_the_run_stands(site: Site) -> None:
    site.board(view())
    site.board(view(2.0))
    body = site.get(f"/{TOKEN}/parts/whole")[2]
    for text in ("Accord: mine", "1,234", "waits for: reward", "Because. Do.", "worker-1"):
        assert text in body
    assert body.count("<polyline") >= 4


def test_the_overview_has_throughput_and_learner(site: Site) -> None:
    site.board(view())
    throughput = site.get(f"/{TOKEN}/d-solo/uid/x?panelId=41")[2]
    learner = site.get(f"/{TOKEN}/d-solo/uid/x?panelId=24")[2]
    assert "Generated tokens per second, by worker" in throughput
    assert "Learner, percent" in learner
    assert "panelId=24" in learner  # its later requests ask for the same chart


def test_before_the_first_numbers_the_page_says_so(site: Site) -> None:
    assert "The run is starting" in site.get(f"/{TOKEN}/d/uid/")[2]


def test_another_session_of_ray_is_not_taken_for_ours(site: Site) -> None:
    site.board(view())
    body = site.get(f"/{TOKEN}/d/uid/?var-SessionName=session_other")[2]
    assert "No run of Accord is in Ray&#39;s session session_other" in body or (
        "No run of Accord is in Ray's session session_other" in body
    )
    assert "1,234" not in body


def test_hostile_text_is_text(site: Site) -> None:
    site.board(view(run=HOSTILE))
    row = {"time": 1.0, "kind": HOSTILE, "cause": HOSTILE + "\u202e"}
    (site.board.run_path / "events.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    for path in ("d/uid/", f"d/uid/?var-SessionName={HOSTILE}", f"d/uid/?theme={HOSTILE}"):
        body = site.get(f"/{TOKEN}/{path}".replace("<", "%3C").replace(">", "%3E"))[2]
        assert HOSTILE not in body
        assert "\u202e" not in body


def test_many_workers_share_a_line(site: Site) -> None:
    for at in range(3):
        site.board(view(2.0 * at, workers=300))
    chart = site.board.throughput()
    assert chart is not None
    assert [line.label for line in chart.lines][-2:] == ["worker-6", "the other 293"]
    assert len(chart.lines) == 8
