"""The plugin file of docs/extend.md: each kind of extension, and a step trained with them all."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cluster.contracts import plugins
from cluster.contracts.config.file import check_config, load_config
from cluster.contracts.config.offline import DpoConfig
from cluster.contracts.config.reward import RewardConfig
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import BadReward, UserError
from cluster.contracts.records import StepInput
from cluster.contracts.registry import POLICY_LOSSES, REGISTRIES
from cluster.weights.intake import Intake
from cluster.weights.transports import make_receiver
from learner.models.tiny import fresh_model, train_tokenizer
from learner.offline.dpo import train_dpo
from learner.rl.learner import PPOLearner
from learner.settings import learner_settings
from reward_service.client import RewardClient
from reward_service.server import serve
from reward_service.source import ScoreItem

ROOT = Path(__file__).resolve().parents[4]


def blocks(language: str) -> list[str]:
    page = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.M | re.S)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where commands are run; what plugins register is taken out again afterwards."""
    monkeypatch.chdir(tmp_path)
    before = [list(registry) for registry in REGISTRIES]
    yield tmp_path
    for plugin in plugins.loaded():
        plugins.forget(plugin.path)
    assert [list(registry) for registry in REGISTRIES] == before


@pytest.fixture
def plugin(folder: Path) -> Path:
    path = folder / "my_plugin.py"
    path.write_text("\n\n".join(blocks("python")), encoding="utf-8")
    return path


def write_config(folder: Path, tiny: Path, **more: str) -> str:
    sections = {
        "model": f'path = "{tiny}"',
        "data": 'prompts = "none.jsonl"',
        "batch": "prompts_per_step = 4\nsamples_per_prompt = 2\nsteps = 5",
        "algorithm": 'advantage = "median"\nadvantage_options = { scale = 0.5 }\n'
        'loss = "gentle"\nclip_low = 0.1\nloss_options = { down = 0.3 }',
        "learner": "lr = 1e-2",
        "weights": 'transport = "npz"',
        **more,
    }
    source = '[[reward.sources]]\ntype = "length"\ntarget = 4\n'
    tables = "".join(f"[{name}]\n{text}\n" for name, text in sections.items())
    path = folder / "config.toml"
    path.write_text(f'plugins = ["my_plugin.py"]\n{tables}{source}', encoding="utf-8")
    return str(path)


def test_one_plugin_file_extends_everything_a_step_is_made_of(
    world: ModuleType, tiny: Path, folder: Path, plugin: Path
) -> None:
    config = load_config(TrainConfig, write_config(folder, tiny))
    server = serve(config.reward)
    learner = PPOLearner(learner_settings(config, (4, 5, 6), run_dir=str(folder)))
    try:
        with RewardClient([server.address]) as client:
            client.connect()

            def score(tokens: Any) -> float:
                text = " ".join(map(str, tokens))
                messages = ({"role": "user", "content": "How many?"},)
                item = ScoreItem(id="x", messages=messages, response=text)
                return client.score_items([item])[0].value

            assert score([1, 2]) == -0.5
            first = learner.start()
            policy = learner.state.networks.policy
            groups = world.make_groups(policy, seed=2, score=score)
            step = StepInput(step=0, group_ids=(0, 1, 2, 3), payloads=(world.table_of(groups),))
            result = learner.step(step)
        fetched = dict(Intake(make_receiver("npz", "cpu"), 30.0).take(result.manifest))
        assert result.manifest.tensors != first.tensors
        name = next(iter(fetched))
        now = dict(policy.named_parameters())[name].detach().numpy()
        assert (fetched[name] == now).all()
    finally:
        learner.close()
        server.stop()


