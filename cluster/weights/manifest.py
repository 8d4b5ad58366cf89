"""What a weight update must be, and the checks a receiver makes before it touches its engine.

An update is host arrays (numpy) or, for transports that stay on a device, torch tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import xxhash

from cluster.contracts.errors import WeightMismatch
from cluster.contracts.records import TensorEntry, WeightManifest

# numpy has no bfloat16, so it travels as the unsigned integers of its bits.
CARRIERS = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}
_HOST = (np.ndarray, np.generic)


def checksum(array: np.ndarray) -> str:
    """ "xxh3:" and the hex XXH3-128 of the array's bytes in C order.

    It guards against accidents, 25 times as fast as SHA-256: an update is hashed by the learner and
    by every worker. Who may send updates at all is the cluster's authentication to decide.
    """
    flat = np.asarray(array, order="C").reshape(-1).view(np.uint8)
    return f"xxh3:{xxhash.xxh3_128_hexdigest(flat.data)}"


def checksums(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Of host arrays their XXH3-128; of tensors a sum computed where they lie (``flat``)."""
    held = {name: array for name, array in arrays.items() if not isinstance(array, _HOST)}
    found = {name: checksum(array) for name, array in arrays.items() if name not in held}
    if held:
        from cluster.weights.device_buffer import mixed_sums  # torch, for those who use it only

        found |= dict(zip(held, mixed_sums(held.values()), strict=True))
    return found


def _carrier(array: Any) -> str:
    return str(array.dtype).removeprefix("torch.")


def _fits(array: Any, dtype: str) -> bool:
    wanted = CARRIERS.get(dtype) if isinstance(array, _HOST) else dtype
    return wanted == _carrier(array) and dtype in CARRIERS


def entries_of(
    arrays: Mapping[str, Any], dtypes: Mapping[str, str], bucket: int
) -> list[TensorEntry]:
    """One entry a tensor of a bucket (host arrays carry bfloat16 as uint16 views, tensors as it
    is); ``dtypes`` are torch names per tensor.

    Raises ValueError when a dtype is unknown or does not fit the array that carries it.
    """
    for name, array in arrays.items():
        if not _fits(array, dtypes[name]):
            raise ValueError(f"{name}: {dtypes[name]} cannot travel as {_carrier(array)}")
    sums = checksums(arrays)
    return [
        TensorEntry(
            name=name,
            shape=tuple(array.shape),
            dtype=dtypes[name],
            nbytes=array.nbytes,
            checksum=sums[name],
            bucket=bucket,
        )
        for name, array in arrays.items()
    ]


def buckets_in(manifest: WeightManifest) -> list[list[TensorEntry]]:
    """The entries of each bucket of an update, in order."""
    found: list[list[TensorEntry]] = [[] for _ in range(manifest.buckets)]
    for entry in manifest.tensors:
        found[entry.bucket].append(entry)
    return found


def check_order(current: int, manifest: WeightManifest) -> None:
    """Refuse an update that is not newer than ``current``: a duplicate, or one that came late."""
    # Never backwards: tokens would be labelled with a version older than the one before them.
    if manifest.version <= current:
        kind = "again" if manifest.version == current else "after a newer one"
        raise WeightMismatch(
            f"weights of version {manifest.version} arrived {kind}: version {current} is in force"
        )


def verified(
    manifest: WeightManifest, buckets: Iterable[Mapping[str, Any]]
) -> Iterator[Mapping[str, Any]]:
    """The buckets of an update, each checked before it is handed on, and at the end that none is
    missing. Raises WeightMismatch, naming the tensor, for anything but what was published.

    That the numbers are finite is checked once, by the learner before it publishes.
    """
    names = [entry.name for entry in manifest.tensors]
    if len(set(names)) != len(names):
        raise WeightMismatch(f"the manifest of version {manifest.version} names a tensor twice")
    if not names:
        raise WeightMismatch(f"the manifest of version {manifest.version} is empty")
    announced = buckets_in(manifest)
    came = 0
    for bucket in buckets:
        if came >= len(announced):
            raise WeightMismatch(
                f"weights of version {manifest.version}: more than the {len(announced)} buckets "
                "announced"
            )
        _verify(manifest, announced[came], bucket)
        came += 1
        yield bucket
        # Before the next one is asked for: only two may be held at a time.
        del bucket
    if came < len(announced):
        raise WeightMismatch(
            f"weights of version {manifest.version}: {came} of {len(announced)} buckets came"
        )


def _verify(
    manifest: WeightManifest, announced: list[TensorEntry], arrays: Mapping[str, Any]
) -> None:
    """Raise WeightMismatch unless ``arrays`` is exactly this bucket of the update."""
    expected = {entry.name: entry for entry in announced}
    # Names, shapes and sizes before checksums: they are free, and say more of what is wrong.
    missing = [name for name in expected if name not in arrays]
    if missing:
        raise WeightMismatch(_say(manifest, missing[0], f"missing ({len(missing)} in all)"))
    extra = [name for name in arrays if name not in expected]
    if extra:
        raise WeightMismatch(_say(manifest, extra[0], f"not announced ({len(extra)} in all)"))
    for name, entry in expected.items():
        array = arrays[name]
        if tuple(array.shape) != entry.shape:
            problem = f"shape {tuple(array.shape)}, announced {entry.shape}"
        elif not _fits(array, entry.dtype):
            problem = f"carried as {_carrier(array)}, announced {entry.dtype}"
        elif array.nbytes != entry.nbytes:
            problem = f"{array.nbytes} bytes, announced {entry.nbytes}"
        else:
            continue
        raise WeightMismatch(_say(manifest, name, problem))
    sums = checksums(arrays)
    torn = [name for name, entry in expected.items() if sums[name] != entry.checksum]
    if torn:
        problem = "checksum differs: torn, truncated or overwritten on the way"
        raise WeightMismatch(_say(manifest, torn[0], problem))


def _say(manifest: WeightManifest, name: str, problem: str) -> str:
    return f"weights of version {manifest.version}, tensor {name!r}: {problem}"
