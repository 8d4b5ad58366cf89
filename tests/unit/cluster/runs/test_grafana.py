from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from cluster.contracts.errors import UserError
from cluster.runs.grafana import (
    build_dashboard,
    exported_name,
    install,
    uninstall,
    unknown_metrics,
    write_dashboard,
)

KNOWN = (
    *("objective/scores", "objective/rlhf_reward", "objective/kl", "policy/entropy"),
    *("policy/clipfrac", "completions/mean_length", "completions/max_length"),
    *("value/explained_var", "perf/throughput", "rollout/tokens_per_s", "time/step"),
    *("time/wait_batch", "perf/trainer_idle_frac", "perf/rollout_idle_frac"),
    *("async/staleness_mean", "async/staleness_max", "async/queue_depth", "async/in_flight"),
    *("weight_sync/seconds", "weight_sync/pause_s", "weight_sync/canary_logp_diff"),
    *("evaluation/score", "evaluation/win_rate", "evaluation/ci_low", "evaluation/ci_high"),
    *("workers/alive", "workers/joined", "workers/left", "workers/restarts", "run/step"),
)
LIVE = (
    *("live/worker_tokens_per_s", "live/wait_share", "live/workers", "live/queue_ready"),
    *("live/worker_heartbeat_age_s", "live/learner_heartbeat_age_s", "live/learner_state_s"),
    *("live/queue_in_flight", "live/reward_waiting"),
)


def panels() -> list[dict[str, Any]]:
    return list(build_dashboard()["panels"])


def test_the_file_is_valid_json_and_whole(tmp_path: Path) -> None:
    path = write_dashboard(tmp_path / "made" / "here")
    assert json.loads(path.read_text("utf-8")) == build_dashboard()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_panel_ids_and_query_letters_are_unique() -> None:
    ids = [panel["id"] for panel in panels()]
    assert len(ids) == len(set(ids))
    assert min(ids) > 2000  # Ray's own dashboard uses the lower ones
    for panel in panels():
        letters = [target["refId"] for target in panel.get("targets", [])]
        assert len(letters) == len(set(letters))


def test_every_query_asks_for_a_metric_that_is_written() -> None:
    dashboard = build_dashboard()
    known = {*KNOWN, *LIVE}
    assert unknown_metrics(dashboard, known) == []
    assert unknown_metrics(dashboard, known - {"objective/kl"}) == ["ray_accord_objective_kl"]
    assert unknown_metrics(dashboard, known - {"run/step"}) == ["ray_accord_run_step"]
    for panel in panels():
        for target in panel.get("targets", []):
            assert re.fullmatch(
                r'max by \(run(, \w+)?\) \(ray_accord_\w+\{run=~"\$run"\}\)', target["expr"]
            )


def test_every_name_is_one_the_code_writes() -> None:
    root = Path(__file__).parents[4]
    files = [p for role in ("actors", "learner", "cluster") for p in (root / role).rglob("*.py")]
    own = {"grafana.py", "panels.py", "frontier.py", "progress.py"}
    source = "\n".join(p.read_text("utf-8") for p in files if p.name not in own)

    def written(name: str) -> bool:
        group, rest = name.split("/")
        return f'"{name}"' in source or (f'"{group}/"' in source and f'"{rest}"' in source)

    assert [name for name in KNOWN if not written(name)] == []
    assert not written("policy/nonsense")


def test_what_people_look_for_is_there() -> None:
    titles = {panel["title"] for panel in panels()}
    wanted = {"Throughput", "Staleness", "Reward", "KL to the reference", "Workers"}
    assert wanted <= titles


def test_panels_do_not_lie_on_each_other() -> None:
    places = [panel["gridPos"] for panel in panels()]
    assert all(p["x"] + p["w"] <= 24 for p in places)
    for a, b in itertools.combinations(places, 2):
        apart_x = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        apart_y = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert apart_x or apart_y


RAYS = {
    "uid": "rayDefaultDashboard",
    "panels": [
        {"id": 41, "type": "timeseries", "gridPos": {"x": 0, "y": 0, "w": 24, "h": 8}},
        {"id": 1, "type": "row", "gridPos": {"x": 0, "y": 8, "w": 24, "h": 1}, "panels": []},
    ],
    "templating": {"list": [{"name": "datasource"}, {"name": "SessionName"}]},
}


def rays_folder(folder: Path) -> Path:
    (folder / "default_grafana_dashboard.json").write_text(json.dumps(RAYS), "utf-8")
    return folder


def test_our_rows_stand_below_rays_own_however_often_they_are_installed(tmp_path: Path) -> None:
    folder = rays_folder(tmp_path)
    install(folder)
    once = (folder / "default_grafana_dashboard.json").read_text("utf-8")
    files = install(folder)
    assert files[0].read_text("utf-8") == once
    merged = json.loads(once)
    assert merged["uid"] == "rayDefaultDashboard"
    assert merged["panels"][:2] == RAYS["panels"]
    assert len(merged["panels"]) == 2 + len(panels())
    assert min(panel["gridPos"]["y"] for panel in merged["panels"][2:]) == 9
    names = [entry["name"] for entry in merged["templating"]["list"]]
    assert names == ["datasource", "SessionName", "run"]
    assert json.loads(files[1].read_text("utf-8")) == build_dashboard()


def test_removed_again_rays_dashboard_is_as_ray_wrote_it(tmp_path: Path) -> None:
    folder = rays_folder(tmp_path)
    install(folder)
    uninstall(folder)
    assert json.loads((folder / "default_grafana_dashboard.json").read_text("utf-8")) == RAYS
    assert len(list(folder.iterdir())) == 1
    uninstall(folder)  # nothing is left to remove


@pytest.mark.parametrize("text", [None, "{", "[]", '{"panels": 3}'])
def test_a_folder_without_rays_dashboard_is_told(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "default_grafana_dashboard.json").write_text(text, "utf-8")
    with pytest.raises(UserError, match="default_grafana_dashboard"):
        install(tmp_path)


def test_names_are_what_the_sink_makes_of_them() -> None:
    assert exported_name("weight_sync/pause_s") == "ray_accord_weight_sync_pause_s"
    assert exported_name("rewards/my-rule/mean") == "ray_accord_rewards_my_rule_mean"
