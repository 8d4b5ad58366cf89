"""SFT from a file to a saved directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from cluster.contracts.config.base import ModelConfig
from cluster.contracts.config.offline import (
    FitConfig,
    SftConfig,
    SftDataConfig,
)
from learner.models.load import load_tokenizer
from learner.offline.datasets import read_demonstrations
from learner.offline.sft import encode, train_sft

FAST = FitConfig(epochs=12, lr=3e-3, rows_per_step=16, tokens_per_microbatch=512, eval_every=1000)


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
