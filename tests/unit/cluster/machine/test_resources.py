"""A resource that Ray does not have is named, with the setting that asks for it."""

from __future__ import annotations

import pytest

from cluster.machine.resources import Need, Node, has_labels, shortage

LEARNER = Need("a learner process", {"GPU": 1}, 2, keys={"GPU": "learner.gpus"})
WORKERS = Need("a rollout worker", {"CPU": 4, "GPU": 0}, 3, keys={"CPU": "rollout.cpus"})
REWARD = Need("the reward service", {"CPU": 1}, keys={"CPU": "reward.cpus"})
SPOT = {"ray.io/market-type": "spot"}


@pytest.mark.parametrize(
    ("needs", "there", "says"),
    [
        ([WORKERS, REWARD], {"CPU": 13.0}, ""),
        ([Need("a worker", {"GPU": 0})], {"CPU": 1.0}, ""),
        ([Need("a worker", {"GPU": 0.1}, 10)], {"GPU": 1.0}, ""),
        (
            [WORKERS, REWARD],
            {"CPU": 8.0},
            "rollout.cpus: the run asks for 13 CPU (rollout.cpus = 4 for 3, reward.cpus = 1), Ray "
            "has 8\n  fix: lower rollout.cpus or reward.cpus, or give cluster.num_cpus",
        ),
        (
            [LEARNER, WORKERS],
            {"CPU": 64.0},
            "learner.gpus: the run asks for 2 GPU (learner.gpus = 1 for 2), Ray has 0\n"
            "  fix: lower learner.gpus, or give a machine with more GPUs",
        ),
    ],
)
def test_shortages_of_one_machine(needs: list[Need], there: dict[str, float], says: str) -> None:
    assert str(shortage(needs, [Node("here", there)]) or "") == says


def worker(count: int, labels: dict[str, str] | None = None) -> Need:
    keys = {"rollout": "rollout.resources", "labels": "rollout.labels"}
    return Need("a rollout worker", {"CPU": 1, "rollout": 1}, count, labels or {}, keys)


def node(name: str, labels: dict[str, str] | None = None, **has: float) -> Node:
    return Node(name, has, labels or {})


def test_a_missing_resource_is_named_with_the_nodes_that_have_some() -> None:
    nodes = [node("a", CPU=8.0), node("b", CPU=8.0, rollout=1.0), node("c", CPU=8.0, rollout=1.0)]
    assert shortage([worker(2)], nodes) is None
    problem = shortage([worker(3)], nodes)
    assert problem is not None
    assert problem.where == "rollout.resources"
    assert problem.what == (
        "the run asks for 3 rollout (rollout.resources = 1 for 3), Ray has 2 (b 1, c 1)"
    )


def test_enough_in_all_but_on_no_single_node_is_a_shortage() -> None:
    problem = shortage([WORKERS], [node(name, CPU=3.0) for name in "abcd"])
    assert problem is not None
    assert "3 of 3 find no node with 4 CPU left (there are a with 3 CPU" in problem.what


def test_labels_choose_the_nodes() -> None:
    spot, other = node("a", SPOT, CPU=4.0, rollout=4.0), node("b", CPU=4.0, rollout=4.0)
    assert shortage([worker(2, SPOT)], [spot, other]) is None
    problem = shortage([worker(2, SPOT)], [other])
    assert problem is not None
    assert problem.where == "rollout.labels"
    assert "no node has the labels ray.io/market-type: spot" in problem.what


def test_a_particular_need_is_placed_before_one_that_fits_anywhere() -> None:
    """Dealt out in the order given, the workers would take the learner's only node."""
    nodes = [node("gpu", CPU=4.0, GPU=1.0), node("plain", CPU=4.0)]
    workers = Need("a rollout worker", {"CPU": 4})
    learner = Need("a learner process", {"CPU": 1, "GPU": 1})
    assert shortage([workers, learner], nodes) is None


@pytest.mark.parametrize(
    ("selector", "value", "matches"),
    [
        ("spot", "spot", True),
        ("spot", None, False),
        ("!spot", "spot", False),
        ("!spot", None, True),
        ("in(a, b)", "b", True),
        ("in(a, b)", "c", False),
        ("!in(a,b)", "c", True),
    ],
)
def test_label_selectors_mean_what_they_mean_to_ray(
    selector: str, value: str | None, matches: bool
) -> None:
    labels = {} if value is None else {"k": value}
    assert has_labels(labels, {"k": selector}) == matches
