"""Variables for this process and those it starts, set before torch or gRPC is imported."""

from __future__ import annotations

import os

from cluster.contracts.telemetry import telemetry_off


def prepare_environment() -> None:
    telemetry_off()
    # Compute threads that spin while they wait starve the other processes of a small machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # gRPC would write lines of its own beside our one message.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
