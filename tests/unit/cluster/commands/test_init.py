"""`accord init`: what it writes is a valid config, and it asks only on a terminal."""

from __future__ import annotations

import os
import pty
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.assembly import new_config
from cluster.assembly.new_config import CONFIGS, Algorithm, Answers, reward_source, write_new_config
from cluster.contracts.config.file import load_config
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import UserError

ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answers(algorithm: Algorithm = "grpo", reward: str = "", model: str = "some/model") -> Answers:
    return Answers(algorithm=algorithm, model=model, data="rows.jsonl", reward=reward)


@pytest.mark.parametrize("algorithm", list(CONFIGS))
def test_what_is_written_is_a_valid_config(folder: Path, algorithm: Algorithm) -> None:
    written = write_new_config(Path(), answers(algorithm))
    config = load_config(CONFIGS[algorithm], str(written[0]))
    assert written[0] == Path(f"{algorithm}.toml")
    assert [path.name for path in written[1:]] == (
        ["reward.py"] if CONFIGS[algorithm] is TrainConfig else []
    )
    assert "some/model" in str(config)
    lines = written[0].read_text("utf-8").splitlines()
    keys = [i for i, line in enumerate(lines) if " = " in line and not line.startswith("#")]
    assert all(lines[i - 1].startswith("# ") for i in keys), "a key without a comment above it"


def test_the_reward_to_start_from_works_on_texts_and_on_chats(folder: Path) -> None:
    write_new_config(Path(), answers())
    score = runpy.run_path(str(folder / "reward.py"))["score"]
    texts = ["", "word " * 30]
    assert score(prompts=["p", "p"], completions=texts) == [0.0, 1.0]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    assert score(prompts=["p", "p"], completions=chats, column=[1, 2]) == [0.0, 1.0]


def test_nothing_is_overwritten(folder: Path) -> None:
    write_new_config(Path("mine.toml"), answers())
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=r"mine\.toml: is there already"):
        write_new_config(Path("mine.toml"), answers())
    with pytest.raises(UserError, match=r"reward\.py: is there already"):
        write_new_config(Path("other.toml"), answers())
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_is_made_and_its_reward_found_from_here(folder: Path) -> None:
    written = write_new_config(Path("new/folder"), answers("ppo"))
    config = load_config(TrainConfig, str(written[0]))
    assert config.reward.sources[0].model_dump()["path"] == "new/folder/reward.py:score"


def test_the_learning_rate_fits_the_size_of_the_model(folder: Path) -> None:
    (folder / "config.json").write_text(
        '{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 320}'
    )
    small = load_config(
        TrainConfig,
        str(write_new_config(Path("a.toml"), answers("grpo", "r.py:f", str(folder)))[0]),
    )
    large = load_config(
        TrainConfig, str(write_new_config(Path("b.toml"), answers("grpo", "r.py:f"))[0])
    )
    assert (small.learner.lr, large.learner.lr) == (2e-4, 1e-6)


def test_words_for_a_reward(folder: Path) -> None:
    assert reward_source("a/b.py:f") == {"type": "function", "path": "a/b.py:f"}
    assert reward_source(str(folder)) == {"type": "model", "path": str(folder)}
    assert reward_source("host:70") == {"type": "grpc", "address": "host:70"}
    with pytest.raises(UserError, match="names no function"):
        reward_source("b.py")
    with pytest.raises(UserError, match="is no reward"):
        reward_source("nowhere/at/all")


def test_a_place_that_cannot_be_written_is_named(folder: Path) -> None:
    (folder / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_new_config(Path("file/inside.toml"), answers("sft"))


def command(*words: str) -> list[str]:
    return [sys.executable, str(ROOT / "launch.py"), "init", *words]


def test_without_a_terminal_what_is_missing_is_named(folder: Path) -> None:
    done = subprocess.run(
        command("--model", "m"),
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("accord: error: accord init: needs --data")
    assert list(folder.iterdir()) == []


def test_on_a_terminal_it_asks_for_what_is_missing(folder: Path) -> None:
    ours, theirs = pty.openpty()
    started = subprocess.Popen(
        command("--model", "my-model"), stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    said = ""
    try:
        for question, answer in (("Algorithm", ""), ("Prompts", "p.jsonl"), ("Reward", "r.py:f")):
            until = time.monotonic() + 60
            while question not in said:
                assert time.monotonic() < until, said
                said += os.read(ours, 4096).decode()
            os.write(ours, f"{answer}\n".encode())
        assert started.wait(60) == 0
    finally:
        started.kill()
        os.close(ours)
    config = load_config(TrainConfig, "grpo.toml")
    assert (config.model.path, config.data.prompts) == ("my-model", "p.jsonl")
    assert config.reward.sources[0].model_dump()["path"] == "r.py:f"
    assert new_config.command_of("grpo") == "accord train"
