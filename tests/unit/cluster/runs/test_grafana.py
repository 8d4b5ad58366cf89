from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

from cluster.runs.grafana import build_dashboard, exported_name, unknown_metrics, write_dashboard

KNOWN = (
    *("objective/scores", "objective/rlhf_reward", "objective/kl", "policy/entropy"),
    *("policy/clipfrac", "completions/mean_length", "completions/max_length"),
    *("value/explained_var", "perf/throughput", "rollout/tokens_per_s", "time/step"),
    *("time/wait_batch", "perf/trainer_idle_frac", "perf/rollout_idle_frac"),
    *("async/staleness_mean", "async/staleness_max", "async/queue_depth", "async/in_flight"),
    *("weight_sync/seconds", "weight_sync/pause_s", "weight_sync/canary_logp_diff"),
    *("workers/alive", "workers/joined", "workers/left", "workers/restarts", "run/step"),
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
    assert unknown_metrics(dashboard, KNOWN) == []
    assert unknown_metrics(dashboard, set(KNOWN) - {"objective/kl"}) == ["ray_accord_objective_kl"]
    assert unknown_metrics(dashboard, set(KNOWN) - {"run/step"}) == ["ray_accord_run_step"]
    for panel in panels():
        for target in panel.get("targets", []):
            assert re.fullmatch(
                r'max by \(run\) \(ray_accord_\w+\{run=~"\$run"\}\)', target["expr"]
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


def test_names_are_what_the_sink_makes_of_them() -> None:
    assert exported_name("weight_sync/pause_s") == "ray_accord_weight_sync_pause_s"
    assert exported_name("rewards/my-rule/mean") == "ray_accord_rewards_my_rule_mean"
