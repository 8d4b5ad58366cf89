"""What events add up to, also after a resume, a loss, or with events that say nonsense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.runs.history import FollowedHistory, history_of


def event(time: float, kind: str, **detail: Any) -> dict[str, Any]:
    return {"time": time, "kind": kind, **detail}


def test_workers_over_time() -> None:
    history = history_of(
        [
            event(1, "cluster"),
            event(2, "worker_serving", worker="worker-0"),
            event(3, "worker_serving", worker="worker-1"),
            event(5, "worker_lost", worker="worker-0", cause="killed"),
            event(7, "worker_serving", worker="worker-0"),
            event(8, "worker_left", worker="worker-1"),
        ]
    )
    assert history.serving == ["worker-0"]
    assert [(s.worker, s.since, s.until, s.end, s.cause) for s in history.spans] == [
        ("worker-0", 2, 5, "lost", "killed"),
        ("worker-1", 3, 8, "left", ""),
        ("worker-0", 7, None, "", ""),
    ]


def test_a_new_start_of_the_loop_ends_what_served_before() -> None:
    history = history_of(
        [
            event(1, "worker_serving", worker="worker-0"),
            event(9, "cluster", dashboard="h:8265"),
        ]
    )
    assert history.serving == []
    assert [(s.until, s.end) for s in history.spans] == [(9, "ended")]
    assert history.cluster["dashboard"] == "h:8265"


def test_alarms_that_are_on() -> None:
    history = history_of(
        event(at, "alarm", alarm=alarm, change=change, text=f"{alarm} is off")
        for at, (alarm, change) in enumerate([("kl", "start"), ("length", "start"), ("kl", "end")])
    )
    assert history.alarms == ["length is off"]


def test_events_that_say_nonsense_are_counted_and_harm_nothing() -> None:
    history = history_of(
        [
            {},
            {"kind": ["list"]},
            {"kind": "worker_serving", "time": "noon"},
            {"kind": "worker_serving", "worker": "w", "time": 10**400},
            {"kind": "worker_lost", "worker": {"a": 1}},
            {"kind": "alarm", "change": 3},
        ]
    )
    assert history.counts.total() == 6
    assert history.serving == ["?", "w"]


def test_a_followed_history_reads_new_events_only(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    followed = FollowedHistory(tmp_path)
    assert followed.read().counts.total() == 0
    path.write_text(json.dumps(event(1, "worker_serving", worker="w")) + "\n")
    assert followed.read().serving == ["w"]
    with path.open("a") as file:
        file.write(json.dumps(event(2, "worker_lost", worker="w")) + "\n")
    assert followed.read().serving == []
    assert followed.read().counts == {"worker_serving": 1, "worker_lost": 1}
    path.write_text(json.dumps(event(3, "cluster")) + "\n")
    assert followed.read().counts == {"cluster": 1}
