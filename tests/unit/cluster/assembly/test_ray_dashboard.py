"""What Ray is told of the page, and what is left alone. Ray itself: `tests/browser`."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from cluster.assembly.ray_dashboard import exports, ray_tab_of
from cluster.contracts.config.base import ClusterConfig
from cluster.contracts.errors import UserError
from cluster.machine.page_token import known_page_token, page_token_file
from cluster.pages.ray_tab import LiveBoard
from cluster.pages.server import listen

NAMES = ("RAY_GRAFANA_HOST", "RAY_GRAFANA_IFRAME_HOST", "RAY_PROMETHEUS_HOST")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (*NAMES, "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_cluster_that_is_started_is_told_the_page_and_nobody_after_it(tmp_path: Path) -> None:
    with ray_tab_of(ClusterConfig(dashboard=True)) as tab:
        told = {name: os.environ[name] for name in NAMES}
        server = tab.serve(LiveBoard(tmp_path, "s"), "127.0.0.1:8270")
        assert server is not None
        assert told["RAY_GRAFANA_HOST"] == server.url.rstrip("/")
        token = server.url_with_token.partition("token=")[2]
        assert told["RAY_GRAFANA_IFRAME_HOST"] == f"{server.url}{token}"
    assert not any(name in os.environ for name in NAMES)


def test_where_the_usual_port_is_taken_ray_is_told_another() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with ray_tab_of(ClusterConfig(dashboard=True, page_port=port)) as tab:
            assert tab.listening is not None
            own = tab.listening.getsockname()[1]
            assert own != port
            assert os.environ["RAY_GRAFANA_HOST"] == f"http://127.0.0.1:{own}"


def test_a_grafana_of_the_users_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_GRAFANA_HOST", "http://grafana.example:3000")
    with ray_tab_of(ClusterConfig(dashboard=True)) as tab:
        assert os.environ["RAY_GRAFANA_HOST"] == "http://grafana.example:3000"
        assert tab.serve(LiveBoard(tmp_path, "s"), "127.0.0.1:8265") is None
    assert os.environ["RAY_GRAFANA_HOST"] == "http://grafana.example:3000"


def test_without_the_dashboard_there_is_no_page(tmp_path: Path) -> None:
    with ray_tab_of(ClusterConfig(dashboard=False)) as tab:
        assert not any(name in os.environ for name in NAMES)
        assert tab.serve(LiveBoard(tmp_path, "s"), None) is None


def test_a_run_that_joins_serves_where_the_head_was_told(tmp_path: Path) -> None:
    config = ClusterConfig(address="10.0.0.1:6379", page_port=18266)
    with ray_tab_of(config) as tab:  # nobody asked for `accord dashboard env`
        assert tab.listening is None
    told = exports(18266)
    with ray_tab_of(config) as tab:
        server = tab.serve(LiveBoard(tmp_path, "s"), "10.0.0.1:8265")
        assert server is not None
        token = server.url_with_token.partition("token=")[2]
        assert told["RAY_GRAFANA_IFRAME_HOST"] == f"http://127.0.0.1:18266/{token}"
        with ray_tab_of(config) as second:  # the first run has the page
            assert second.listening is None


def test_the_kept_token_is_for_its_owner_alone() -> None:
    first = exports(8266)
    assert exports(8266) == first
    file = page_token_file()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    file.chmod(0o644)
    with pytest.raises(UserError, match="may be read by other users"):
        known_page_token()
    file.chmod(0o600)
    file.write_text("short\n")
    with pytest.raises(UserError, match="is damaged"):
        known_page_token()
