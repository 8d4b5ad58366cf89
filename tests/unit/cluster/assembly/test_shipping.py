"""What each role is sent, by the path it knows; and that every role finds it under that path."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.serving import worker_spec
from cluster.assembly import shipping
from cluster.assembly.prepare import with_pinned_models
from cluster.assembly.shipping import RoleFiles, role_files
from cluster.contracts.config.reward import JudgeSource, RewardConfig, SafetySource
from cluster.contracts.config.train import TrainConfig
from cluster.machine import parcels
from cluster.machine.parcel_files import Block
from cluster.machine.parcels import Parcel
from learner.settings import learner_settings, with_files_here
from reward_service.judge.cache import ReplyCache
from reward_service.judge.records import Reply
from reward_service.remote import as_found_here, as_the_command_knows

JOINED = {"started": False, "software": {"host": "host1"}}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    monkeypatch.chdir(tmp_path)
    for name in ("model", "reference", "value", "rm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
        (tmp_path / name / "model.safetensors").write_text("numbers of " + name)
        (tmp_path / name / ".git").mkdir()
        (tmp_path / name / ".git" / "history").write_text("of years")
    (tmp_path / "model" / "tokenizer.json").write_text("words")
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    rewards = tmp_path / "rewards"
    (rewards / "package").mkdir(parents=True)
    (rewards / "data").mkdir()
    (rewards / "data" / "rows.jsonl").write_text("{}")
    (rewards / "reward.py").write_text("import beside, package")
    (rewards / "beside.py").touch()
    (rewards / "package" / "__init__.py").write_text("x = 1")
    (rewards / "broken").symlink_to("/no/such/thing")
    return TrainConfig.model_validate(
        {
            "model": {"path": "model", "chat_template": "chat.jinja"},
            "data": {"prompts": "prompts.jsonl"},
            "reward": {
                "sources": [
                    {"type": "function", "path": "rewards/reward.py:score", "name": "f"},
                    {"type": "model", "path": "rm", "name": "m"},
                    {"type": "rules", "min_words": 1},
                ]
            },
            "learner": {"value_path": "value", "reference_path": "reference"},
            "rollout": {"max_tokens": 4},
            "cluster": {"address": "10.0.0.1:6379"},
        }
    )


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing keeps the bytes here, and every role is on a host that has none of the files."""
    kept: list[Block] = []

    def put(block: Block, root: Path) -> int:
        kept.append(block.copy())
        return len(kept) - 1

    def get_all(parcel: Parcel) -> Iterator[Block]:
        return (kept[chunk] for chunk in parcel.chunks)

    (tmp_path / "temp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    monkeypatch.setattr(parcels, "_held", {})
    monkeypatch.setattr(parcels, "_put", put)
    monkeypatch.setattr(parcels, "_get_all", get_all)
    monkeypatch.setattr(parcels, "is_here", lambda parcel: False)
    monkeypatch.setattr(shipping, "clear_hosts", lambda shipments: None)


def content(folder: str | Path) -> dict[str, str]:
    root = Path(folder)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_text() for path in files}


def packed(config: TrainConfig) -> RoleFiles:
    with role_files(config, JOINED) as files:
        return files


def spec(config: TrainConfig, files: RoleFiles) -> Any:
    return worker_spec(
        config,
        stop_ids=(1,),
        context=None,
        make_scorer=lambda: None,  # type: ignore[arg-type, return-value]
        threads=1,
        files=files.worker,
    )


@pytest.mark.usefixtures("elsewhere")
def test_a_worker_is_sent_the_model_without_weights(config: TrainConfig) -> None:
    made = spec(config, packed(config))
    assert made.files.software == {"host": "host1"}
    assert made.engine.weights == "published"
    here = made.files.here(made.engine.model_path)
    assert content(here) == {"config.json": "model", "tokenizer.json": "words"}


@pytest.mark.usefixtures("elsewhere")
def test_the_learner_finds_all_it_is_to_load(config: TrainConfig) -> None:
    settings = learner_settings(config, (1,), None, files=packed(config).learner)
    there = with_files_here(settings)
    numbers = {"model.safetensors": "numbers of model", "tokenizer.json": "words"}
    assert content(there.model.path) == {"config.json": "model", **numbers}
    assert Path(str(there.model.chat_template)).read_text() == "{{ messages }}"
    assert content(str(there.learner.reference_path))["model.safetensors"].endswith("reference")
    assert content(str(there.learner.value_path))["config.json"] == "value"
    assert there.learner.lr == config.learner.lr


