"""What test_two_policies.py needs of processes of its own: a model and its domains, and the
log-probabilities of an adapter by vLLM alone.

    python two_policies.py make FOLDER
    python two_policies.py logprobs MODEL ADAPTER IDS_FILE OUT_FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

REWARDS = '''
def early(completions, policy, **columns):
    """Share of the letters that are among a to m."""
    assert set(policy) == {"early"}
    return [share(text_of(one), "abcdefghijklm") for one in completions]


def late(completions, policy, **columns):
    """Share of the letters that are among n to z."""
    assert set(policy) == {"late"}
    return [share(text_of(one), "nopqrstuvwxyz") for one in completions]


def share(text, letters):
    return sum(letter in letters for letter in text.lower()) / max(1, len(text))


def text_of(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]
'''

CONFIG = """
[run]
dir = "{folder}/runs"
name = "r"

[model]
path = "{folder}/model"

[lora]
rank = 8

[[policies]]
name = "early"
prompts = "{folder}/early.jsonl"

[[policies]]
name = "late"
prompts = "{folder}/late.jsonl"

[[reward.sources]]
type = "function"
name = "first_letters"
path = "{folder}/rewards.py:early"
policies = ["early"]

[[reward.sources]]
type = "function"
name = "last_letters"
path = "{folder}/rewards.py:late"
policies = ["late"]

[batch]
prompts_per_step = 8
samples_per_prompt = 8
steps = 40

[rollout]
engine = "vllm"
max_tokens = 12

[staleness]
bound = 0

[algorithm]
advantage = "grpo"
aggregate = "seq-mean-token-mean"

[algorithm.kl]
coef = 0.0

[learner]
lr = 2e-2

[checkpoint]
every = 20

[cluster]
object_store_mb = 80

[logging]
ray_metrics = false
"""


def make(folder: Path) -> None:
    from learner.models.tiny import fresh_model, train_tokenizer

    texts = ["the quick brown fox jumps over the lazy dog"] * 3
    tokenizer = train_tokenizer(texts, 300, folder / "model")
    fresh_model(
        tokenizer, folder / "model", hidden=64, layers=2, heads=2, intermediate=128,
        initializer_range=0.1,
    )  # fmt: skip
    for name, word in (("early", "first"), ("late", "last")):
        rows = [{"prompt": [{"role": "user", "content": f"{word} letters {n}"}]} for n in range(16)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "rewards.py").write_text(REWARDS, encoding="utf-8")
    (folder / "c.toml").write_text(CONFIG.format(folder=folder), encoding="utf-8")


def logprobs(model: str, adapter: str, ids_file: Path, out: Path) -> None:
    """By vLLM's own door to adapters: a folder on the disk, and nothing of Accord's engine."""
    from actors.environment import prepare_environment

    prepare_environment()
    import vllm
    from vllm.lora.request import LoRARequest

    engine: Any = vllm.LLM(
        model, dtype="float32", enforce_eager=True, enable_lora=True, max_lora_rank=8,
        max_model_len=128, kv_cache_memory_bytes=8 << 20, skip_tokenizer_init=True,
        block_size=32, logprobs_mode="raw_logprobs",
    )  # fmt: skip
    params = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    rows = json.loads(ids_file.read_text())
    found = []
    for ids in rows:
        answer = engine.generate(
            {"prompt_token_ids": ids},
            params,
            lora_request=LoRARequest("one", 1, adapter),
            use_tqdm=False,
        )[0]
        found.append(
            [answer.prompt_logprobs[at][token].logprob for at, token in enumerate(ids) if at]
        )
    out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        logprobs(sys.argv[2], sys.argv[3], Path(sys.argv[4]), Path(sys.argv[5]))
