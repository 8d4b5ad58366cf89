"""What test_engine_vllm.py asserts about, measured in a process of its own.

vLLM changes torch for the whole process (threads, random state), so it never runs in pytest's.
Usage: python vllm_checks.py FOLDER; writes FOLDER/results.json.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from actors.environment import make_engine, prepare_environment

prepare_environment()

import torch  # noqa: E402
import transformers  # noqa: E402

from actors.settings import EngineSettings  # noqa: E402
from cluster.contracts.errors import AccordError, UserError  # noqa: E402
from cluster.contracts.records import Completion  # noqa: E402

VOCAB, STOP, MAX_TOKENS, RUNNING = 160, 1, 24, 8
CANARY = [4 + j * 5 % 90 for j in range(40)]
# name -> (configuration class, tied embeddings, extra keys)
MODELS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "llama-tied": ("LlamaConfig", True, {}),
    "llama-untied": ("LlamaConfig", False, {}),
    "qwen2-tied": ("Qwen2Config", True, {"hidden_size": 128}),
    "qwen3-untied": ("Qwen3Config", False, {"head_dim": 32}),
    "gemma-tied": ("GemmaConfig", True, {"head_dim": 32}),
    "gemma2-tied": ("Gemma2Config", True, {"head_dim": 32, "query_pre_attn_scalar": 32}),
    "mistral-tied": ("MistralConfig", True, {"head_dim": 32, "sliding_window": None}),
    "mistral-untied": ("MistralConfig", False, {"head_dim": 32, "sliding_window": None}),
}


# These are built without weights, as a rollout worker is, and take their first as an update.
NO_WEIGHTS_ON_DISK = ("llama-untied", "qwen2-tied", "gemma2-tied", "mistral-untied")


def make_model(name: str, folder: Path) -> Any:
    kind, tied, extra = MODELS[name]
    keys = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": STOP,
        "pad_token_id": 2,
    }
    if kind == "LlamaConfig":
        extra = {"head_dim": 32}
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**(keys | extra))
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    disturb(model, 0.1, 1)  # norms and biases begin as ones and zeros, which would hide errors
    model.save_pretrained(folder / name)
    return model


@torch.no_grad()
def disturb(model: Any, scale: float, seed: int, only: str = "") -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if only in ("", name):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def arrays(model: Any) -> dict[str, Any]:
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


@torch.no_grad()
def reference(model: Any, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of ids[1:]."""
    logits = model(torch.tensor([ids])).logits[0, :-1] / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def settings(path: Path, **keys: Any) -> EngineSettings:
    return EngineSettings(
        **{
            "model_path": str(path),
            "max_tokens": MAX_TOKENS,
            "stop_token_ids": (STOP,),
            "max_model_len": 160,
            "max_running": RUNNING,
            "kv_cache_mb": 8,
            "seed": 3,
            **keys,
        }
    )


def runner_of(engine: Any) -> Any:
    return engine._llm.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


@contextmanager
def single_steps(engine: Any) -> Iterator[None]:
    """One token of each request per step of the engine, so that a swap falls between any two."""
    runner = runner_of(engine)
    most = getattr(runner, "_most", 1)
    runner._most = 1
    try:
        yield
    finally:
        runner._most = most


def prompts(count: int, shared: int = 0) -> dict[str, list[int]]:
    head = [5 + j * 3 % 80 for j in range(shared)]
    return {
        f"r{i}": [*head, *(4 + (i * 7 + j * 3) % 90 for j in range(12 + i))] for i in range(count)
    }


def run(engine: Any, asked: dict[str, list[int]]) -> dict[str, Completion]:
    for name, ids in asked.items():
        engine.submit(name, ids, None)
    return finish(engine)


def finish(engine: Any) -> dict[str, Completion]:
    done: dict[str, Completion] = {}
    deadline = time.monotonic() + 60
    while engine.unfinished:
        done.update(engine.step())
        assert time.monotonic() < deadline, "the engine does not finish"
    return done


def differences(model: Any, ids: list[int], done: Completion, temperature: float) -> torch.Tensor:
    exact = reference(model, ids + list(done.token_ids), temperature)[len(ids) - 1 :]
    return (exact - torch.tensor(done.logprobs)).abs()


