"""Manifests refuse what is torn, partial, late or doubled; the disk carries bytes exactly."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from cluster.contracts.errors import Retryable, UserError, WeightMismatch
from cluster.contracts.records import Canary, WeightManifest
from cluster.contracts.registry import WEIGHT_TRANSPORTS
from cluster.weights.disk import DiskPublisher, DiskReceiver
from cluster.weights.intake import Intake
from cluster.weights.manifest import check_order, checksum, verified
from cluster.weights.transports import (
    PublisherOptions,
    Receiver,
    make_publisher,
    make_receiver,
    publish,
)
from cluster.weights.update import Nowhere, Update

CANARY = Canary(token_ids=(1, 2, 3), logprobs=(-1.0, -2.0), tolerance=1e-3)
DTYPES = {"a.weight": "float32", "b": "bfloat16", "norm": "float32"}


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.standard_normal((3, 5), dtype=np.float32),
        "b": rng.integers(0, 2**16, (4,), dtype=np.uint16),
        "norm": np.float32(0.5).reshape(()),
    }


def announced(
    buckets: Sequence[dict[str, np.ndarray]], version: int = 3, dtypes: dict[str, str] = DTYPES
) -> WeightManifest:
    with Update(version, "disk", Nowhere()) as update:
        for bucket in buckets:
            update.add(bucket, dtypes)
        return update.close(CANARY)


def manifest(version: int = 3) -> WeightManifest:
    return announced([arrays()], version)


def verify(made: WeightManifest, *buckets: dict[str, np.ndarray]) -> None:
    for _ in verified(made, buckets):
        pass


def taken(receiver: Receiver, made: WeightManifest) -> dict[str, np.ndarray]:
    return dict(Intake(receiver, 30.0).take(made))


def test_what_was_published_is_accepted() -> None:
    made = manifest()
    verify(made, arrays())
    assert [(t.name, t.shape, t.dtype, t.nbytes) for t in made.tensors] == [
        ("a.weight", (3, 5), "float32", 60),
        ("b", (4,), "bfloat16", 8),
        ("norm", (), "float32", 4),
    ]


def test_the_checksum_is_of_the_bytes_in_c_order() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert checksum(array) == checksum(np.asfortranarray(array)) != checksum(array.T)


def _drop(given: dict[str, np.ndarray]) -> None:
    del given["b"]


def _add(given: dict[str, np.ndarray]) -> None:
    given["extra"] = given["b"]


def _transpose(given: dict[str, np.ndarray]) -> None:
    given["a.weight"] = given["a.weight"].T


def _truncate(given: dict[str, np.ndarray]) -> None:
    given["b"] = given["b"][:3]


def _widen(given: dict[str, np.ndarray]) -> None:
    given["a.weight"] = given["a.weight"].astype(np.float64)


def _one_bit(given: dict[str, np.ndarray]) -> None:
    given["a.weight"].view(np.uint32)[2, 4] ^= 1


def _zero_half(given: dict[str, np.ndarray]) -> None:
    given["b"][2:] = 0


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_drop, "'b': missing"),
        (_add, "'extra': not announced"),
        (_transpose, "'a.weight': shape (5, 3)"),
        (_truncate, "'b': shape (3,)"),
        (_widen, "'a.weight': carried as float64"),
        (_one_bit, "'a.weight': checksum"),
        (_zero_half, "'b': checksum"),
    ],
)
def test_damage_is_refused_by_tensor(
    damage: Callable[[dict[str, np.ndarray]], None], words: str
) -> None:
    given = arrays()
    damage(given)
    with pytest.raises(WeightMismatch) as caught:
        verify(manifest(), given)
    assert words in str(caught.value)
    assert "version 3" in str(caught.value)


def test_swapped_tensors_of_one_shape_are_refused() -> None:
    pair = {"x": np.zeros(4, np.float32), "y": np.ones(4, np.float32)}
    made = announced([pair], 1, dict.fromkeys(pair, "float32"))
    with pytest.raises(WeightMismatch, match="checksum"):
        verify(made, {"x": pair["y"], "y": pair["x"]})


def test_a_manifest_that_names_a_tensor_twice_or_none_is_refused() -> None:
    made = manifest()
    twice = dataclasses.replace(made, tensors=(*made.tensors, made.tensors[0]))
    with pytest.raises(WeightMismatch, match="twice"):
        verify(twice, arrays())
    with pytest.raises(WeightMismatch, match="empty"):
        verify(dataclasses.replace(made, tensors=()))


@pytest.mark.parametrize(("current", "words"), [(3, "again"), (4, "after a newer one")])
def test_duplicates_and_late_updates_are_refused(current: int, words: str) -> None:
    with pytest.raises(WeightMismatch, match=words):
        check_order(current, manifest(3))


def test_a_newer_update_is_in_order_even_when_one_was_left_out() -> None:
    check_order(-1, manifest(0))
    check_order(1, manifest(3))


def test_a_dtype_that_does_not_fit_its_carrier_is_refused() -> None:
    with pytest.raises(ValueError, match="b: float32 cannot travel as uint16"):
        announced([arrays()], 0, {**DTYPES, "b": "float32"})


def test_disk_carries_everything_exactly_and_read_only(tmp_path: Path) -> None:
    made = publish(DiskPublisher(tmp_path), arrays(), DTYPES, 7, CANARY)
    got = taken(DiskReceiver(), made)
    assert all((got[name] == array).all() for name, array in arrays().items())
    assert all(not array.flags.writeable for array in got.values())
    assert Path(made.locator).name == "v000007"


def test_disk_keeps_what_is_retained_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    publisher = DiskPublisher(tmp_path)
    made = []
    for version in range(4):
        publisher.retain([version - 1])
        made.append(publish(publisher, arrays(), DTYPES, version, CANARY))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v000002", "v000003"]
    with pytest.raises(Retryable, match="version 1"):
        taken(DiskReceiver(), made[1])
    publisher.close()
    assert list(tmp_path.iterdir()) == []


def test_disk_publishes_a_version_again_after_a_restart(tmp_path: Path) -> None:
    publish(DiskPublisher(tmp_path), arrays(), DTYPES, 1, CANARY)
    changed = {**arrays(), "norm": np.float32(2).reshape(())}
    made = publish(DiskPublisher(tmp_path), changed, DTYPES, 1, CANARY)
    assert taken(DiskReceiver(), made)["norm"] == 2


def test_a_failed_write_leaves_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    def fsync(file: int) -> None:
        written.append(file)
        if len(written) == 2:
            raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fsync)
    with DiskPublisher(tmp_path).open(1) as update:
        for name, array in arrays().items():
            update.add({name: array}, DTYPES)  # the learner's processes gather on together
        with pytest.raises(OSError, match="disk full"):
            update.close(CANARY)
    assert len(written) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["truncated", "removed"])
def test_torn_files_are_refused(tmp_path: Path, how: str) -> None:
    made = publish(DiskPublisher(tmp_path), arrays(), DTYPES, 1, CANARY, bucket_bytes=64)
    file = Path(made.locator) / "00001.bin"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-8])
    else:
        file.unlink()
    with pytest.raises(WeightMismatch, match=r"bucket 2 of 2 of version 1 at .* is torn"):
        taken(DiskReceiver(), made)


@pytest.mark.parametrize("word", list(WEIGHT_TRANSPORTS))
def test_each_transport_is_the_module_of_its_name(word: str) -> None:
    module = importlib.import_module(f"cluster.weights.{word}")
    assert word == module.NAME
    assert callable(module.publisher)
    assert callable(module.receiver)


def test_a_transport_is_made_by_its_name(tmp_path: Path) -> None:
    options = PublisherOptions(directory=str(tmp_path))
    made = publish(make_publisher("disk", options), arrays(), DTYPES, 0, CANARY)
    assert taken(make_receiver("disk", "cpu"), made)
    with pytest.raises(UserError, match="no weight transport of this name; did you mean 'disk'"):
        make_publisher("dsik", options)
