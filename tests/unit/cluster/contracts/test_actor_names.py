from __future__ import annotations

from cluster.contracts.actor_names import ActorNames


def test_each_process_of_a_role_has_a_name_of_its_own() -> None:
    names = ActorNames("mine", "accord-01")
    assert names("worker-0") == {"name": "mine/worker-0", "namespace": "accord-01"}
    assert names("worker-1")["name"] == "mine/worker-1"
    assert names("worker-0")["name"] == "mine/worker-0 (2)"
    assert names("worker-0")["name"] == "mine/worker-0 (3)"