def worst(
    model: Any, asked: dict[str, list[int]], done: dict[str, Completion], temperature: float = 1.0
) -> float:
    return max(float(differences(model, asked[i], done[i], temperature).max()) for i in asked)


def canary(engine: Any, model: Any) -> float:
    got = torch.tensor(engine.sequence_logprobs(CANARY))
    return float((got - reference(model, CANARY)).abs().max())


def load(engine: Any, update: dict[str, Any], version: int) -> None:
    engine.stage(update.items(), version)
    engine.swap(version)


def refused(engine: Any, update: dict[str, Any], version: int) -> str:
    try:
        load(engine, update, version)
    except AccordError as problem:
        return type(problem).__name__
    return "accepted"


def ends_right(done: dict[str, Completion]) -> bool:
    return all(
        (c.token_ids[-1] == STOP) == (c.finish_reason == "stop")
        and STOP not in c.token_ids[:-1]
        and (c.finish_reason == "stop" or len(c.token_ids) == MAX_TOKENS)
        for c in done.values()
    )


def check_architecture(name: str, folder: Path) -> dict[str, Any]:
    """Parity before and after two updates, and after refused ones."""
    model = make_model(name, folder)
    start: dict[str, Any] = {}
    if name in NO_WEIGHTS_ON_DISK:
        (folder / name / "model.safetensors").unlink()
        start = {"weights": "published"}
    began = time.perf_counter()
    engine: Any = make_engine("vllm", settings(folder / name, **start))
    started = time.perf_counter() - began
    asked = prompts(12)
    out: dict[str, Any] = {"start_s": started, "name": engine.name, "parity": [], "canary": []}
    for version in (-1, 0, 1):
        if version >= 0:
            disturb(model, 0.05, 10 + version)
        if version >= 0 or start:
            load(engine, arrays(model), version)
        done = run(engine, asked)
        out["parity"].append(worst(model, asked, done))
        out["canary"].append(canary(engine, model))
        out["versions"] = sorted({s.version for c in done.values() for s in c.versions})
        out["ends_right"] = ends_right(done)
    whole = arrays(model)
    first = next(iter(whole))
    partial = {k: v for k, v in whole.items() if k != first}
    worker = engine._llm.engine_core.engine_core.model_executor.driver_worker.worker
    out["keeps_numbers"] = worker._accord_shadow._loader.keeps_numbers
    engine.prove()
    out["refused"] = [
        refused(engine, partial, 2),
        refused(engine, {**whole, "extra.weight": whole[first]}, 2),
        refused(engine, {**whole, first: whole[first][:-1]}, 2),
    ]
    out["canary"].append(canary(engine, model))
    out["version_after_refusal"] = engine.version
    engine.close()
    return out


def swap_in_flight(engine: Any, old: Any, new: Any, version: int, temperature: float) -> Any:
    """Swap after ten steps with more requests than fit; where each version's tokens agree."""
    asked = prompts(RUNNING + 4, shared=64)
    for name, ids in asked.items():
        engine.submit(name, ids, None)
    done: dict[str, Completion] = {}
    with single_steps(engine):
        for _ in range(10):
            done.update(engine.step())
    running = set(engine._running)
    load(engine, arrays(new), version)
    done.update(finish(engine))
    out: dict[str, Any] = {"old": 0.0, "new": 0.0, "new_begun_before": 0.0, "spans_exact": True}
    for name, completion in done.items():
        spans = [(s.version, s.start, s.end) for s in completion.versions]
        both = {
            version - 1: differences(old, asked[name], completion, temperature),
            version: differences(new, asked[name], completion, temperature),
        }
        for number, start, end in spans:
            key = "old" if number < version else "new"
            if number == version and start > 0:
                key = "new_begun_before"
            out[key] = max(out[key], float(both[number][start:end].max()))
        if name in running and list(asked).index(name) < RUNNING:
            length = len(completion.token_ids)
            want = [(version - 1, 0, 10), (version, 10, length)]
            out["spans_exact"] &= spans == want
    out["straddling"] = sum(len(c.versions) == 2 for c in done.values())
    return out


