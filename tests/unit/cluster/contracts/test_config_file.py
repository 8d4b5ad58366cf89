from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from cluster.contracts.config.file import check_config, dump_toml, load_config, toml_value
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import UserError

BASE = ["model.path=m", "data.prompts=p.jsonl", 'reward.sources=[{type="model",path="rm"}]']


TREE = {
    "model": {"path": "m"},
    "data": {"prompts": "p.jsonl"},
    "reward": {"sources": [{"type": "model", "path": "rm"}]},
}


def problem(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(TrainConfig, None, [*BASE, *overrides])
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("batch.setps=3", "unknown key batch.setps: did you mean batch.steps?"),
        ("lerner.lr=1", "unknown key lerner: did you mean learner?"),
        (
            "algorithm.kl.tagret=3",
            "unknown key algorithm.kl.tagret: did you mean algorithm.kl.target?",
        ),
    ],
)
def test_a_misspelt_key_names_the_nearest(override: str, hint: str) -> None:
    assert hint in problem(override)


def test_a_misspelt_key_of_a_reward_source_names_the_nearest() -> None:
    assert "did you mean" in problem("reward.sources.0.pth=3")
    assert "path" in problem("reward.sources.0.pth=3")


def test_all_problems_are_told_at_once() -> None:
    text = problem("batch.steps=0", "learner.lr=abc", "rollout.temprature=1")
    assert all(part in text for part in ("batch.steps = 0", "learner.lr = 'abc'", "temperature"))


def test_cross_section_problems_are_told_together() -> None:
    text = problem(
        "algorithm.advantage=grpo", "batch.samples_per_prompt=1", "algorithm.truncated=bootstrap"
    )
    assert "samples_per_prompt" in text
    assert "bootstrap" in text


def test_a_shortest_answer_over_the_longest_is_refused() -> None:
    assert "min_tokens = 65 is over max_tokens = 64" in problem(
        "rollout.min_tokens=65", "rollout.max_tokens=64"
    )


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(
        '[model]\npath="a"\n[data]\nprompts="p"\n[batch]\nsteps=7\n[[reward.sources]]\n'
        'type="rules"\nmax_words=3\n'
    )
    config = load_config(TrainConfig, str(file), ["batch.steps=9", "model.path=b c"])
    assert (config.batch.steps, config.model.path, config.staleness.bound) == (9, "b c", 2)


def test_the_resolved_config_reads_back_equal() -> None:
    config = load_config(
        TrainConfig, None, [*BASE, 'run.parents={sft="runs/a\\"b"}', "reward.sources.0.weight=0.5"]
    )
    assert check_config(TrainConfig, tomllib.loads(dump_toml(config)), where="") == config


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such config file"):
        load_config(TrainConfig, str(tmp_path / "none.toml"))
    bad = tmp_path / "bad.toml"
    bad.write_text("[model\n")
    with pytest.raises(UserError, match="not valid TOML"):
        load_config(TrainConfig, str(bad))


def test_a_word_that_is_no_override() -> None:
    assert "section.key=value" in problem("batch.steps")


def test_none_is_a_word_where_a_key_has_it_and_no_value_elsewhere() -> None:
    config = load_config(
        TrainConfig,
        None,
        [*BASE, "staleness.correction=none", "learner.sharding=none", "learner.value_lr=none"],
    )
    assert (config.staleness.correction, config.learner.sharding) == ("none", "none")
    assert config.learner.value_lr is None


def test_text_keys_take_numbers_from_the_command_line_as_text() -> None:
    config = load_config(TrainConfig, None, [*BASE, "run.name=42", "model.revision=1.0"])
    assert (config.run.name, config.model.revision) == ("42", "1.0")
    config = load_config(TrainConfig, None, [*BASE, 'run.name="a b"', "cluster.address=none"])
    assert (config.run.name, config.cluster.address) == ("a b", None)


@pytest.mark.parametrize(
    "override",
    [
        "algorithm.kl.coef=1e999", "learner.lr=nan", "learner.lr=inf", "rollout.cpus=-inf",
        "reward.sources.0.weight=nan", "learner.betas=[0.9, nan]", "learner.eps=inf",
    ],
)  # fmt: skip
def test_numbers_that_are_not_finite_are_refused(override: str) -> None:
    assert "finite number" in problem(override)


@pytest.mark.parametrize("name", ["../evil", "a/b", "..", ".", "a\\b", "a\nb", "x" * 201, "\0"])
def test_a_run_s_name_is_one_folder(name: str) -> None:
    with pytest.raises(UserError, match=r"run.name = .*must (be the name of one|have at most)"):
        check_config(TrainConfig, TREE | {"run": {"name": name}}, where="c.toml")


def test_control_characters_in_a_config_read_back_equal() -> None:
    tree = TREE | {"model": {"path": 'a\r\t"\\\x00\x7f\x1bé'}}
    config = check_config(TrainConfig, tree, where="")
    assert check_config(TrainConfig, tomllib.loads(dump_toml(config)), where="") == config


def test_names_with_dots_and_slashes_are_read_back_as_they_were_written() -> None:
    labels = {"ray.io/market-type": "spot", "a b": "in(x, y)", "plain": "!z"}
    words = [*BASE, f"rollout.labels={toml_value(labels)}", "rollout.resources={rollout=1}"]
    config = load_config(TrainConfig, None, words)
    assert config.rollout.labels == labels
    again = check_config(TrainConfig, tomllib.loads(dump_toml(config)), where="test")
    assert again.rollout == config.rollout


@pytest.mark.parametrize(("name", "kind"), [("a.jsonl", "file of rows"), ("a.db", "store")])
def test_another_kind_of_file_is_named(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_text("")  # an empty file is valid TOML
    with pytest.raises(UserError, match=rf"is a .*{kind}.*, but a config is a TOML file"):
        load_config(TrainConfig, str(tmp_path / name))
