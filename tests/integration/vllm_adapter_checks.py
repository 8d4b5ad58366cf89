"""What test_adapters_vllm.py asserts about, measured in a process of its own.

Usage: python vllm_adapter_checks.py FOLDER; writes FOLDER/results.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import vllm_checks as checks

import peft  # isort: skip
import torch

from actors.environment import make_engine
from actors.settings import AdapterSettings
from cluster.contracts.errors import AccordError

RANK, ALPHA = 4, 12


class Reference:
    """The base and its adapters in transformers and peft."""

    def __init__(self, folder: Path, arch: str) -> None:
        self.path = folder / arch
        base = checks.make_model(arch, folder)
        self.config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        self.model = peft.get_peft_model(base, self.config, "one", autocast_adapter_dtype=False)
        self.model.add_adapter("two", self.config)
        self.model.add_adapter("fixed", self.config)
        self.model.eval()

    @torch.no_grad()
    def change(self, name: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in self.model.named_parameters():
            if f".lora_A.{name}." in key or f".lora_B.{name}." in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        found = peft.get_peft_model_state_dict(self.model, adapter_name=name)
        return {key: tensor.detach().clone() for key, tensor in found.items()}

    def update(self) -> dict[str, Any]:
        return {
            f"{name}/{key}": tensor.numpy()
            for name in ("one", "two")
            for key, tensor in self.tensors(name).items()
        }

    def logprobs(self, name: str, ids: list[int]) -> torch.Tensor:
        if not name:
            with self.model.disable_adapter():
                return checks.reference(self.model, ids)
        self.model.set_adapter(name)
        return checks.reference(self.model, ids)

    def off(self, name: str, ids: list[int], done: Any) -> torch.Tensor:
        exact = self.logprobs(name, ids + list(done.token_ids))[len(ids) - 1 :]
        return (exact - torch.tensor(done.logprobs)).abs()


def submit(engine: Any, asked: dict[str, list[int]], names: tuple[str, ...]) -> dict[str, str]:
    whose = {request: names[i % len(names)] for i, request in enumerate(asked)}
    for request, ids in asked.items():
        engine.submit(request, ids, None, adapter=whose[request])
    return whose


def parity(engine: Any, held: Reference, names: tuple[str, ...]) -> dict[str, float]:
    asked = checks.prompts(6)
    whose = submit(engine, asked, names)
    worst: dict[str, float] = {}
    for request, done in checks.finish(engine).items():
        name = whose[request] or "base"
        off = float(held.off(whose[request], asked[request], done).max())
        worst[name] = max(off, worst.get(name, 0.0))
    return worst


def in_flight(engine: Any, held: Reference, version: int) -> dict[str, Any]:
    """An update of both adapters after eight steps, while both and the base are being served."""
    asked = checks.prompts(9, shared=64)
    whose = submit(engine, asked, ("one", "two", ""))
    done: dict[str, Any] = {}
    for _ in range(8):
        done.update(engine.step())
    old = {request: 0 for request in asked}
    before = {name: held.tensors(name) for name in ("one", "two")}
    held.change("one", 100 + version)
    held.change("two", 200 + version)
    checks.load(engine, held.update(), version)
    engine.prove()
    done.update(checks.finish(engine))
    after = {name: held.tensors(name) for name in ("one", "two")}
    offs = {}
    for side, state in (("old", before), ("new", after)):
        for name, tensors in state.items():
            peft.set_peft_model_state_dict(held.model, tensors, adapter_name=name)
        offs[side] = {r: held.off(whose[r], asked[r], done[r]) for r in old}
    out: dict[str, Any] = {"old": 0.0, "new": 0.0, "begun_after": 0.0, "base": 0.0}
    out["straddling"] = sum(len(c.versions) == 2 for c in done.values())
    for request, completion in done.items():
        if not whose[request]:
            out["base"] = max(out["base"], float(offs["new"][request].max()))
            continue
        for span in completion.versions:
            side = "old" if span.version < version else "new"
            key = "begun_after" if side == "new" and span.start == 0 else side
            worst = float(offs[side][request][span.start : span.end].max())
            out[key] = max(out[key], worst)
    return out


def stale_prefix(engine: Any, held: Reference, version: int) -> dict[str, Any]:
    """The same prompt before and after an update of its adapter: nothing old may be found."""
    ids = [4 + j * 3 % 90 for j in range(100)]

    def ask(tag: str) -> tuple[int, float]:
        before = engine.counters()["prefix_cached_tokens"]
        engine.submit(tag, ids, None, adapter="one")
        done = checks.finish(engine)[tag]
        cached = engine.counters()["prefix_cached_tokens"] - before
        return cached, float(held.off("one", ids, done).max())

    ask("first")
    again = ask("again")
    held.change("one", 300 + version)
    checks.load(engine, held.update(), version)
    after = ask("after")
    return {"again": again, "after": after}


def refusals(engine: Any, held: Reference, version: int) -> list[str]:
    whole = held.update()
    first = next(iter(whole))
    cases = [
        {k: v for k, v in whole.items() if not k.startswith("two/")},
        {**whole, first: whole[first][:, :-1]},
        {**whole, "one/base_model.model.model.norm.lora_A.weight": whole[first]},
        {k: v for k, v in whole.items() if k != first},
    ]
    return [checks.refused(engine, case, version) for case in cases]


def tampered(engine: Any) -> str:
    """One number in one slot changes: the proof has to see it."""
    worker = engine._llm.engine_core.engine_core.model_executor.driver_worker.worker
    manager = worker.model_runner.lora_manager._adapter_manager
    layer = next(m for name, m in manager.modules.items() if name.endswith("o_proj"))
    kept = layer.lora_b_stacked[0][1, 0, 0, 0].clone()
    layer.lora_b_stacked[0][1, 0, 0, 0] += 1e-3
    try:
        engine.prove()
        found = "nothing"
    except AccordError as problem:
        found = type(problem).__name__
    layer.lora_b_stacked[0][1, 0, 0, 0] = kept
    engine.prove()
    return found


def canaries(engine: Any, held: Reference) -> dict[str, float]:
    off = {}
    for name in ("one", "two", "fixed", ""):
        got = torch.tensor(engine.sequence_logprobs(checks.CANARY, adapter=name))
        off[name or "base"] = float((got - held.logprobs(name, checks.CANARY)).abs().max())
    return off


def unserved(engine: Any) -> str:
    """A request of an adapter whose weights have not come."""
    try:
        engine.submit("early", [5, 6], None, adapter="one")
        engine.step()
    except AccordError as problem:
        engine.abort(["early"])
        return type(problem).__name__
    return "served"


def check(folder: Path, arch: str, kv_on_swap: str) -> dict[str, Any]:
    held = Reference(folder, arch)
    for seed, name in enumerate(("one", "two", "fixed"), start=1):
        held.change(name, seed)
    held.model.save_pretrained(str(folder / "saved"), selected_adapters=["fixed"])
    adapters = AdapterSettings(
        trained=("one", "two"),
        rank=RANK,
        alpha=ALPHA,
        fixed=(("fixed", str(folder / "saved" / "fixed"), RANK),),
    )
    settings = checks.settings(held.path, kv_on_swap=kv_on_swap, adapters=adapters)
    engine: Any = make_engine("vllm", settings)
    out: dict[str, Any] = {"before_weights": unserved(engine)}
    checks.load(engine, held.update(), 0)
    engine.prove()
    out["one"] = parity(engine, held, ("one",))
    out["mixed"] = parity(engine, held, ("one", "two"))
    out["all"] = parity(engine, held, ("one", "two", "", "fixed"))
    out["base"] = parity(engine, held, ("",))
    out["canary"] = canaries(engine, held)
    out["in_flight"] = in_flight(engine, held, 1)
    out["stale_prefix"] = stale_prefix(engine, held, 2)
    out["refused"] = refusals(engine, held, 3)
    out["tampered"] = tampered(engine)
    out["after_refusals"] = parity(engine, held, ("one", "two", "", "fixed"))
    engine.close()
    return out


def main(kv_on_swap: str = "recompute", arch: str = "qwen2-tied") -> None:
    folder = Path(sys.argv[1])
    results = check(folder, arch, kv_on_swap)
    (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