def check_recompute(folder: Path) -> dict[str, Any]:
    """kv_on_swap = recompute at T = 0.7, and everything that needs one engine only."""
    old = make_model("llama-tied", folder / "recompute")
    path = folder / "recompute" / "llama-tied"
    engine: Any = make_engine("vllm", settings(path, temperature=0.7))
    load(engine, arrays(old), 0)
    out: dict[str, Any] = {}
    asked = prompts(6, shared=64)
    out["temperature"] = worst(old, asked, run(engine, asked), 0.7)
    before = engine.counters()["prefix_cached_tokens"]
    run(engine, asked)
    out["cached_within_version"] = engine.counters()["prefix_cached_tokens"] - before
    new = copy.deepcopy(old)
    disturb(new, 0.05, 20)
    out["swap"] = swap_in_flight(engine, old, new, 1, 0.7)
    engine._native_versions = False  # as with a vLLM that does not track versions
    newer = copy.deepcopy(new)
    disturb(newer, 0.05, 21)
    out["swap_own_versions"] = swap_in_flight(engine, new, newer, 2, 0.7)
    engine._native_versions = True
    engine._label()
    out["each_parameter"] = each_parameter(engine, newer, 10)
    engine.submit("gone", asked["r0"], None)
    engine.step()
    engine.abort(["gone"])
    out["unfinished_after_abort"] = engine.unfinished
    out["seeded_alike"] = seeded(engine, 5) == seeded(engine, 5) != seeded(engine, 6)
    out["drawing_changes_nothing"] = one_by_one(engine) == one_by_one(engine, drawn=True)
    out["bad_prompts"] = [bad_prompt(engine, ids) for ids in ([], [VOCAB], [5] * 150)]
    engine.close()
    return out


def each_parameter(engine: Any, model: Any, first: int) -> dict[str, tuple[float, float]]:
    """Parameter -> (how much the engine's log-probabilities moved, distance to the reference)."""
    out = {}
    for number, name in enumerate(arrays(model)):
        before = torch.tensor(engine.sequence_logprobs(CANARY))
        disturb(model, 0.05, 30 + number, only=name)
        load(engine, arrays(model), first + number)
        moved = (torch.tensor(engine.sequence_logprobs(CANARY)) - before).abs().max()
        out[name] = (float(moved), canary(engine, model))
    return out


def seeded(engine: Any, seed: int) -> tuple[int, ...]:
    engine.submit("s", prompts(1)["r0"], seed)
    return tuple(finish(engine)["s"].token_ids)


def one_by_one(engine: Any, drawn: bool = False) -> list[list[int]]:
    """Tokens of completions with seeds of their own, as `rollout.request_seeds` gives them; with
    another one ``drawn`` in between. (Without seeds, vLLM on a CPU takes random numbers of all from
    one place, whoever has a seed.)"""
    asked, found = prompts(3), []
    for seed, (name, ids) in enumerate(asked.items()):
        engine.submit(name, ids, seed)
        found.append(list(finish(engine)[name].token_ids))
        if drawn:
            engine.submit("drawn", ids, 5, 0.5)
            finish(engine)
    return found


def bad_prompt(engine: Any, ids: list[int]) -> str:
    try:
        engine.submit("bad", ids, None)
    except UserError:
        return "refused"
    return "accepted"


def check_keep(folder: Path) -> dict[str, Any]:
    """kv_on_swap = keep, with too little cache for all, so that some begin only after the swap."""
    old = make_model("llama-tied", folder / "keep")
    path = folder / "keep" / "llama-tied"
    engine: Any = make_engine("vllm", settings(path, kv_on_swap="keep"))
    load(engine, arrays(old), 0)
    new = copy.deepcopy(old)
    disturb(new, 0.05, 20)
    out = {"swap": swap_in_flight(engine, old, new, 1, 1.0)}
    engine.close()
    engine = make_engine(
        "vllm", settings(path, kv_on_swap="keep", kv_cache_mb=1, max_running=40, block_size=32)
    )
    load(engine, arrays(old), 0)
    asked = prompts(40, shared=64)
    for name, ids in asked.items():
        engine.submit(name, ids, None)
    done: dict[str, Completion] = {}
    with single_steps(engine):
        for _ in range(3):
            done.update(engine.step())
    load(engine, arrays(new), 1)
    out["waiting_again"] = len(engine._waiting)
    done.update(finish(engine))
    after = {i for i, c in done.items() if c.versions[0].version == 1}
    out["begun_after"] = len(after)
    out["begun_after_worst"] = worst(new, {i: asked[i] for i in after}, done)
    out["all_done"] = len(done) == 40
    engine.close()
    return out


