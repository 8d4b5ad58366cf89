"""Every key of every command's config says in words what it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from cluster.contracts.config.base import Section
from cluster.contracts.config.evaluate import EvaluateConfig
from cluster.contracts.config.offline import DpoConfig, RewardModelConfig, SftConfig
from cluster.contracts.config.pipeline import PipelineConfig
from cluster.contracts.config.train import TrainConfig

CONFIGS = (TrainConfig, SftConfig, RewardModelConfig, DpoConfig, EvaluateConfig, PipelineConfig)


def sections_of(kind: Any) -> list[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [section for part in get_args(kind) for section in sections_of(part)]


def undescribed(model: type[BaseModel], where: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = sections_of(field.annotation)
        if not inner and not (field.description or "").strip():
            yield f"{where}{name}"
        for section in inner:
            yield from undescribed(section, f"{where}{name}.")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_key_is_described(config: type[BaseModel]) -> None:
    assert sorted(set(undescribed(config, ""))) == []


def test_a_key_without_a_description_is_found() -> None:
    class Inner(Section):
        plain: int = 3

    class Outer(Section):
        inner: Inner = Inner()

    assert list(undescribed(Outer, "")) == ["inner.plain"]
