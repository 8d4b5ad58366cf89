"""Which adapter a name stands for, and what a run of several policies says of itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.assembly.adapted import AdaptedModel, adapted
from cluster.contracts.config.base import ModelConfig
from cluster.contracts.errors import UserError
from cluster.runs.policies import adapter_directory, policy_directory


def adapter(folder: Path, base: str = "models/base", rank: int = 4) -> Path:
    folder.mkdir(parents=True)
    config = {"base_model_name_or_path": base, "r": rank}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_a_name_stands_for_the_result_or_else_for_the_newest_checkpoint(tmp_path: Path) -> None:
    for step in (2, 10):
        adapter(tmp_path / "checkpoints" / f"step-{step:06d}" / "policies" / "brief" / "adapter")
    found = adapter_directory(str(tmp_path), "brief")
    assert found == str(tmp_path / "checkpoints/step-000010/policies/brief/adapter")
    result = adapter(tmp_path / "adapters" / "brief")
    assert adapter_directory(str(tmp_path), "brief") == str(result)
    with pytest.raises(UserError, match=r"no adapter 'wordy'.*are brief"):
        adapter_directory(str(tmp_path), "wordy")


def test_a_run_of_several_policies_has_no_policy_of_its_own(tmp_path: Path) -> None:
    adapter(tmp_path / "adapters" / "brief")
    adapter(tmp_path / "adapters" / "wordy")
    with pytest.raises(UserError, match="several policies: brief, wordy"):
        policy_directory(str(tmp_path))


def test_an_adapter_stands_where_a_model_is_asked_for(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "own")
    made = adapted(ModelConfig(path=str(folder), dtype="bfloat16"))
    assert made == AdaptedModel(path="models/base", dtype="bfloat16", adapter=str(folder), rank=4)
    assert adapted(made) is made
    plain = ModelConfig(path="models/base")
    assert adapted(plain) is plain


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "own")
    assert adapter_directory("models/base", str(folder)) == str(folder)
    with pytest.raises(UserError, match="trained on models/base, not on models/other"):
        adapter_directory("models/other", str(folder))
    nameless = tmp_path / "nameless"
    nameless.mkdir()
    (nameless / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="does not name the model"):
        adapted(ModelConfig(path=str(nameless)))
