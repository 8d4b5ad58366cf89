"""SFT and reward model from a file to a saved directory."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cluster.contracts.config.base import ModelConfig
from cluster.contracts.config.offline import (
    FitConfig,
    PairsConfig,
    RewardModelConfig,
    SftConfig,
    SftDataConfig,
)
from cluster.contracts.errors import UserError
from learner.compute.microbatches import token_row
from learner.models.heads import reward_scores
from learner.models.load import ValueModel, load_reward_model, load_tokenizer
from learner.models.reward_artifact import FILE
from learner.offline.datasets import read_demonstrations
from learner.offline.reward import PairRow, RewardTask, reward_padding_id, train_reward_model
from learner.offline.sft import encode, train_sft

FAST = FitConfig(epochs=12, lr=3e-3, rows_per_step=16, tokens_per_microbatch=512, eval_every=1000)


def pairs_file(folder: Path, count: int = 96) -> str:
    """The good answer says "great", the bad one "broken"; all else is noise."""
    rng, lines = random.Random(0), []
    for i in range(count):
        filler = rng.choice(["battery", "screen", "hours"])
        row = {
            "prompt": [{"role": "user", "content": f"how is the {filler} {i}"}],
            "chosen": [{"role": "assistant", "content": f"great {filler}" + " yes" * (i % 4)}],
            "rejected": [{"role": "assistant", "content": f"broken {filler}" + " yes" * (i % 3)}],
        }
        lines.append(json.dumps(row))
    (folder / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(folder / "pairs.jsonl")


def model(path: Path) -> ModelConfig:
    return ModelConfig(path=str(path))


def test_sft_mask_covers_the_answers_and_their_end_tokens_only(
    tiny_policy: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(tiny_policy)
    turns = [("user", "how long"), ("assistant", "hours"), ("user", "my"), ("assistant", "no yes")]
    rows = [
        {"messages": [{"role": role, "content": content} for role, content in turns]},
        {"prompt": "the screen", "completion": " is broken"},
        {"text": "good battery"},
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    chat, plain, text = (
        encode(tokenizer, row) for row in read_demonstrations(str(tmp_path / "d.jsonl")).items
    )
    assert tokenizer.decode(chat.input_ids[chat.loss_mask]) == "hours<|end|>no yes<|end|>"
    assert tokenizer.decode(chat.input_ids) == (
        "<|user|>how long<|end|><|assistant|>hours<|end|>"
        "<|user|>my<|end|><|assistant|>no yes<|end|>"
    )
    assert tokenizer.decode(plain.input_ids[plain.loss_mask]) == " is broken<|end|>"
    assert text.trained == len(text) - 1


def test_sft_learns_reports_stops_and_saves_a_complete_directory(
    tiny_policy: Path, tmp_path: Path
) -> None:
    answers = {"battery": "lasts ten hours", "screen": "is great", "hours": "are good"}
    lines = []
    for i in range(60):
        topic = list(answers)[i % 3]
        messages = [
            {"role": "user", "content": f"how {i} {topic}"},
            {"role": "assistant", "content": answers[topic]},
        ]
        lines.append(json.dumps({"messages": messages}))
    lines.append(json.dumps({"prompt": "long", "completion": "x " * 600}))
    (tmp_path / "d.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = SftConfig(
        model=model(tiny_policy),
        data=SftDataConfig(path=str(tmp_path / "d.jsonl")),
        fit=FAST.model_copy(update={"eval_fraction": 0.1, "epochs": 40}),
    )
    numbers: list[Any] = []
    run = tmp_path / "run"
    interrupted = train_sft(
        config, run, lambda s, f, n: numbers.append(n), should_stop=lambda: len(numbers) == 9
    )
    assert json.loads((run / "fit.json").read_text())["finished"] is False
    assert (interrupted / "model.safetensors").exists()
    saved = train_sft(config, run, lambda s, f, n: numbers.append(n))
    summary = json.loads((run / "fit.json").read_text())
    assert (summary["finished"], summary["rows_too_long"]) == (True, 1)
    assert summary["rows"] + summary["rows_held_out"] == 60
    assert summary["evaluation"]["eval/accuracy"] > 0.9
    assert numbers[0]["train/loss"] > 5 > 0.5 > summary["evaluation"]["eval/loss"]
    # Anyone can load what was saved, and it ends its answers.
    plain = transformers.AutoModelForCausalLM.from_pretrained(saved)
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "how 3 battery"}], add_generation_prompt=True
    )["input_ids"]
    out = plain.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, len(ids) :]
    assert tokenizer.decode(out) == "lasts ten hours<|end|>"
    generation = json.loads((saved / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id != tokenizer.pad_token_id


@pytest.fixture(scope="module")
def reward_dir(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rm")
    centre = [
        {"prompt": [{"role": "user", "content": f"how {i}"}], "completion": word}
        for i, word in enumerate(["great", "broken", "yes", "no"] * 3)
    ]
    (folder / "centre.jsonl").write_text(
        "\n".join(json.dumps(row) for row in centre), encoding="utf-8"
    )
    config = RewardModelConfig(
        model=model(tiny_policy),
        data=PairsConfig(path=pairs_file(folder)),
        fit=FAST.model_copy(update={"eval_fraction": 0.2}),
    )
    return train_reward_model(config, folder / "run", centre_rows=folder / "centre.jsonl")


def test_reward_model_learns_what_is_separable(reward_dir: Path) -> None:
    evaluation = json.loads((reward_dir.parent / "fit.json").read_text())["evaluation"]
    assert evaluation["rm/accuracy"] >= 0.95
    assert evaluation["rm/loss"] < 0.2
    assert 0 <= evaluation["rm/ece"] < 0.2
    bins = json.loads((reward_dir.parent / "reliability.json").read_text())
    held_out = json.loads((reward_dir.parent / "fit.json").read_text())["rows_held_out"]
    assert sum(item["count"] for item in bins) == held_out
    gap = sum(b["count"] * abs(b["mean_probability"] - b["frequency"]) for b in bins) / held_out
    assert gap == pytest.approx(evaluation["rm/ece"], abs=1e-6)
    _, artifact = load_reward_model(reward_dir)
    assert artifact.centred_on == "answers of the starting policy"
    assert artifact.normalise(artifact.centre_mean + 2 * artifact.centre_std) == pytest.approx(2)


@torch.no_grad()
def test_padding_does_not_move_scores_and_transformers_agrees(reward_dir: Path) -> None:
    scorer, artifact = load_reward_model(reward_dir)
    rows = [list(row.token_ids) for row in artifact.golden] + [[9, 8, 7, 4]]
    width = max(map(len, rows)) + 3
    pad = scorer.config.pad_token_id
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    batch = reward_scores(scorer, ids, mask)
    for row, score in zip(rows, batch, strict=True):
        alone = torch.tensor([row])
        one = reward_scores(scorer, alone, torch.ones_like(alone))[0]
        torch.testing.assert_close(one, score, rtol=1e-5, atol=1e-5)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(reward_dir).eval()
    logits = theirs(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
    torch.testing.assert_close(logits, batch, rtol=1e-5, atol=1e-5)
    # What stands under the mask is never looked at.
    ids[mask == 0] = 5
    torch.testing.assert_close(reward_scores(scorer, ids, mask), batch, rtol=1e-5, atol=1e-5)


def test_value_network_starts_as_the_normalised_score(reward_dir: Path) -> None:
    _, artifact = load_reward_model(reward_dir)
    ids = torch.tensor([artifact.golden[0].token_ids])
    with torch.no_grad():
        values = ValueModel.from_reward_model(reward_dir)(ids, torch.ones_like(ids))
    assert values.shape == ids.shape
    expected = artifact.normalise(artifact.golden[0].score)
    assert float(values[0, -1]) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_changed_reward_weights_are_noticed(reward_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in reward_dir.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    load_reward_model(copy)
    tensors = load_file(copy / "model.safetensors")
    save_file(
        {**tensors, "score.weight": tensors["score.weight"] + 0.3}, copy / "model.safetensors"
    )
    with pytest.raises(UserError, match="when it was saved"):
        load_reward_model(copy)
    (copy / FILE).unlink()
    with pytest.raises(UserError, match="not a reward model made by Accord"):
        load_reward_model(copy)


def test_margins_are_asked_for_by_row(tiny_policy: Path, tmp_path: Path) -> None:
    config = RewardModelConfig(
        model=model(tiny_policy), data=PairsConfig(path=pairs_file(tmp_path, 4)), use_margin=True
    )
    with pytest.raises(UserError, match=r"line \d: has no margin"):
        train_reward_model(config, tmp_path / "run")


def test_padding_id_never_ends_an_answer(tiny_policy: Path) -> None:
    tokenizer = load_tokenizer(tiny_policy)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert reward_padding_id(tokenizer, [end]) == pad
    tokenizer.pad_token = tokenizer.eos_token
    assert reward_padding_id(tokenizer, [end]) == pad  # "<|pad|>" is still there, and free
    with pytest.raises(UserError, match="also an end token"):
        reward_padding_id(tokenizer, [end, pad])


def test_calibration_by_hand(monkeypatch: pytest.MonkeyPatch, tiny_policy: Path) -> None:
    # Certainty 0.75 (gap log 3), right in 3 of 4; certainty 0.9 (gap log 9), right in 0 of 1.
    gaps = torch.tensor([math.log(3)] * 3 + [-math.log(3), -math.log(9)])
    config = RewardModelConfig(model=model(tiny_policy), data=PairsConfig(path="x"))
    task = RewardTask(None, config, torch.device("cpu"))
    monkeypatch.setattr(RewardTask, "pair_scores", lambda self, rows: (gaps, 0 * gaps))
    row = token_row([5, 6], [False, True])
    measured = task.evaluate([PairRow(row, row, 0.0)] * 5)
    numbers = {metric.name: metric.value for metric in measured}
    assert numbers["rm/ece"] == pytest.approx((4 * 0.0 + 1 * 0.9) / 5, abs=1e-6)
    assert numbers["rm/accuracy"] == pytest.approx(0.6)
    assert numbers["rm/margin"] == pytest.approx((2 * math.log(3) - math.log(9)) / 5)
