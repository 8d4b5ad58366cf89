"""What test_swap_torture.py asserts about: a swap at every step, on real vLLM.

A process of its own, like vllm_checks.py. Usage: python vllm_torture.py FOLDER; writes
FOLDER/results.json.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from vllm_checks import (  # first of all: it prepares the environment for vLLM
    CANARY,
    arrays,
    canary,
    disturb,
    each_parameter,
    finish,
    load,
    make_model,
    reference,
    runner_of,
    settings,
    single_steps,
)
from vllm_undone import (
    check_undone_bfloat16,
    read_out,
    said,
    undone_copies,
    undone_swaps,
)

import numpy as np  # isort: skip
import torch
from safetensors.torch import load_file, save_file
from transformers.cache_utils import DynamicCache

from actors.environment import make_engine
from actors.rollout import RolloutWorker, WorkerSettings
from cluster.contracts.records import (
    Assignment,
    Canary,
    Completion,
    Prompt,
    Score,
    WeightManifest,
)
from cluster.contracts.rollout_table import from_table
from cluster.weights.update import Nowhere, Update

STOPS = tuple(range(1, 9))  # about one token in twenty ends an answer: lengths differ
RUNNING, REQUESTS, TEMPERATURE = 24, 44, 1.0
LONG = [5 + j * 3 % 80 for j in range(70)]  # two whole blocks of 32 and some


class Versions:
    """Version n of a model's weights, made again from its number whenever it is asked for."""

    def __init__(self, model: Any) -> None:
        self._base = copy.deepcopy(model)
        self.model = model
        self._held: int | None = None

    def at(self, version: int) -> Any:
        if version != self._held:
            self.model.load_state_dict(self._base.state_dict())
            disturb(self.model, 0.03, 1000 + version)
            self._held = version
        return self.model


def asked_prompts() -> dict[str, list[int]]:
    """Every second begins with the same 64 tokens; lengths 12 to 100."""
    return {
        f"r{i}": [*(LONG[:64] if i % 2 else ()), *(9 + (i * 7 + j * 3) % 90 for j in range(12 + i))]
        for i in range(REQUESTS)
    }


def tortured(
    engine: Any, versions: Versions, asked: dict[str, list[int]], first: int = 0
) -> dict[str, Any]:
    """Generate everything with a swap before each step; the completions and the swaps' times."""
    waiting = list(asked.items())
    done: dict[str, Completion] = {}
    swap_cpu, most, version = [], 0, first
    while waiting or engine.unfinished:
        for name, ids in waiting[:4]:  # they begin at different versions
            engine.submit(name, ids, None)
        del waiting[:4]
        engine.stage(arrays(versions.at(version)).items(), version)
        cpu = time.thread_time()
        engine.swap(version)
        swap_cpu.append(time.thread_time() - cpu)
        done.update(engine.step())
        most = max(most, len(engine._running))
        version += 1
    return {
        "done": done,
        "swaps": version - first,
        "most": most,
        "cpu": statistics.median(swap_cpu),
    }


def tokens_by_version(done: dict[str, Completion]) -> dict[int, list[tuple[str, int]]]:
    """Version -> (request, place) of the tokens it is recorded to have sampled."""
    found: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for name, completion in done.items():
        covered = [place for s in completion.versions for place in range(s.start, s.end)]
        assert covered == list(range(len(completion.token_ids))), f"{name}: {completion.versions}"
        for span in completion.versions:
            found[span.version] += [(name, place) for place in range(span.start, span.end)]
    return dict(sorted(found.items()))


def recomputed(
    versions: Versions, asked: dict[str, list[int]], done: dict[str, Completion]
) -> dict[str, float]:
    """Largest distance to a plain forward pass under the recorded version, and how many tokens
    another version (the one before) explains as well."""
    worst, ambiguous, count = 0.0, 0, 0
    for version, tokens in tokens_by_version(done).items():
        exact = {n: whole(versions.at(version), asked[n], done[n]) for n, _ in tokens}
        other = {n: whole(versions.at(version + 1), asked[n], done[n]) for n, _ in tokens}
        for name, place in tokens:
            recorded = done[name].logprobs[place]
            worst = max(worst, abs(recorded - float(exact[name][place])))
            ambiguous += abs(recorded - float(other[name][place])) < 1e-4
            count += 1
    return {"worst": worst, "ambiguous": ambiguous / count, "tokens": count}


