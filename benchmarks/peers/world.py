"""What both sides train: a model made from nothing, and prompts. Runs in Accord's environment.

python world.py FOLDER SIZE forced|varied
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

VOCABULARY = 640
MEAN_LENGTH = 24  # wanted, of answers that may end by themselves
SHAPES = {
    "0.3M": {"hidden": 64, "layers": 4, "heads": 2, "intermediate": 256},
    "1M": {"hidden": 128, "layers": 4, "heads": 4, "intermediate": 384},
    "19M": {"hidden": 384, "layers": 8, "heads": 6, "intermediate": 1536},
}


def make_world(folder: Path, size: str, varied: bool) -> int:
    """Write FOLDER/model and FOLDER/prompts.jsonl; returns the number of parameters."""
    from cluster.quickstart.helpdesk.demonstrations import corpus
    from learner.models.tiny import fresh_model, train_tokenizer

    model = folder / "model"
    model.mkdir(parents=True)
    texts = list(corpus(0, 500))
    tokenizer = train_tokenizer(texts, VOCABULARY, model)
    fresh_model(tokenizer, model, **SHAPES[size])
    words = " ".join(texts).split()
    rows = [{"prompt": " ".join(words[i * 9 : i * 9 + 9])} for i in range(256)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "prompts.jsonl").write_text(lines, encoding="utf-8")
    return adjust(model, tokenizer, [row["prompt"] for row in rows], varied)


def adjust(path: Path, tokenizer: Any, prompts: list[str], varied: bool) -> int:
    """With ``varied``, make the end as likely at every place as the mean length asks for.

    A constant is added to the residual stream (by the last layer's value bias), and the end's
    embedding points along it. Lengths are then geometric, cut at the longest allowed.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    parameters = sum(p.numel() for p in model.parameters())
    if not varied:
        return parameters
    end = tokenizer.eos_token_id
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts[:32]]
    with torch.no_grad():
        torch.manual_seed(0)
        bias = model.model.layers[-1].self_attn.v_proj.bias
        bias.copy_(torch.randn_like(bias) * 4)
        hidden = torch.cat([model.model(torch.tensor([row])).last_hidden_state[0] for row in ids])
        along = hidden.mean(dim=0)
        embedding = model.get_input_embeddings().weight
        others = torch.cat([embedding[:end], embedding[end + 1 :]])
        rest = torch.logsumexp(hidden @ others.T, dim=-1)
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            chance = torch.sigmoid(hidden @ (along * middle) - rest).mean()
            low, high = (middle, high) if chance < 1 / MEAN_LENGTH else (low, middle)
        embedding[end] = along * low
    model.save_pretrained(path)
    return parameters


if __name__ == "__main__":
    print(make_world(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "varied"))
