"""Prompts of several policies take turns; each keeps its own order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from actors.policy_prompts import held_out_of_policies, load_prompts_of_policies
from cluster.contracts.config.policies import PolicyConfig, turns
from cluster.contracts.config.rollout import DataConfig
from cluster.contracts.errors import UserError


class Words:
    chat_template = None
    eos_token = "</s>"
    name_or_path = "words"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


def policies(folder: Path, **shares: int) -> list[PolicyConfig]:
    found = []
    for count, (name, share) in enumerate(shares.items(), start=3):
        file = folder / f"{name}.jsonl"
        rows = [json.dumps({"prompt": f"{name} {'x' * n}"}) for n in range(1, count + 1)]
        file.write_text("\n".join(rows) + "\n", encoding="utf-8")
        found.append(PolicyConfig(name=name, prompts=str(file), share=share))
    return found


def load(found: list[PolicyConfig], **keys: Any) -> Any:
    return load_prompts_of_policies(found, DataConfig(prompts="all", **keys), Words(), 0)


def test_any_turn_s_worth_of_prompts_holds_each_policy_s_share(tmp_path: Path) -> None:
    found = policies(tmp_path, brief=1, wordy=2)
    assert turns(found) == [1, 0, 1]
    source = load(found)
    assert len(source) == 3 + 4
    for start in range(0, 30, 3):
        names = [source.prompt(start + n).policy for n in range(3)]
        assert sorted(names) == ["brief", "wordy", "wordy"]
    assert source.prompt(7).metadata["policy"] == source.prompt(7).policy


def test_each_policy_goes_through_its_own_file_epoch_by_epoch(tmp_path: Path) -> None:
    found = policies(tmp_path, brief=1, wordy=1)
    source = load(found)
    seen = [source.prompt(n) for n in range(48)]
    for name, count in (("brief", 3), ("wordy", 4)):
        own = [prompt.id for prompt in seen if prompt.policy == name]
        for epoch in range(0, len(own), count):
            assert len(set(own[epoch : epoch + count])) == count
        alone = load([policy for policy in found if policy.name == name], shuffle=False)
        assert set(own) == {prompt.id for prompt in alone.all()}
    assert [source.prompt(n).id for n in range(48)] == [prompt.id for prompt in seen]


def test_a_file_for_two_policies_gives_each_prompt_two_ids(tmp_path: Path) -> None:
    one = policies(tmp_path, brief=1)[0]
    source = load([one, one.model_copy(update={"name": "wordy"})])
    assert len({prompt.id for prompt in source.all()}) == 6


def test_a_column_that_names_another_policy_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": "a b", "policy": "other"}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="the column 'policy' says 'other'"):
        load([PolicyConfig(name="brief", prompts=str(file))])


def test_a_held_out_prompt_says_whose_it_is(tmp_path: Path) -> None:
    prompts = load(policies(tmp_path, brief=1)).all()
    assert [p.policy for p in held_out_of_policies(prompts, ["brief"])] == ["brief"] * 3
    with pytest.raises(UserError, match="none of \\[\\[policies\\]\\] \\(wordy\\)"):
        held_out_of_policies(prompts, ["wordy"])
