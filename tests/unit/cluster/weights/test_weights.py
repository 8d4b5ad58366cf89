"""Manifests refuse what is torn, partial, late or doubled; the disk carries bytes exactly."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cluster.contracts.errors import Retryable, UserError, WeightMismatch
from cluster.contracts.records import Canary, WeightManifest
from cluster.contracts.registry import WEIGHT_TRANSPORTS
from cluster.weights.disk import DiskPublisher, DiskReceiver
from cluster.weights.manifest import build_manifest, check_order, checksum, verify_arrays
from cluster.weights.transports import PublisherOptions, make_publisher, make_receiver

CANARY = Canary(token_ids=(1, 2, 3), logprobs=(-1.0, -2.0), tolerance=1e-3)
DTYPES = {"a.weight": "float32", "b": "bfloat16", "norm": "float32"}


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.standard_normal((3, 5), dtype=np.float32),
        "b": rng.integers(0, 2**16, (4,), dtype=np.uint16),
        "norm": np.float32(0.5).reshape(()),
    }


def manifest(version: int = 3) -> WeightManifest:
    return build_manifest(arrays(), DTYPES, version, CANARY, "disk", "nowhere")


def test_what_was_published_is_accepted() -> None:
    made = manifest()
    verify_arrays(made, arrays())
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
        verify_arrays(manifest(), given)
    assert words in str(caught.value)
    assert "version 3" in str(caught.value)


def test_swapped_tensors_of_one_shape_are_refused() -> None:
    pair = {"x": np.zeros(4, np.float32), "y": np.ones(4, np.float32)}
    made = build_manifest(pair, dict.fromkeys(pair, "float32"), 1, CANARY, "disk", "")
    with pytest.raises(WeightMismatch, match="checksum"):
        verify_arrays(made, {"x": pair["y"], "y": pair["x"]})


def test_a_manifest_that_names_a_tensor_twice_or_none_is_refused() -> None:
    made = manifest()
    twice = dataclasses.replace(made, tensors=(*made.tensors, made.tensors[0]))
    with pytest.raises(WeightMismatch, match="twice"):
        verify_arrays(twice, arrays())
    with pytest.raises(WeightMismatch, match="empty"):
        verify_arrays(dataclasses.replace(made, tensors=()), {})


@pytest.mark.parametrize(("current", "words"), [(3, "again"), (4, "after a newer one")])
def test_duplicates_and_late_updates_are_refused(current: int, words: str) -> None:
    with pytest.raises(WeightMismatch, match=words):
        check_order(current, manifest(3))


def test_a_newer_update_is_in_order_even_when_one_was_left_out() -> None:
    check_order(-1, manifest(0))
    check_order(1, manifest(3))


def test_a_dtype_that_does_not_fit_its_carrier_is_refused() -> None:
    with pytest.raises(ValueError, match="b: float32 cannot travel as uint16"):
        build_manifest(arrays(), {**DTYPES, "b": "float32"}, 0, CANARY, "disk", "")


def test_disk_carries_everything_exactly_and_read_only(tmp_path: Path) -> None:
    made = DiskPublisher(tmp_path).publish(arrays(), DTYPES, 7, CANARY)
    got = DiskReceiver().fetch(made)
    verify_arrays(made, got)
    assert all(not array.flags.writeable for array in got.values())
    assert Path(made.locator).name == "v000007"


def test_disk_keeps_what_is_retained_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    publisher = DiskPublisher(tmp_path)
    made = []
    for version in range(4):
        publisher.retain([version - 1])
        made.append(publisher.publish(arrays(), DTYPES, version, CANARY))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v000002", "v000003"]
    with pytest.raises(Retryable, match="version 1"):
        DiskReceiver().fetch(made[1])
    publisher.close()
    assert list(tmp_path.iterdir()) == []


def test_disk_publishes_a_version_again_after_a_restart(tmp_path: Path) -> None:
    DiskPublisher(tmp_path).publish(arrays(), DTYPES, 1, CANARY)
    changed = {**arrays(), "norm": np.float32(2).reshape(())}
    made = DiskPublisher(tmp_path).publish(changed, DTYPES, 1, CANARY)
    verify_arrays(made, DiskReceiver().fetch(made))


def test_a_failed_write_leaves_no_version(tmp_path: Path) -> None:
    class Unwritable:
        def __array__(self, *args: object, **kwargs: object) -> np.ndarray:
            raise OSError("disk full")

    broken = {"a.weight": arrays()["a.weight"], "b": Unwritable()}
    with pytest.raises(OSError, match="disk full"):
        DiskPublisher(tmp_path).publish(broken, DTYPES, 1, CANARY)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["truncated", "removed", "index"])
def test_torn_files_are_refused(tmp_path: Path, how: str) -> None:
    made = DiskPublisher(tmp_path).publish(arrays(), DTYPES, 1, CANARY)
    folder = Path(made.locator)
    index = json.loads((folder / "names.json").read_text())
    file = folder / index["a.weight"]
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-8])
    elif how == "removed":
        file.unlink()
    else:
        (folder / "names.json").write_text('{"a.weight": "0000')
    with pytest.raises(WeightMismatch, match="torn"):
        DiskReceiver().fetch(made)


@pytest.mark.parametrize("word", list(WEIGHT_TRANSPORTS))
def test_each_transport_is_the_module_of_its_name(word: str) -> None:
    module = importlib.import_module(f"cluster.weights.{word}")
    assert word == module.NAME
    assert callable(module.publisher)
    assert callable(module.receiver)


def test_a_transport_is_made_by_its_name(tmp_path: Path) -> None:
    options = PublisherOptions(directory=str(tmp_path))
    made = make_publisher("disk", options).publish(arrays(), DTYPES, 0, CANARY)
    verify_arrays(made, make_receiver("disk", "cpu").fetch(made))
    with pytest.raises(UserError, match="no weight transport of this name; did you mean 'disk'"):
        make_publisher("dsik", options)