@pytest.mark.usefixtures("elsewhere")
def test_the_reward_service_finds_functions_with_their_modules(config: TrainConfig) -> None:
    there = as_found_here(as_the_command_knows(config.reward), packed(config).reward)
    function, model, rules = there.sources
    file, _, name = function.path.rpartition(":")  # type: ignore[union-attr]
    assert (Path(file).name, name) == ("reward.py", "score")
    assert list(content(Path(file).parent)) == ["beside.py", "package/__init__.py", "reward.py"]
    assert content(model.path)["config.json"] == "rm"  # type: ignore[union-attr]
    assert rules == config.reward.sources[2]


@pytest.mark.usefixtures("elsewhere")
def test_the_reward_service_finds_what_judge_and_safety_layer_read(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "words.txt").write_text("darn")
    (tmp_path / "harm").mkdir()
    (tmp_path / "harm" / "config.json").write_text("classifier")
    ReplyCache("answers.db").put("known", Reply(text="7", finish_reason="stop"))
    sources = [
        {"type": "safety", "rules": [{"name": "oath", "words_file": "words.txt"}],
         "classifier": {"path": "harm", "label": "toxic"}},
        {"type": "judge", "base_url": "http://h/v1", "model": "m", "rubric": "r",
         "cache": "answers.db"},
    ]  # fmt: skip
    reward = RewardConfig.model_validate({"sources": sources})
    files = packed(config.model_copy(update={"reward": reward})).reward
    known = as_the_command_knows(reward)
    assert known.sources[0].audit == str(tmp_path / "runs" / "safety_audit.jsonl")  # type: ignore[union-attr]
    (tmp_path / "answers.db").rename(tmp_path / "away.db")  # the other host has a cache of its own
    ReplyCache("answers.db").put("own", Reply(text="8", finish_reason="stop"))
    safety, judge = as_found_here(known, files).sources
    assert isinstance(safety, SafetySource)
    assert isinstance(judge, JudgeSource)
    assert Path(str(safety.rules[0].words_file)).read_text() == "darn"
    assert safety.rules[0].words_file != str(tmp_path / "words.txt")
    assert safety.classifier is not None
    assert content(safety.classifier.path) == {"config.json": "classifier"}
    assert judge.cache == str(tmp_path / "answers.db")
    texts = [found.text for key in ("known", "own") if (found := ReplyCache(judge.cache).get(key))]
    assert texts == ["7", "8"]


def test_on_a_cluster_of_its_own_nothing_is_sent_and_paths_are_absolute(
    config: TrainConfig, tmp_path: Path
) -> None:
    with role_files(config, {"started": True, "software": None}) as files:
        assert files == RoleFiles()
    assert spec(config, files).engine.model_path == str(tmp_path / "model")
    there = with_files_here(learner_settings(config, (1,), None, files=files.learner))
    assert there.model.path == str(tmp_path / "model")
    assert there.model.chat_template == str(tmp_path / "chat.jinja")


def test_a_service_that_was_given_is_sent_nothing(config: TrainConfig, elsewhere: None) -> None:
    reward = config.reward.model_copy(update={"address": "10.0.0.9:7070"})
    assert packed(config.model_copy(update={"reward": reward})).reward.parcels == {}


# -- models of the hub ----------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """The model is one of the hub that was loaded on this host before; there is no network."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    repo = cache / "models--owner--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "tokenizer.json").write_text("words")
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(constants, name, str(cache), raising=False)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
    model = config.model.model_copy(update={"path": "owner/name"})
    learner = config.learner.model_copy(update={"reference_path": "owner/name"})
    return config.model_copy(update={"model": model, "learner": learner})


def test_a_hub_id_gets_its_commit_once(hub: TrainConfig) -> None:
    pinned = with_pinned_models(hub)
    assert pinned.model.revision == COMMIT
    assert pinned.learner.reference_revision == COMMIT
    assert with_pinned_models(pinned) == pinned


@pytest.mark.usefixtures("elsewhere")
def test_workers_need_no_hub_and_the_learner_loads_what_is_not_here(hub: TrainConfig) -> None:
    config = with_pinned_models(hub)
    files = packed(config)
    made = spec(config, files)
    assert content(made.files.here(made.engine.model_path)) == {
        "config.json": "{}",
        "tokenizer.json": "words",
    }
    there = with_files_here(learner_settings(config, (1,), None, files=files.learner))
    assert (there.model.path, there.model.revision) == ("owner/name", COMMIT)


def test_directories_have_no_commit(config: TrainConfig) -> None:
    assert with_pinned_models(config) == config
