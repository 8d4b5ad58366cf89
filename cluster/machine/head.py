"""Ray's head (its GCS), without which a cluster cannot go on: whether it still answers."""

from __future__ import annotations

from typing import Any


def head_address() -> str:
    """HOST:PORT of the head of the cluster that this process has joined."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


def head_answers(place: str, timeout_s: float) -> bool:
    """A call that changes nothing, on a connection of its own: Ray's connection would wait for the
    head to come back, and end this process after a minute."""
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    channel: Any = init_grpc_channel(place)
    try:
        stub: Any = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        request: Any = gcs_service_pb2
        stub.GetClusterId(request.GetClusterIdRequest(), timeout=timeout_s)
        return True
    except Exception as problem:  # grpc's, which this floor does not import
        code = getattr(getattr(problem, "code", lambda: None)(), "name", "")
        return code not in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
    finally:
        channel.close()
