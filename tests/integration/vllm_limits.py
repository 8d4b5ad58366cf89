"""What test_sampling_limits.py asserts about: limits on sampling in real vLLM, and the learner.

A process of its own, like vllm_checks.py. Usage: python vllm_limits.py FOLDER; writes
FOLDER/results.json.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_checks import (  # first of all: it prepares the environment for vLLM
    STOP,
    VOCAB,
    arrays,
    canary,
    disturb,
    finish,
    load,
    make_model,
    prompts,
    run,
    runner_of,
    settings,
    single_steps,
)

import torch  # isort: skip
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from actors.decoding import make_decoder
from actors.engines.token_limits import TokenLimits
from actors.environment import make_engine
from cluster.contracts.errors import UserError
from cluster.contracts.records import Completion, Prompt, Rollout, RolloutGroup, Score
from cluster.contracts.rollout_table import to_table
from learner.models.packed_attention import use_packed_attention
from learner.rl.forward import policy_outputs
from learner.rl.microbatch import make_microbatch, make_pack
from learner.rl.rollouts import read_batch

TEMPERATURE = 0.7
STOPS = (STOP, 2, 3)
LIMITS: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": 20},
    "top_p": {"top_k": VOCAB, "top_p": 0.8},
    "min_p": {"top_k": VOCAB, "min_p": 0.05},
    "min_tokens": {"min_tokens": 6, "stop_token_ids": tuple(range(1, 60))},
    "banned_tokens": {"banned_tokens": tuple(range(4, 40))},
    "allowed_tokens": {"allowed_tokens": (1, *range(30, 60))},
    "all": {
        "top_k": 30,
        "top_p": 0.9,
        "min_p": 0.02,
        "min_tokens": 6,
        "banned_tokens": tuple(range(4, 40)),
        "stop_token_ids": tuple(range(1, 60)),
    },
}


def processor_of(engine: Any) -> Any:
    (found,) = [
        one
        for one in runner_of(engine).input_batch.logitsprocs.all
        if type(one).__name__ == "LimitsProcessor"
    ]
    return found


def limit(engine: Any, path: Path, keys: dict[str, Any]) -> None:
    """Another set of limits for the same engine, which takes seconds to start."""
    chosen = settings(path, **{"temperature": TEMPERATURE, "stop_token_ids": STOPS, **keys})
    limits = TokenLimits(chosen, VOCAB)
    engine._settings, engine._limits, processor_of(engine)._limits = chosen, limits, limits
    runner_of(engine)._token_limits = limits


def matched(model: Any, asked: dict[str, list[int]], done: dict[str, Completion]) -> dict[str, Any]:
    """Largest distance between engine and learner over the tokens, padded and packed; "ignored":
    what it would be over the whole vocabulary."""
    groups = [
        RolloutGroup(
            group_id=number,
            samples=(
                (
                    Rollout(
                        prompt=Prompt(id=name, messages=(), token_ids=tuple(asked[name])),
                        completion=done[name],
                        sample_index=0,
                        text="",
                    ),
                    Score(value=0.0, scorer_version="0"),
                ),
            ),
        )
        for number, name in enumerate(asked)
    ]
    table = to_table(groups)
    batch = read_batch([table], range(len(groups)), 1)
    width = int(batch.response_ids.lengths.max())
    behaviour = torch.from_numpy(batch.behaviour_logp.padded(width))
    out: dict[str, Any] = {"tokens": int(batch.response_ids.lengths.sum())}
    out["bytes"] = sum(table.column(f"set_{n}").nbytes for n in ("end", "count", "ids"))
    packs = copy.deepcopy(model)
    use_packed_attention(packs)
    for name, make, policy in (("padded", make_microbatch, model), ("packed", make_pack, packs)):
        micro = make(batch, range(len(batch)), "cpu")
        real = micro.spread(torch.ones(len(micro.labels)))

        def off(micro: Any, policy: Any = policy, real: Any = real) -> float:
            with torch.no_grad():
                logp = policy_outputs(policy, micro, TEMPERATURE, "float32", entropy=True).logp
            return float(((logp - behaviour) * real).abs().max())

        out[name] = off(micro)
        out["ignored"] = off(replace(micro, sets=None))
    return out


def check_swap(engine: Any, path: Path, model: Any, mode: str) -> dict[str, float]:
    """Limits across a swap in flight: each version's tokens against its own weights, with the sets
    recorded; and all of them finite under the new weights, as a learner ahead of them sees it."""
    limit(engine, path, {**LIMITS["all"], "kv_on_swap": mode})
    old, new = model, copy.deepcopy(model)
    disturb(new, 0.05, 71)
    asked, version = prompts(12, shared=64), engine.version
    for name, ids in asked.items():
        engine.submit(name, ids, None)
    done: dict[str, Completion] = {}
    with single_steps(engine):
        for _ in range(7):
            done.update(engine.step())
    load(engine, arrays(new), version + 1)
    done.update(finish(engine))
    straddling = {n: c for n, c in done.items() if len(c.versions) == 2}
    whole = {n: c for n, c in done.items() if len(c.versions) == 1}
    by_version = {
        of: {n: asked[n] for n, c in whole.items() if c.versions[0].version == version + of}
        for of in (0, 1)
    }
    out = {"straddling": float(len(straddling))}
    for of, model_of in ((0, old), (1, new)):
        out[f"version {of}"] = matched(model_of, by_version[of], done)["padded"]
    both = matched(new, {n: asked[n] for n in straddling}, done)
    out["stale"] = both["padded"]
    out["kept left over"] = float(len(processor_of(engine).kept) + len(engine._drawn))
    load(engine, arrays(old), version + 2)
    out["canary"] = canary(engine, old)
    return out


def with_tokenizer(path: Path) -> None:
    words = {"<pad>": 2, "<eos>": STOP, **{f"w{i}": i for i in range(VOCAB) if i not in (1, 2)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(path)


def check_stop_strings(folder: Path) -> dict[str, Any]:
    model = make_model("llama-tied", folder / "stop")
    path = folder / "stop" / "llama-tied"
    with_tokenizer(path)
    chosen = settings(path, stop=("w5", "w7 w"), min_tokens=4, temperature=TEMPERATURE)
    engine: Any = make_engine("vllm", chosen)
    load(engine, arrays(model), 0)
    asked = prompts(24)
    done = run(engine, asked)
    decode = make_decoder(chosen)
    out: dict[str, Any] = {**matched(model, asked, done), "answers": []}
    for completion in done.values():
        (text,) = decode([list(completion.token_ids)])
        out["answers"].append([list(completion.token_ids), completion.finish_reason, text])
    engine.close()
    return out


def refusal(path: Path, **keys: Any) -> str:
    try:
        make_engine("vllm", settings(path, **keys)).close()
    except UserError as problem:
        return str(problem)
    return "accepted"


def main() -> None:
    folder = Path(sys.argv[1])
    began = time.perf_counter()
    model = make_model("llama-tied", folder / "limits")
    path = folder / "limits" / "llama-tied"
    engine: Any = make_engine("vllm", settings(path, top_k=20, temperature=TEMPERATURE))
    load(engine, arrays(model), 0)
    results: dict[str, Any] = {}
    for name, keys in LIMITS.items():
        limit(engine, path, keys)
        asked = prompts(12)
        done = run(engine, asked)
        results[name] = matched(model, asked, done)
        results[name]["sampled"] = [[list(c.token_ids), c.finish_reason] for c in done.values()]
    for mode in ("recompute",):
        results[f"swap, {mode}"] = check_swap(engine, path, model, mode)
    engine.close()
    results["stop"] = check_stop_strings(folder)
    results["refused"] = refusal(path, banned_tokens=(VOCAB,))
    results["seconds"] = time.perf_counter() - began
    (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