def check_bfloat16(folder: Path) -> dict[str, Any]:
    model = make_model("llama-tied", folder / "bf16")
    engine = make_engine("vllm", settings(folder / "bf16" / "llama-tied", dtype="bfloat16"))
    disturb(model, 0.05, 40)
    model.to(torch.bfloat16)
    update = {n: p.detach().view(torch.uint16).numpy() for n, p in model.named_parameters()}
    load(engine, update, 0)
    model.float()
    out = {"canary": canary(engine, model)}
    engine.close()
    return out


def check_int8(folder: Path) -> dict[str, Any]:
    """An engine in 8 bits: distance to the learner, and that each swap brings the new weights."""
    model = make_model("qwen2-tied", folder / "int8")
    path = folder / "int8" / "qwen2-tied"
    keys: dict[str, Any] = {"weights": "published", "dtype": "bfloat16"}
    out: dict[str, Any] = {"canary": [], "moved": []}
    try:
        make_engine("vllm", settings(path, quantization="fp8", **keys))
    except UserError as problem:
        out["fp8"] = str(problem)
    engine: Any = make_engine("vllm", settings(path, quantization="int8", **keys))
    for version in range(3):
        load(engine, arrays(model), version)
        engine.prove()
        got = torch.tensor(engine.sequence_logprobs(CANARY))
        apart = (got - reference(model, CANARY)).abs()
        out["canary"].append(float(apart.median()))
        disturb(model, 0.1, 60 + version)
        out["moved"].append(float((got - reference(model, CANARY)).abs().median()))
    # A packed weight that is left behind must be found.
    whole = engine._llm.model_executor.driver_worker.worker.model_runner.get_model()
    layer = whole.model.layers[0].mlp.down_proj
    handler = getattr(layer.scheme.kernel, "dnnl_handler", None)
    if handler is None:  # a processor with AMX: the packed weight is a tensor of the layer
        layer.weight.data = layer.weight.data.flip(0)
    else:  # it lies outside the layer's tensors
        layer.scheme.kernel.dnnl_handler = handler = copy.copy(handler)
        handler.accord_packed_from = "another update's"
    try:
        engine.prove()
    except AccordError as problem:
        out["left_behind"] = str(problem)
    if handler is not None:
        handler.handler_tensor = None  # a copy: the original frees the memory
    engine.close()
    return out


def check_gpu_arguments(folder: Path) -> dict[str, Any]:
    """What vLLM would be given on a GPU: alone on it, and beside others with limits to sampling."""
    from actors.engines import vllm_args

    cpu, runner = vllm_args.current_platform, "VLLM_USE_V2_MODEL_RUNNER"
    vllm_args.current_platform = SimpleNamespace(is_cpu=lambda: False)
    found = {}
    try:
        for name, keys in {"alone": {}, "shared": {"shares_gpu": True, "top_p": 0.9}}.items():
            arguments = vllm_args._platform_args(settings(folder, **keys))
            found[name] = arguments | {runner: os.environ.pop(runner, None)}
    finally:
        vllm_args.current_platform = cpu
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    began = time.perf_counter()
    results: dict[str, Any] = {name: check_architecture(name, folder) for name in MODELS}
    results["recompute"] = check_recompute(folder)
    results["keep"] = check_keep(folder)
    results["bfloat16"] = check_bfloat16(folder)
    results["int8"] = check_int8(folder)
    results["gpu"] = check_gpu_arguments(folder)
    results["seconds"] = time.perf_counter() - began
    (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
