"""Swaps that do not do their work, on real vLLM: a part of what vllm_torture.py measures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_checks import (  # first of all: it prepares the environment for vLLM
    CANARY,
    arrays,
    canary,
    load,
    make_model,
    settings,
)

import torch  # isort: skip

from actors.engines.proof import number_sum
from actors.environment import make_engine
from cluster.contracts.errors import AccordError


@torch.no_grad()
def optimiser_step(model: Any, lr: float, seed: int) -> None:
    """What AdamW does at its first step: each number moves by lr, up or down."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator).sign() * lr)


def published(model: Any, dtype: str) -> dict[str, Any]:
    """As the learner publishes in `dtype`: float32 masters, rounded once."""
    if dtype == "float32":
        return arrays(model)
    rounded = {name: p.detach().to(torch.bfloat16) for name, p in model.named_parameters()}
    return {name: tensor.view(torch.uint16).numpy() for name, tensor in rounded.items()}


def shadow_of(engine: Any) -> Any:
    return engine._llm.engine_core.engine_core.model_executor.driver_worker.worker._accord_shadow


def undone_swaps(engine: Any, model: Any, dtype: str) -> dict[str, Any]:
    """Swaps that do not do their work, at lr 1e-7: what the proof says of each, and of a good one
    after it. "moved": the largest difference of the canary that such a swap leaves."""
    version = 7000
    load(engine, published(model, dtype), version)
    shadow = shadow_of(engine)
    swap = shadow.swap

    def whole_swap_twice() -> None:
        for _ in range(2):
            shadow._ready = True
            swap()

    def exchanging(tensors: slice, kernels: slice) -> Callable[[], None]:
        def part() -> None:
            exchange, packed = shadow._exchange, shadow._packed_layers
            shadow._exchange, shadow._packed_layers = exchange[tensors], packed[kernels]
            swap()
            shadow._exchange, shadow._packed_layers = exchange, packed

        return part

    every, none = slice(None), slice(0)
    faults: dict[str, Callable[[], None]] = {
        "nothing": lambda: None,
        "there and back": whole_swap_twice,
        "no kernels": exchanging(every, none),
        "kernels only": exchanging(none, every),
        "one kernel not": exchanging(every, slice(1, None)),
        "first half": exchanging(slice(len(shadow._exchange) // 2), slice(2)),
    }
    out: dict[str, Any] = {"good": [said(engine.prove)], "moved": 0.0}
    for name, fault in faults.items():
        before = torch.tensor(engine.sequence_logprobs(CANARY))
        optimiser_step(model, 1e-7, version)
        version += 1
        engine.stage(published(model, dtype).items(), version)
        shadow.swap = fault
        engine.swap(version)
        del shadow.swap
        after = torch.tensor(engine.sequence_logprobs(CANARY))
        out[name] = said(engine.prove)
        out["moved"] = max(out["moved"], float((after - before).abs().max()))
        out.setdefault("old check", []).append(canary(engine, model))
        version += 1
        load(engine, published(model, dtype), version)
        out["good"].append(said(engine.prove))
    return out


@torch.no_grad()
def read_out(engine: Any, model: Any) -> list[int]:
    """Sums over the numbers the engine computes with, packed kernels read by multiplying the unit
    matrix, and over the numbers published (a tied head is published once and packed as often as it
    is held). No mark of ours is looked at."""
    version = engine.version + 1
    load(engine, arrays(model), version)
    live = engine._llm.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    parts = [p for p in live.get_model().parameters() if p.numel()]
    heads = 0
    for name, module in live.get_model().named_modules():
        if "cpu_linear" in vars(module):
            width = 96 if name.endswith("down_proj") else 128
            heads += name.endswith(("embed_tokens", "lm_head"))
            parts.append(module.cpu_linear(torch.eye(width), module.weight, None))
    wanted = [torch.from_numpy(array) for array in arrays(model).values()]
    tied = model.get_input_embeddings().weight
    return [number_sum(parts), number_sum([*wanted, *[tied] * heads])]


def said(work: Callable[[], Any]) -> str:
    try:
        work()
    except AccordError as problem:
        return f"{type(problem).__name__}: {problem}"
    return "accepted"


def check_undone_bfloat16(folder: Path) -> dict[str, Any]:
    model = make_model("qwen2-tied", folder / "undone")
    engine = make_engine("vllm", settings(folder / "undone" / "qwen2-tied", dtype="bfloat16"))
    out = undone_swaps(engine, model, "bfloat16")
    engine.close()
    return out


def undone_copies(engine: Any, model: Any) -> list[str]:
    """A copy over fixed addresses that copies nothing, and a good one after it."""
    shadow, found = shadow_of(engine), []
    for version, swap in ((8000, None), (8001, lambda: None), (8002, None)):
        optimiser_step(model, 1e-7, version)
        engine.stage(arrays(model).items(), version)
        if swap is not None:
            shadow.swap = swap
        engine.swap(version)
        vars(shadow).pop("swap", None)
        found.append(said(engine.prove))
    return found