def whole(model: Any, ids: list[int], done: Completion) -> torch.Tensor:
    return reference(model, ids + list(done.token_ids), TEMPERATURE)[len(ids) - 1 :]


@torch.no_grad()
def replayed(
    versions: Versions, asked: dict[str, list[int]], done: dict[str, Completion]
) -> dict[str, float]:
    """The same for a kept cache: each token by one incremental step under its version, over keys
    and values that the versions before it left behind."""
    caches: dict[str, DynamicCache] = {}
    worst, mixed, count = 0.0, 0, 0
    for version, tokens in tokens_by_version(done).items():
        model = versions.at(version)
        for name, place in tokens:
            answer = done[name].token_ids
            if place == 0:
                caches[name] = DynamicCache(config=model.config)
            ids = asked[name] if place == 0 else [answer[place - 1]]
            logits = model(torch.tensor([ids]), past_key_values=caches[name]).logits[0, -1]
            exact = float(torch.log_softmax(logits / TEMPERATURE, -1)[answer[place]])
            worst = max(worst, abs(done[name].logprobs[place] - exact))
            fresh = float(whole(model, asked[name], done[name])[place])
            mixed += abs(done[name].logprobs[place] - fresh) > 1e-3
            count += 1
    return {"worst": worst, "mixed": mixed / count, "tokens": count}


def check_torture(folder: Path, mode: str) -> dict[str, Any]:
    versions = Versions(make_model("qwen2-tied", folder / mode))
    path = folder / mode / "qwen2-tied"
    keys = {"max_running": RUNNING, "stop_token_ids": STOPS, "kv_cache_mb": 16}
    engine: Any = make_engine("vllm", settings(path, kv_on_swap=mode, **keys))
    asked = asked_prompts()
    with single_steps(engine):
        got = tortured(engine, versions, asked)
    done = got.pop("done")
    judge = recomputed if mode == "recompute" else replayed
    lengths = {len(c.token_ids) for c in done.values()}
    out = {**got, **judge(versions, asked, done), "lengths": len(lengths), "done": len(done)}
    out["most_versions"] = max(len(c.versions) for c in done.values())
    out["prefix"] = prefix_reuse(engine, versions)
    with single_steps(engine):
        out["beside"] = staged_beside(engine, versions, judge)
    out["turns"] = in_turns(engine, versions, judge)
    if mode == "recompute":
        model = versions.at(5000)
        load(engine, arrays(model), 5000)
        out["each_parameter"] = each_parameter(engine, model, 5001)
        out["half_staged"] = half_staged(engine, model)
        out["undone"] = undone_swaps(engine, model, "float32")
        out["read_out"] = read_out(engine, model)
    engine.close()
    return out


def in_turns(
    engine: Any, versions: Versions, judge: Callable[..., dict[str, float]]
) -> dict[str, Any]:
    """The same torture with several tokens between two swaps, as a worker decodes."""
    runner_of(engine)._most = 5
    asked = asked_prompts()
    got = tortured(engine, versions, asked, first=6000)
    done = got.pop("done")
    return {
        **got,
        **judge(versions, asked, done),
        "done": len(done),
        "longest": max(s.end - s.start for c in done.values() for s in c.versions),
        "most_versions": max(len(c.versions) for c in done.values()),
    }


def prefix_reuse(engine: Any, versions: Versions) -> list[float]:
    """Cached tokens of one prompt: first, again, and the same twice after a swap, while another
    request keeps the cache from being emptied."""
    cached = []
    for version in (3000, 3001):
        engine.submit("holds", [9] * 20, None)
        engine.step()
        load(engine, arrays(versions.at(version)), version)
        for turn in ("a", "b"):
            before = engine.counters()["prefix_cached_tokens"]
            engine.submit(f"{version}{turn}", LONG, None)
            for _ in range(200):
                if any(name == f"{version}{turn}" for name, _ in engine.step()):
                    break
            cached.append(engine.counters()["prefix_cached_tokens"] - before)
        finish(engine)
    return cached


