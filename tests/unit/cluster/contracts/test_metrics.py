from __future__ import annotations

import pytest

from cluster.contracts.metrics import largest, last, mean, merge, total, values


def test_means_merge_by_weight_not_by_mean_of_means() -> None:
    assert values([mean("x", 10.0, 4), mean("x", 2.0, 1)]) == {"x": pytest.approx(12 / 5)}


def test_each_kind_merges_its_own_way() -> None:
    got = values(
        [total("s", 1), total("s", 2), largest("m", 1), largest("m", 3), last("l", 1), last("l", 9)]
    )
    assert got == {"s": 3, "m": 3, "l": 9}


def test_one_name_has_one_kind() -> None:
    with pytest.raises(ValueError, match="both mean and sum"):
        merge([mean("x", 1, 1), total("x", 1)])
