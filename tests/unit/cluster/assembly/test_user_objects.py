"""Objects of a session as files that a config can name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.assembly.from_python import draft, put_algorithm
from cluster.assembly.user_objects import Inputs, inputs_of_run, reward_sources
from cluster.contracts.config.reward import RulesSource
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import UserError


def rows(path: str) -> list[Any]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_rows_of_every_kind(tmp_path: Path) -> None:
    turn = [{"role": "user", "content": "Grüße"}]
    given = ["text", turn, {"prompt": "row", "level": 3}]
    path = Inputs(tmp_path).rows((item for item in given), "prompts", "prompt")
    assert rows(path) == [{"prompt": "text"}, {"prompt": turn}, {"prompt": "row", "level": 3}]
    assert Inputs(tmp_path).rows("prompts.jsonl", "prompts", "prompt") == "prompts.jsonl"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "prompts: holds no rows"),
        ({"prompt": "one"}, "prompts: is a dict"),
        (3, "prompts: is a int"),
        (["good", {"prompt": "x", "when": object()}], r"prompts\[1\]: cannot be written as JSON"),
        ([{"prompt": "x", "weight": float("nan")}], r"prompts\[0\]: cannot be written as JSON"),
    ],
)
def test_rows_that_are_none(tmp_path: Path, given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Inputs(tmp_path).rows(given, "prompts", "prompt")


@pytest.mark.parametrize(
    ("given", "tokenizer", "message"),
    [
        ("my-model", object(), "a tokenizer was given as well"),
        (object(), None, "is a object, neither a path"),
        (42, None, "is a int, neither a path"),
    ],
)
def test_models_that_are_none(tmp_path: Path, given: Any, tokenizer: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Inputs(tmp_path).model(given, tokenizer, "model")


def test_a_loaded_model_is_written_whole_and_needs_its_tokenizer(
    tiny: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny)
    with pytest.raises(UserError, match="without a tokenizer"):
        Inputs(tmp_path).model(model, None, "model")
    path = Inputs(tmp_path).model(model, AutoTokenizer.from_pretrained(tiny), "model")
    again = AutoModelForCausalLM.from_pretrained(path)
    assert all((a == b).all() for a, b in zip(model.parameters(), again.parameters(), strict=True))


def helpful(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [0.0] * len(completions)


class Scorer:
    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)


def test_rewards_of_every_kind_get_names_of_their_own(tmp_path: Path) -> None:
    made = reward_sources(
        [
            helpful,
            helpful,
            Scorer(),
            lambda completions, **_: [0.0] * len(completions),
            "rewards.py:brief",
            "runs/rm/reward_model",
            RulesSource(max_words=5),
            {"type": "grpc", "address": "localhost:1"},
        ],
        Inputs(tmp_path),
    )
    assert [tree["name"] for tree in made] == [
        "helpful", "helpful_2", "Scorer", "reward", "brief", "model", "rules", "grpc",
    ]  # fmt: skip
    assert [tree["type"] for tree in made] == [*["function"] * 5, "model", "rules", "grpc"]
    written = {Path(tree["path"]).name for tree in made[:4]}
    assert written == {
        f"{name}.function.json" for name in ("helpful", "helpful_2", "Scorer", "reward")
    }


@pytest.mark.parametrize("given", [[], 3, Scorer, [helpful, None]])
def test_rewards_that_are_none(tmp_path: Path, given: Any) -> None:
    with pytest.raises(UserError, match="no reward"):
        reward_sources(given, Inputs(tmp_path))


def test_a_reward_that_cannot_be_sent_says_why(tmp_path: Path) -> None:
    import threading

    lock = threading.Lock()
    with pytest.raises(UserError, match="cannot be sent to another process"):
        reward_sources(lambda completions, **_: [lock] * len(completions), Inputs(tmp_path))


def test_inputs_go_when_no_run_came_of_them(tmp_path: Path) -> None:
    with inputs_of_run(str(tmp_path), "r", "train") as new:
        new[1].rows(["a"], "prompts", "prompt")
        assert (tmp_path / "r" / "inputs" / "prompts.jsonl").is_file()
    assert list(tmp_path.iterdir()) == []
    with inputs_of_run(str(tmp_path), "r", "train") as new:
        new[1].rows(["a"], "prompts", "prompt")
        (tmp_path / "r" / "manifest.json").touch()
    assert (tmp_path / "r" / "inputs" / "prompts.jsonl").is_file()
    with (
        pytest.raises(UserError, match="the run directory exists"),
        inputs_of_run(str(tmp_path), "r", "train"),
    ):
        pass


def drafted(
    config: Any, algorithm: str | None = None, name: str | None = "n", **puts: Any
) -> TrainConfig:
    with draft("train", config, name=name, runs_dir=None, seed=7) as new:
        put_algorithm(new.tree, algorithm)
        new.put("model.path", "m")
        new.put("data.prompts", "p")
        new.put("reward.sources", [{"type": "rules"}])
        for key, value in puts.items():
            new.put(key.replace("__", "."), value)
        return new.checked(TrainConfig)


def test_a_config_is_a_tree_with_dotted_keys_a_file_or_an_object(tmp_path: Path) -> None:
    tree = drafted({"learner.lr": 3e-4, "batch": {"steps": 5, "prompts_per_step": 3}})
    assert (tree.learner.lr, tree.batch.steps, tree.batch.prompts_per_step) == (3e-4, 5, 3)
    assert (tree.run.name, tree.run.seed) == ("n", 7)
    file = tmp_path / "c.toml"
    file.write_text("[batch]\nsteps = 9\n")
    assert drafted(file).batch.steps == 9
    assert drafted(file, batch__steps=4).batch.steps == 4
    assert drafted(tree, batch__steps=6).learner.lr == 3e-4


def test_mistakes_are_named_as_on_the_command_line() -> None:
    with pytest.raises(UserError, match=r"accord\.train: unknown key learner\.lrr"):
        drafted({"learner.lrr": 1})
    with pytest.raises(UserError, match="name of one folder"):
        drafted({"run": {"name": "../evil"}}, name=None)
    with pytest.raises(UserError, match="goes below a plain value"):
        drafted({"learner.lr": 1e-3, "learner.lr.x": 1})


@pytest.mark.parametrize(
    ("name", "advantage", "loss", "place"),
    [
        ("ppo", "gae", "ppo", "reward"),
        ("grpo", "grpo", "ppo", "loss"),
        ("rloo", "rloo", "ppo", "reward"),
        ("gspo", "grpo", "gspo", "loss"),
        ("cispo", "grpo", "cispo", "loss"),
        ("reinforce++", "reinforce++", "ppo", "reward"),
        ("reinforce-baseline", "reinforce-baseline", "ppo", "reward"),
    ],
)
def test_an_algorithm_by_name(name: str, advantage: str, loss: str, place: str) -> None:
    found = drafted(None, name).algorithm
    assert (found.advantage, found.loss, found.kl.place) == (advantage, loss, place)


def test_the_config_wins_over_what_a_name_only_suggests() -> None:
    own = {"algorithm.kl.coef": 0.0, "algorithm.advantage": "gae", "algorithm.loss": "cispo"}
    found = drafted(own, "grpo").algorithm
    assert (found.advantage, found.kl.coef, found.kl.place) == ("grpo", 0.0, "loss")
    assert found.loss == "cispo"


def test_an_unknown_algorithm_lists_the_known() -> None:
    with pytest.raises(UserError, match="unknown algorithm 'gpro'") as problem:
        drafted(None, "gpro")
    assert "grpo" in str(problem.value)