def staged_beside(
    engine: Any, versions: Versions, judge: Callable[..., dict[str, float]]
) -> dict[str, Any]:
    """Staging on a thread of its own that never waits for the steps, as a worker does it."""
    asked = {name: ids for name, ids in list(asked_prompts().items())[:16]}
    updates = {version: arrays(versions.at(version)) for version in range(4000, 4012)}
    load(engine, updates[4000], 4000)
    for name, ids in asked.items():
        engine.submit(name, ids, None)
    done: dict[str, Completion] = {}
    beside = 0
    for version in range(4001, 4012):
        staging = threading.Thread(target=engine.stage, args=(updates[version].items(), version))
        staging.start()
        while staging.is_alive():
            beside += engine.unfinished > 0
            done.update(engine.step())
        staging.join()
        engine.swap(version)
    done.update(finish(engine))
    return {**judge(versions, asked, done), "steps": beside}


def half_staged(engine: Any, model: Any) -> dict[str, Any]:
    """A failure in the middle of loading: the old weights stay, the next update is taken whole."""
    worker = engine._llm.engine_core.engine_core.model_executor.driver_worker.worker
    twin = worker._accord_shadow._twin
    old, version = copy.deepcopy(model), engine.version
    disturb(model, 0.05, 77)
    load_weights = twin.load_weights

    def fails(weights: Any) -> None:
        load_weights(list(weights)[:9])
        raise MemoryError("no room")

    twin.load_weights = fails
    out: dict[str, Any] = {"said": said(lambda: engine.stage(arrays(model).items(), 6000))}
    out["swap"] = said(lambda: engine.swap(6000))
    out["still"] = [canary(engine, old), engine.version - version]
    twin.load_weights = lambda weights: load_weights(list(weights)[1:])
    out["dropped"] = said(lambda: engine.stage(arrays(model).items(), 6000))
    del twin.load_weights
    engine.stage(arrays(old).items(), 6001)  # staged, then overtaken
    load(engine, arrays(model), 6002)
    out["after"] = canary(engine, model)
    return out


@contextmanager
def fixed_addresses() -> Iterator[None]:
    """The way of CUDA, forced: unpacked weights, every update copied over the ones in force."""
    from vllm import _custom_ops

    from actors.engines import vllm_weights as engine_vllm_weights

    packs, fixed = _custom_ops._supports_onednn, engine_vllm_weights.addresses_are_fixed
    _custom_ops._supports_onednn, engine_vllm_weights.addresses_are_fixed = False, lambda: True
    yield
    _custom_ops._supports_onednn, engine_vllm_weights.addresses_are_fixed = packs, fixed


def check_fixed_addresses(folder: Path) -> dict[str, Any]:
    model = make_model("qwen2-tied", folder / "fixed")
    with fixed_addresses():
        engine: Any = make_engine("vllm", settings(folder / "fixed" / "qwen2-tied"))
        worker = engine._llm.engine_core.engine_core.model_executor.driver_worker.worker
        live = worker.model_runner.get_model()
        before = {name: p.data_ptr() for name, p in live.named_parameters()}
        load(engine, arrays(model), 0)
        out: dict[str, Any] = {"each_parameter": each_parameter(engine, model, 1)}
        after = {name: p.data_ptr() for name, p in live.named_parameters()}
        out["undone"] = undone_copies(engine, model)
        out["moved"] = sorted(name for name in before if before[name] != after[name])
        engine.close()
        out["spelled_out_head"] = check_spelled_out_head(folder / "fixed")
    return out


def check_spelled_out_head(folder: Path) -> list[float]:
    """A checkpoint that holds the tied head once more: vLLM ties it after loading, not before."""
    path = folder / "spelled"
    model = make_model("llama-tied", path)
    file = path / "llama-tied" / "model.safetensors"
    held = load_file(file)
    save_file(
        {**held, "lm_head.weight": held["model.embed_tokens.weight"].clone()},
        file,
        {"format": "pt"},
    )
    engine = make_engine("vllm", settings(path / "llama-tied"))
    off = [canary(engine, model)]
    for version in range(3):
        disturb(model, 0.05, 60 + version)
        load(engine, arrays(model), version)
        off.append(canary(engine, model))
    engine.close()
    return off


