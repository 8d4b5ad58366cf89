"""What the libraries would report about their use to their makers is off, in every process."""

from __future__ import annotations

import os

TELEMETRY_OFF = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}


def telemetry_off() -> None:
    """To be called before these libraries are imported, also in a role's process: on a cluster that
    others started it has not the environment of the command. Who has set a variable keeps it."""
    for name, value in TELEMETRY_OFF.items():
        os.environ.setdefault(name, value)
