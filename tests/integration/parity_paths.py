"""What parity_checks.py compares: an engine that is asked exactly, and the learner's forwards.

Imported by that script only, which runs in a process of its own (vLLM changes torch for the whole
process).
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.environment import make_engine, prepare_environment

prepare_environment()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from vllm import SamplingParams  # noqa: E402

from actors.engines.vllm_engine import _Request  # noqa: E402
from actors.settings import EngineSettings  # noqa: E402
from cluster.contracts.records import Completion, Prompt, Rollout, RolloutGroup, Score  # noqa: E402
from cluster.contracts.rollout_table import to_table  # noqa: E402
from learner.algorithms.logprobs import (  # noqa: E402
    chunked_linear_logprobs,
    logprobs_from_logits,
)
from learner.models.heads import lm_head  # noqa: E402
from learner.models.packed_attention import use_packed_attention  # noqa: E402
from learner.rl.forward import policy_outputs  # noqa: E402
from learner.rl.microbatch import make_microbatch, make_pack  # noqa: E402
from learner.rl.rollouts import RolloutBatch, read_batch  # noqa: E402

BLOCK = 32  # tokens in one block of the engine's cache
VOCAB = 320
LONGEST = 3 * BLOCK  # tokens of an answer
MOST = 32  # requests at once
DEADLINE_S = 60.0

Paths = dict[str, np.ndarray]


@dataclass(frozen=True)
class Row:
    """One request: what it is asked, its own seed, and the token that ends it (or none)."""

    prompt: tuple[int, ...]
    seed: int
    stop: int | None = None


# -- the model and the engine ----------------------------------------------------------------------


def make_model(folder: Path) -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    disturb(model, 0.05, 0)  # norms and biases begin as ones and zeros, which would hide errors
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def disturb(model: Any, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def start_engine(folder: Path, dtype: str) -> Any:
    settings = EngineSettings(
        model_path=str(folder),
        dtype=dtype,
        max_tokens=LONGEST,
        stop_token_ids=(),
        max_model_len=2 * LONGEST,
        max_running=MOST,
        block_size=BLOCK,
        kv_cache_mb=32,
    )
    engine: Any = make_engine("vllm", settings)
    engine._llm.model_config.max_logprobs = VOCAB  # the default, 20, is no whole vocabulary
    engine.cached_tokens = 0
    return engine


def outputs(engine: Any, asked: dict[str, tuple[tuple[int, ...], SamplingParams]]) -> list[Any]:
    """vLLM's own outputs, in the order asked."""
    for name, (ids, params) in asked.items():
        prompt = {"prompt_token_ids": list(ids), "cache_salt": str(engine.version)}
        engine._llm.add_request(name, prompt, params)
    done: dict[str, Any] = {}
    deadline = time.monotonic() + DEADLINE_S
    while len(done) < len(asked):
        done |= {o.request_id: o for o in engine._llm.step() if o.finished}
        assert time.monotonic() < deadline, f"{len(asked) - len(done)} requests do not finish"
    return [done[name] for name in asked]


def decode(engine: Any, rows: list[Row], length: int, temperature: float) -> list[Completion]:
    """Sampled with the engine's own parameters, but for length, temperature, stop and seed."""
    asked = {}
    for place, row in enumerate(rows):
        params = engine._sampling(f"decode-{place}", _Request(row.prompt, row.seed, temperature))
        params.max_tokens = length
        if row.stop is not None:
            params.stop_token_ids = [row.stop]
            params._all_stop_token_ids = {row.stop}
        asked[f"decode-{place}"] = (row.prompt, params)
    found = outputs(engine, asked)
    engine.cached_tokens += sum(o.num_cached_tokens or 0 for o in found)
    return [engine._completion(o.request_id, o) for o in found]


def prefill(engine: Any, rows: list[Row], done: list[Completion], temperature: float) -> np.ndarray:
    """[N] log-probabilities of the answers out of one prompt pass per row."""
    every = 0 if temperature == 1.0 else VOCAB
    params = SamplingParams(
        temperature=1.0, max_tokens=1, prompt_logprobs=every, flat_logprobs=True, detokenize=False
    )
    asked = {
        f"prefill-{place}": ((*row.prompt, *completion.token_ids), params)
        for place, (row, completion) in enumerate(zip(rows, done, strict=True))
    }
    parts = []
    for row, completion, output in zip(rows, done, outputs(engine, asked), strict=True):
        assert output.num_cached_tokens == 0  # really computed again, all of it
        parts.append(_answer_logp(output.prompt_logprobs, len(row.prompt), completion, temperature))
    return np.concatenate(parts)


def _answer_logp(flat: Any, start: int, completion: Completion, temperature: float) -> np.ndarray:
    """The first number of a position is the token's own, the rest, if any, all by rank."""
    count = len(completion.token_ids)
    first = flat.start_indices[start]
    values = np.array(flat.logprobs[first:], dtype=np.float32).reshape(count, -1)
    ids = np.array(flat.token_ids[first:]).reshape(count, -1)
    assert (ids[:, 0] == np.asarray(completion.token_ids)).all()
    if temperature == 1.0:
        return values[:, 0]
    logits = torch.zeros(count, VOCAB)
    logits.scatter_(1, torch.from_numpy(ids[:, 1:]), torch.from_numpy(values[:, 1:]))
    logp = torch.log_softmax(logits / temperature, dim=-1)  # not the learner's own function
    return logp.gather(1, torch.from_numpy(ids[:, :1]))[:, 0].numpy()


# -- the learner -----------------------------------------------------------------------------------


def as_batch(rows: list[Row], done: list[Completion]) -> RolloutBatch:
    """The way every rollout goes: records, Arrow table, arrays of the learner."""
    groups = []
    for place, (row, completion) in enumerate(zip(rows, done, strict=True)):
        prompt = Prompt(id=str(place), messages=(), token_ids=row.prompt)
        rollout = Rollout(prompt=prompt, completion=completion, sample_index=0, text="")
        score = Score(value=0.0, scorer_version="none")
        groups.append(RolloutGroup(group_id=place, samples=((rollout, score),)))
    return read_batch([to_table(groups)], list(range(len(rows))), 1)


def packing(model: Any) -> Any:
    """A copy that takes packed rows: the learner chooses once, here both are wanted."""
    other = copy.deepcopy(model)
    use_packed_attention(other)
    return other


@torch.no_grad()
def learner_paths(
    model: Any, packing_model: Any, batch: RolloutBatch, dtype: str, temperature: float
) -> Paths:
    """All [N], the answers' tokens row after row."""
    rows = range(len(batch))
    micro, pack = make_microbatch(batch, rows, "cpu"), make_pack(batch, rows, "cpu")
    padded = policy_outputs(model, micro, temperature, dtype)
    packed = policy_outputs(packing_model, pack, temperature, dtype)
    chosen = padded.hidden.reshape(-1, padded.hidden.shape[-1]).index_select(0, micro.sources)
    head = lm_head(model)
    chunked, _ = chunked_linear_logprobs(
        chosen, head.weight, micro.labels, temperature, chunk=7, reduced=dtype == "bfloat16"
    )
    return {
        "padded": padded.logp.reshape(-1)[micro.targets].numpy(),
        "packed": packed.logp.reshape(-1)[pack.targets].numpy(),
        "whole head": logprobs_from_logits(head.logits(chosen), micro.labels, temperature).numpy(),
        "chunked head": chunked.numpy(),
    }
