"""The cluster files in examples/cluster/: checked offline, as `ray up` and KubeRay would read them.

Ray brings its own schema. Of KubeRay's, the fields that the file uses are kept here by hand.
"""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.contracts.config.file import load_config
from cluster.contracts.config.train import TrainConfig

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "cluster"
RAY_UP = sorted(FOLDER.glob("ray_up_*.yaml"))
MODEL = ["model.path=m", "data.prompts=p.jsonl", 'reward.sources=[{type="rules",max_words=3}]']


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.name)
def test_ray_up_takes_the_file(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(path.read_text("utf-8"))
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    assert prepared["head_node_type"] in prepared["available_node_types"]
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    for command in starts:
        if "ray start" in command:
            assert "RAY_AUTH_MODE=token" in command
            assert "--dashboard-host=0.0.0.0" not in command
    assert "~/.ray/auth_token" in config["file_mounts"]


def test_a_wrong_field_would_be_noticed() -> None:
    from ray.autoscaler._private.util import validate_config

    config = yaml.safe_load((FOLDER / "ray_up_aws.yaml").read_text("utf-8"))
    with pytest.raises(Exception, match="max_wokers"):
        validate_config({**config, "max_wokers": 3})
    documents = kuberay()
    documents[0]["spec"]["workerGroupSpecs"][0]["minReplica"] = 1
    with pytest.raises(AssertionError, match="minReplica"):
        check(documents[0], RAY_CLUSTER, "RayCluster")


# -- KubeRay: field -> its type, or the fields of a nested object ----------------------------------

ANY = object()
RESOURCES = {"requests": ANY, "limits": ANY}
CONTAINER = {
    "name": str,
    "image": str,
    "env": [{"name": str, "value": str}],
    "resources": RESOURCES,
    "volumeMounts": [{"name": str, "mountPath": str}],
}
POD = {
    "spec": {
        "containers": [CONTAINER],
        "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
        "terminationGracePeriodSeconds": int,
    }
}
GROUP = {
    "groupName": str,
    "replicas": int,
    "minReplicas": int,
    "maxReplicas": int,
    "rayStartParams": ANY,
    "template": POD,
}
METADATA = {"name": str}
RAY_CLUSTER = {
    "apiVersion": str,
    "kind": str,
    "metadata": METADATA,
    "spec": {
        "rayVersion": str,
        "authOptions": {"mode": str},
        "enableInTreeAutoscaling": bool,
        "autoscalerOptions": {"version": str, "idleTimeoutSeconds": int},
        "headGroupSpec": {"rayStartParams": ANY, "template": POD},
        "workerGroupSpecs": [GROUP],
    },
}
RAY_JOB = {
    "apiVersion": str,
    "kind": str,
    "metadata": METADATA,
    "spec": {
        "clusterSelector": ANY,
        "entrypoint": str,
        "entrypointNumCpus": int,
        "submissionMode": str,
        "backoffLimit": int,
    },
}


def kuberay() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / "kuberay.yaml").read_text("utf-8")))


def check(value: Any, shape: Any, where: str) -> None:
    if shape is ANY:
        return
    if isinstance(shape, dict):
        assert isinstance(value, Mapping), where
        for key, inner in value.items():
            assert key in shape, f"{where} has no field {key}"
            check(inner, shape[key], f"{where}.{key}")
    elif isinstance(shape, list):
        assert isinstance(value, list), where
        for number, item in enumerate(value):
            check(item, shape[0], f"{where}[{number}]")
    else:
        assert type(value) is shape, f"{where} is {value!r}"


def test_kuberay_takes_the_file() -> None:
    cluster, job = kuberay()
    check(cluster, RAY_CLUSTER, "RayCluster")
    check(job, RAY_JOB, "RayJob")
    spec = cluster["spec"]
    assert (cluster["kind"], job["kind"]) == ("RayCluster", "RayJob")
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert all(type(value) is str for value in group["rayStartParams"].values())
    mounts = spec["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert {mount["mountPath"] for mount in mounts} == {"/runs"}


def test_what_the_job_asks_for_is_what_the_groups_offer() -> None:
    cluster, job = kuberay()
    offered: dict[str, float] = {}
    for group in cluster["spec"]["workerGroupSpecs"]:
        # The value is quoted once for YAML and once for the shell that runs `ray start`.
        each = json.loads(json.loads(group["rayStartParams"]["resources"]))
        for kind, amount in each.items():
            offered[kind] = offered.get(kind, 0.0) + amount * group["maxReplicas"]
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:2] == ["accord", "train"]
    config = load_config(TrainConfig, None, [*MODEL, *words[3:]])
    wanted = {
        "rollout": config.rollout.resources["rollout"] * (config.rollout.max_workers or 0),
        "learner": config.learner.resources["learner"] + config.reward.resources["learner"],
    }
    assert wanted == offered