def test_options_of_the_config_reach_the_plugins_functions(
    tiny: Path, folder: Path, plugin: Path
) -> None:
    from learner.algorithms.advantages import AdvantageInputs
    from learner.rl.chosen import chosen_estimator, chosen_loss

    algorithm = load_config(TrainConfig, write_config(folder, tiny)).algorithm
    mask = torch.ones(2, 2, dtype=torch.bool)
    logp = torch.tensor([[0.0, -0.5], [0.0, 0.0]])
    losses = chosen_loss(algorithm)(logp, torch.zeros(2, 2), -torch.ones(2, 2), mask).losses
    # Negative advantage: 0.3 times a loss of 1, clipped at the ratio 1 - 0.1.
    torch.testing.assert_close(losses, 0.3 * torch.tensor([[1.0, 0.9], [1.0, 1.0]]))
    rewards = torch.tensor([[0.0, 1.0], [0.0, 4.0]])
    group_ids = torch.zeros(2, dtype=torch.int64)
    inputs = AdvantageInputs(rewards=rewards, mask=mask, group_ids=group_ids, scores=rewards[:, 1])
    assert chosen_estimator(algorithm)(inputs).advantages.tolist() == [[0, 0], [1.5, 1.5]]


@pytest.fixture(scope="module")
def small_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    tokenizer = train_tokenizer(["how is it", "great", "broken"], 300, folder / "tokenizer")
    return fresh_model(
        tokenizer, folder / "policy", hidden=32, layers=1, heads=2, intermediate=48, seed=1
    )


def dpo_config(policy: Path, folder: Path, **more: Any) -> DpoConfig:
    pair = {"prompt": "how is it", "chosen": "great", "rejected": "broken"}
    (folder / "pairs.jsonl").write_text("\n".join([json.dumps(pair)] * 4), encoding="utf-8")
    tree = {
        "plugins": ["my_plugin.py"],
        "model": {"path": str(policy)},
        "data": {"path": str(folder / "pairs.jsonl")},
        "fit": {"eval_fraction": 0.0, "max_tokens": 64},
        "loss": "hinge",
        "kl_samples": 0,
        **more,
    }
    return check_config(DpoConfig, tree, where="test")


def test_a_policy_is_trained_with_a_preference_loss_of_a_plugin(
    small_policy: Path, folder: Path, plugin: Path
) -> None:
    config = dpo_config(small_policy, folder, beta=0.2, loss_options={"room": 0.5})
    told: list[Any] = []
    train_dpo(config, folder / "run", lambda step, part, numbers: told.append(dict(numbers)))
    assert told[0]["train/loss"] == pytest.approx(0.5), "policy and reference are the same"
    assert (folder / "run" / "policy").is_dir()


def test_what_a_preference_loss_of_a_plugin_does_not_know_or_does_wrong_is_named(
    small_policy: Path, folder: Path, plugin: Path
) -> None:
    with pytest.raises(UserError, match=r"unknown option loss_options.space; valid here: room"):
        dpo_config(small_policy, folder, loss_options={"space": 1})
    with pytest.raises(UserError, match="'hinge' takes no label_smoothing"):
        dpo_config(small_policy, folder, label_smoothing=0.1)
    with pytest.raises(UserError, match="no preference loss of this name; did you mean 'hinge'"):
        dpo_config(small_policy, folder, loss="hing")
    text = plugin.read_text()
    plugin.write_text(text.replace("return torch.relu(", "return torch.rely("))
    config = dpo_config(small_policy, folder)
    with pytest.raises(UserError, match=r"my_plugin.py:\d+ `return torch.rely.*'hinge' raised"):
        train_dpo(config, folder / "run")
    plugin.write_text(text.replace("return torch.relu(", "return torch.max("))
    with pytest.raises(UserError, match=r"'hinge' returned \(\) for 4 pairs"):
        train_dpo(dpo_config(small_policy, folder), folder / "again")


