"""Which running Ray cluster is joined, and whether it lets us in: known within a second, where Ray
itself would try for 20 seconds and then say that nobody answers."""

from __future__ import annotations

import os
import time
from typing import Any, Literal

from cluster.contracts.errors import UserError
from cluster.machine.ray_token import MODE, TOKEN, token_file, token_found

ANSWER_S = 10.0  # for a cluster that is only just starting
AGAIN_S = 0.5

Answer = Literal["lets us in", "wants another token", "is not there"]


def cluster_to_join(address: str) -> str:
    """HOST:PORT of the cluster that ``cluster.address`` means (`auto`: the one that RAY_ADDRESS
    names, else the newest on this machine), once it lets us in: with Ray's token where it asks for
    one. Raises UserError when nobody answers or the token is missing or wrong."""
    where = f"cluster.address = {address}"
    place = _place(address, where)
    answer, cause = _answer(place)
    # Only where it asks for one: the token would also be asked of a cluster that has none.
    if answer == "wants another token" and MODE not in os.environ and token_found():
        from ray._private.authentication.authentication_token_setup import (
            maybe_enable_token_auth_if_token_available,
        )

        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        answer, cause = _answer(place)
    if answer == "is not there":
        raise UserError(
            f"no Ray cluster answers at {place}: {cause}",
            where=where,
            fix="start one with `ray start --head`, correct the address, or leave "
            "cluster.address out",
        )
    if answer == "wants another token":
        raise _token_problem(place, where)
    return place


def _token_problem(place: str, where: str) -> UserError:
    source = f"the variable {TOKEN}" if os.environ.get(TOKEN) else str(token_file())
    if not token_found():
        what = f"the cluster at {place} asks for Ray's token, and there is none in {source}"
    elif os.environ.get(MODE, "token").lower() != "token":
        what = (
            f"the cluster at {place} asks for Ray's token, and {MODE}={os.environ[MODE]} keeps it "
            "from being sent"
        )
        return UserError(what, where=where, fix=f"unset {MODE}, or set it to token")
    else:
        what = f"the cluster at {place} refuses the token in {source}"
    return UserError(
        what,
        where=where,
        fix="copy the head node's token there (`ray get-auth-token` on the head node prints it), "
        "or name its file in RAY_AUTH_TOKEN_PATH",
    )


def _place(address: str, where: str) -> str:
    from ray._private.services import canonicalize_bootstrap_address_or_die

    try:
        return str(canonicalize_bootstrap_address_or_die(address))
    except (ConnectionError, ValueError) as problem:
        raise UserError(
            f"no Ray cluster is known here: {str(problem).splitlines()[0]}",
            where=where,
            fix="start one with `ray start --head`, or set RAY_ADDRESS or cluster.address to its "
            "HOST:PORT",
        ) from None


def _answer(place: str) -> tuple[Answer, str]:
    """What the cluster says to a call that changes nothing; the second: why it does not answer."""
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
    from ray.exceptions import AuthenticationError

    deadline = time.monotonic() + ANSWER_S
    while True:
        channel: Any = init_grpc_channel(place)
        try:
            stub: Any = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
            request: Any = gcs_service_pb2
            stub.GetClusterId(request.GetClusterIdRequest(), timeout=ANSWER_S / 2)
            return "lets us in", ""
        except AuthenticationError:  # ours is missing: found out on this side
            return "wants another token", ""
        except Exception as problem:  # grpc's, which this floor does not import
            code = getattr(getattr(problem, "code", lambda: None)(), "name", "")
            if code == "UNAUTHENTICATED":
                return "wants another token", ""
            if time.monotonic() > deadline:
                return "is not there", _cause(problem)
            time.sleep(AGAIN_S)
        finally:
            channel.close()


def _cause(problem: Exception) -> str:
    details = getattr(problem, "details", None)
    return str(details() if details is not None else problem)
