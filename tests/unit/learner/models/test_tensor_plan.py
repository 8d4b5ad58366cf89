"""Plans for tensor parallelism: what is refused. What they compute is in rl/test_ranks.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from cluster.contracts.errors import Fatal, UserError
from learner.compute.ranks import Ranks
from learner.compute.ulysses import SequencePart
from learner.models import tensor_plan
from learner.models.packed_attention import run_trunk
from learner.models.tensor_plan import split_matrices

MESH: Any = SimpleNamespace(tensor_devices="two", tensor=Ranks(0, 2))


def fresh(kind: str, **changes: Any) -> Any:
    shape = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model(kind, **{**shape, **changes})
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def test_a_model_without_a_plan_is_refused_with_another_way() -> None:
    with pytest.raises(UserError, match="no plan that says how to split") as caught:
        split_matrices(fresh("gpt2"), MESH, "learner")
    assert caught.value.where == "learner.tensor_parallel"
    assert "fsdp2" in caught.value.fix


def test_a_plan_with_layers_that_were_not_tried_is_refused() -> None:
    model = fresh("qwen2", intermediate_size=8, num_key_value_heads=2)
    model.tp_plan = {**model.tp_plan, "model.layers.*.mlp": "moe_tp_experts"}
    with pytest.raises(UserError, match=r"ways that were not tried here \(moe_tp_experts\)"):
        split_matrices(model, MESH, "fit")


def test_a_plan_that_does_not_take_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("qwen2", intermediate_size=8, num_key_value_heads=2)
    monkeypatch.setattr(tensor_plan, "apply_tensor_parallelism", lambda *_: None)
    with pytest.raises(UserError, match=r"would not be split: lm_head, model\.layers\.\*\.mlp"):
        split_matrices(model, MESH, "learner")


def test_one_process_splits_nothing() -> None:
    split_matrices(fresh("gpt2"), SimpleNamespace(tensor_devices=None), "learner")  # type: ignore[arg-type]


def test_a_model_that_does_not_tell_its_attention_of_split_rows_is_refused() -> None:
    def deaf(**given: Any) -> Any:
        states: Tensor = given["input_ids"][..., None].float()
        return SimpleNamespace(last_hidden_state=states)

    ids = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(Fatal, match="is not told by its model"):
        run_trunk(deaf, ids, None, SequencePart(Ranks(0, 2), ids))