def test_a_command_of_a_plugin(folder: Path, plugin: Path) -> None:
    (folder / "r").mkdir()
    (folder / "r" / "metrics.jsonl").write_text("{}\n{}\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "count-steps", "r"],
        cwd=folder,
        env={**os.environ, "ACCORD_NO_BOOTSTRAP": "1", plugins.VARIABLE: "my_plugin.py"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "r: 2 steps\n"), done.stderr


def test_the_text_that_the_driver_read_is_what_runs_elsewhere(folder: Path, plugin: Path) -> None:
    plugins.load_plugins(["my_plugin.py"])
    shipped = plugins.loaded()
    plugins.forget(str(plugin))
    plugin.unlink()
    assert "gentle" not in POLICY_LOSSES
    plugins.install(shipped)
    assert POLICY_LOSSES["gentle"].options == ("clip_low", "clip_high", "down")
    with pytest.raises(UserError) as raised:
        plugins.guarded(POLICY_LOSSES["gentle"].function, str(plugin), "the loss")(1, 2, 3, 4)
    line = "terms = ppo_clip(logp, prox_logp, advantages, mask, clip_low=clip_low"
    assert re.search(r"my_plugin\.py:\d+ `" + re.escape(line), str(raised.value))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1\ny = x / 0\n", r"my_plugin\.py:2 `y = x / 0`.*ZeroDivisionError"),
        ("def f(:\n", r"my_plugin\.py:1 `def f\(:`.*SyntaxError"),
        ("import no_such_module\n", r"my_plugin\.py:1 .*No module named 'no_such_module'"),
        ("raise SystemExit(3)\n", r"my_plugin\.py:1 .*SystemExit: 3"),
        (
            "from cluster.contracts.registry import policy_loss\npolicy_loss('ppo')(lambda a: a)\n",
            r"my_plugin\.py: registers the policy loss 'ppo', which Accord itself has already",
        ),
    ],
)
def test_a_plugin_that_cannot_be_loaded_is_one_message(
    folder: Path, tiny: Path, text: str, says: str
) -> None:
    (folder / "my_plugin.py").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=says):
        load_config(TrainConfig, write_config(folder, tiny))
    assert plugins.loaded() == ()


def test_a_plugin_file_that_is_not_there(folder: Path, tiny: Path) -> None:
    with pytest.raises(UserError, match=r"plugin file my_plugin\.py: cannot be read"):
        load_config(TrainConfig, write_config(folder, tiny))


@pytest.mark.parametrize(
    ("section", "text", "says"),
    [
        ("algorithm", 'loss = "gentel"', "did you mean 'gentle'. known: ppo, reinforce, cispo"),
        ("algorithm", 'advantage = "grpoo"', "did you mean 'grpo'"),
        ("weights", 'transport = "dsk"', "did you mean 'disk'"),
        (
            "algorithm",
            'loss = "gentle"\nloss_options = { dwn = 1 }',
            "loss_options.dwn; v.*down",
        ),
        ("algorithm", "loss_options = { clip_low = 1 }", "valid here: none"),
        ("algorithm", 'loss = "gentle"\ndual_clip = 3', "does nothing .*belongs to 'ppo'"),
    ],
)
def test_words_and_options_that_do_not_exist_name_the_nearest(
    folder: Path, tiny: Path, plugin: Path, section: str, text: str, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        load_config(TrainConfig, write_config(folder, tiny, **{section: text}))


def test_a_reward_kind_checks_its_own_keys(folder: Path, plugin: Path) -> None:
    plugins.load_plugins(["my_plugin.py"])
    for source, says in (
        ({"type": "length", "targt": 4, "target": 4}, "no key targt: did you mean target"),
        ({"type": "length"}, "needs the key target"),
        ({"type": "lenght", "target": 4}, "did you mean 'length'"),
        ({"target": 4}, "needs a type: 'model', 'function'"),
    ):
        with pytest.raises(ValueError, match=says):
            RewardConfig.model_validate({"sources": [source]})


def test_a_reward_that_fails_names_the_plugins_line(folder: Path) -> None:
    (folder / "my_plugin.py").write_text(
        "from cluster.contracts.registry import reward_kind\n"
        "@reward_kind('broken')\n"
        "def broken(*, by=0):\n"
        "    return lambda items: [1 / by for item in items]\n"
    )
    plugins.load_plugins(["my_plugin.py"])
    config = RewardConfig.model_validate({"sources": [{"type": "broken"}]})
    from reward_service.composition import build

    composition = build(config)
    with pytest.raises(BadReward, match=r"my_plugin\.py:4 `return lambda.*ZeroDivisionError"):
        composition.score([ScoreItem(id="x", messages=(), response="a")])


def test_a_changed_plugin_takes_the_place_of_the_old(folder: Path) -> None:
    path = folder / "my_plugin.py"
    for word in ("first", "second"):
        path.write_text(
            "from cluster.contracts.registry import policy_loss\n"
            f"policy_loss('{word}')(lambda logp: logp)\n"
        )
        plugins.load_plugins([str(path)])
    assert "second" in POLICY_LOSSES
    assert "first" not in POLICY_LOSSES