class Shelf:
    """A receiver of what lies on it."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}

    def fetch(self, manifest: WeightManifest, timeout_s: float) -> Iterator[dict[str, np.ndarray]]:
        yield self.arrays


class Zero:
    version = "0"

    def score(self, rollouts: Sequence[Any]) -> list[Score]:
        return [Score(value=0.0, scorer_version="0") for _ in rollouts]


def manifest_of(model: Any, version: int) -> WeightManifest:
    check = Canary(
        token_ids=tuple(CANARY), logprobs=tuple(reference(model, CANARY).tolist()), tolerance=1e-4
    )
    update = arrays(model)
    return announced(update, version, check)


def announced(update: dict[str, Any], version: int, check: Canary) -> WeightManifest:
    with Update(version, "shelf", Nowhere()) as made:
        made.add(update, dict.fromkeys(update, "float32"))
        return made.close(check)


def check_refusals(folder: Path) -> dict[str, Any]:
    """Bad updates to a whole worker that generates: what it says, and that it goes on unharmed."""
    model = make_model("llama-tied", folder / "worker")
    shelf = Shelf()
    chosen = settings(folder / "worker" / "llama-tied")
    worker = RolloutWorker(
        lambda: make_engine("vllm", chosen),
        lambda ids: [""] * len(ids),
        shelf,
        Zero,
        WorkerSettings(name="w"),
    )
    worker.start()
    good = arrays(model)
    shelf.arrays = good
    out: dict[str, Any] = {"report": worker.load_weights(manifest_of(model, 3)).canary_logp_diff}
    newer = copy.deepcopy(model)
    disturb(newer, 0.05, 90)
    first = next(iter(good))
    sent = {
        "torn": {**arrays(newer), first: arrays(newer)[first] + np.float32(1e-7)},
        "truncated": {**arrays(newer), first: arrays(newer)[first][:-1]},
        "missing": {n: a for n, a in arrays(newer).items() if n != first},
        "older": good,
        "duplicate": good,
        "unfitting": {**arrays(newer), "extra.weight": np.ones(3, np.float32)},
    }
    number = 0
    for kind, update in sent.items():
        shelf.arrays = update
        manifest = manifest_of(newer, {"older": 2, "duplicate": 3}.get(kind, 4))
        if kind == "unfitting":  # whole, and as announced, but not of this model
            manifest = announced(update, 4, manifest.canary)
        submit(worker, number)
        out[kind] = [said(partial(worker.load_weights, manifest))]
        out[kind] += generated(worker, model)
        number += 1
    shelf.arrays = arrays(newer)
    worker.load_weights(manifest_of(newer, 4))
    submit(worker, number)
    out["then"] = generated(worker, newer)
    out["late"] = late(worker, number + 1)
    submit(worker, number + 2)
    out["after_late"] = generated(worker, newer)
    worker.stop()
    return out


PROMPT = Prompt(id="p", messages=({"role": "text", "content": "x"},), token_ids=tuple(LONG))


def submit(worker: RolloutWorker, group: int) -> None:
    worker.submit([Assignment(group_id=group, prompt=PROMPT, samples=4)])


def late(worker: RolloutWorker, group: int) -> list[bool]:
    """Whether a group is late that was given a microsecond."""
    usual = worker._settings
    worker._settings = replace(usual, request_timeout_s=1e-6)
    submit(worker, group)
    deadline = time.monotonic() + 60
    while not (groups := worker.harvest(0.001).groups):
        assert time.monotonic() < deadline, "no group"
    worker._settings = usual
    return [meta.late for meta in groups]


def generated(worker: RolloutWorker, model: Any) -> list[Any]:
    """Versions of the one group under way, and its distance to ``model``."""
    groups: list[Any] = []
    deadline = time.monotonic() + 60
    while not groups:
        assert time.monotonic() < deadline, "no group"
        payload = worker.harvest(1.0).payload
        groups = from_table(payload) if payload is not None else []
    done = [rollout.completion for rollout, _ in groups[0].samples]
    off = [
        abs(float(exact) - got)
        for c in done
        for exact, got in zip(whole(model, LONG, c), c.logprobs, strict=True)
    ]
    return [sorted({s.version for c in done for s in c.versions}), max(off)]


def main() -> None:
    folder = Path(sys.argv[1])
    began = time.perf_counter()
    results: dict[str, Any] = {}
    parts: dict[str, Callable[[], Any]] = {
        "recompute": lambda: check_torture(folder, "recompute"),
        "keep": lambda: check_torture(folder, "keep"),
        "fixed": lambda: check_fixed_addresses(folder),
        "undone_bfloat16": lambda: check_undone_bfloat16(folder),
        "spelled_out_head": lambda: check_spelled_out_head(folder),
        "worker": lambda: check_refusals(folder),
    }
    for name, part in parts.items():
        results[name] = part()
        results.setdefault("seconds", {})[name] = time.perf_counter() - began
    (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
