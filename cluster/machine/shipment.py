"""What a role is sent of the files that the command was given, by the path it knows them under."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cluster.machine.parcels import Parcel, unpack


def known_as(path: str) -> str:
    """A path as every role knows it: absolute, so that it starts from the folder of the command
    and not from Ray's. What is not there (a hub id) stays as it is."""
    place = Path(path).expanduser()
    return str(place.absolute()) if place.exists() else path


@dataclass(frozen=True, slots=True)
class Shipment:
    """Parcels by `known_as`. Empty on a cluster that the command started: all is on its host."""

    parcels: Mapping[str, Parcel] = field(default_factory=dict)

    def here(self, path: str) -> str:
        """Where the role finds what the command knew as `path`. The first call on a host fetches
        it. Raises what `unpack` raises."""
        parcel = self.parcels.get(path)
        return path if parcel is None else str(unpack(parcel))
