"""A commented config reads back as what went in, and the keys people change first exist."""

from __future__ import annotations

import tomllib
from typing import Any

from cluster.contracts.config.commented import FIRST_KEYS, commented_toml
from cluster.contracts.config.file import check_config
from cluster.contracts.config.train import TrainConfig

VALUES: dict[str, Any] = {
    "model": {"path": 'a "model"'},
    "data": {"prompts": "p"},
    "reward": {
        "sources": [{"type": "rules", "forbidden": ["(?i)no"]}, {"type": "model", "path": "rm"}]
    },
    "algorithm": {"kl": {"coef": 0.1}},
}


def test_only_what_was_given_is_written() -> None:
    text = commented_toml(TrainConfig, VALUES)
    assert tomllib.loads(text) == VALUES
    assert "# Weight of the per-token KL to the reference.\ncoef = 0.1" in text
    assert "[algorithm]\n" not in text


def test_every_key_with_its_default_is_the_same_config() -> None:
    text = commented_toml(TrainConfig, VALUES, every_key=True)
    read = check_config(TrainConfig, tomllib.loads(text), where="")
    assert read == check_config(TrainConfig, VALUES, where="")
    assert 'max_running = "auto"' in text
    assert "\n# value_lr =\n" in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_the_first_keys_exist_and_are_fifteen() -> None:
    assert len(set(FIRST_KEYS)) == 15
    for key in FIRST_KEYS:
        model: Any = TrainConfig
        *path, name = key.split(".")
        for part in path:
            model = model.model_fields[part].annotation
        assert name in model.model_fields
