"""What a role is sent of the files that the command was given, by the path it knows them under."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.machine.handshake import require_this_host_is_like
from cluster.machine.parcels import Parcel, unpack


def known_as(path: str) -> str:
    """A path as every role knows it: absolute, so that it starts from the folder of the command
    and not from Ray's. What is not there (a hub id) stays as it is."""
    place = Path(path).expanduser()
    return str(place.absolute()) if place.exists() else path


@dataclass(frozen=True, slots=True)
class Shipment:
    """Parcels by `known_as`, and the software that the role's host must run (what
    `require_same_everywhere` gave). Empty on a cluster that the command started, on its own host.
    """

    parcels: Mapping[str, Parcel] = field(default_factory=dict)
    software: Mapping[str, Any] | None = None

    def check_host(self) -> None:
        """First of all in a role, whose host may have joined after the driver asked all of them.
        Raises UserError."""
        require_this_host_is_like(self.software)

    def here(self, path: str) -> str:
        """Where the role finds what the command knew as `path`. The first call on a host fetches
        it. Raises what `unpack` raises."""
        parcel = self.parcels.get(path)
        return path if parcel is None else str(unpack(parcel))
