"""What test_engine_in_parts.py asserts about: a vLLM engine of two processes, each with a part of
the model (tensor parallelism, which vLLM's CPU build has over gloo).

Usage: python vllm_parts_checks.py FOLDER; writes FOLDER/results.json.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_checks import (  # first of all: it prepares the environment for vLLM
    CANARY,
    canary,
    differences,
    disturb,
    finish,
    make_model,
    prompts,
    settings,
)

import numpy as np  # isort: skip
import torch  # isort: skip

from actors.engines import vllm_parts
from actors.environment import make_engine
from cluster.contracts.errors import AccordError
from cluster.contracts.records import Canary, WeightManifest
from cluster.weights.disk import DiskPublisher, DiskReceiver
from cluster.weights.intake import Incoming, Intake
from learner.rl.publish import buckets, host_arrays

CHECK = Canary(token_ids=tuple(CANARY), logprobs=(0.0,) * (len(CANARY) - 1), tolerance=None)
WAIT_S = 60.0


class InOneProcess(DiskReceiver):
    """As a receiver that only the worker's own process may have: Ray's object store, a plugin."""

    in_any_process = False


def said(work: Callable[..., Any], *args: Any) -> str:
    try:
        work(*args)
    except AccordError as problem:
        return f"{type(problem).__name__}: {problem}"
    return "accepted"


class Sender:
    """A learner that disturbs its model before each version."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.model, self.publisher = model, DiskPublisher(folder)
        self.version = 0

    def next(self) -> WeightManifest:
        self.version += 1
        disturb(self.model, 0.05, self.version)
        with self.publisher.open(self.version) as update:
            for arrays, dtypes in buckets(
                self.model, "float32", on_device=False, limit_bytes=30_000
            ):
                update.add(arrays, dtypes)
            return update.close(CHECK)


def incoming(receiver: DiskReceiver, manifest: WeightManifest) -> Incoming:
    return Intake(receiver, WAIT_S).take(manifest)


def swapped(engine: Any, sender: Sender, receiver: DiskReceiver) -> dict[str, Any]:
    """A whole update while requests are in flight: the steps during it, versions, parity."""
    asked = prompts(6)
    old = sender.version
    for name, ids in asked.items():
        engine.submit(name, ids, None)
    done = dict(engine.step())
    manifest = sender.next()
    staging = threading.Thread(target=engine.stage, args=(incoming(receiver, manifest), old + 1))
    staging.start()
    steps = 0
    while staging.is_alive():
        if not engine.unfinished:
            for name, ids in asked.items():
                engine.submit(f"more-{steps}-{name}", ids, None)
        done.update(engine.step())
        steps += 1
    staging.join()
    engine.submit("after", asked["r0"], None)
    engine.swap(old + 1)
    done.update(finish(engine))
    found = {
        "buckets": manifest.buckets,
        "steps": steps,
        "after": float(differences(sender.model, asked["r0"], done["after"], 1.0).max()),
        "version": [span.version for span in done["after"].versions],
        "canary": canary(engine, sender.model),
        "proof": said(engine.prove),
    }
    return found


def refusals(engine: Any, sender: Sender) -> dict[str, Any]:
    """Updates that must leave the engine as it is, by both ways."""
    before = canary(engine, sender.model)
    version = sender.version
    model = sender.model
    whole, _ = host_arrays(model, "float32")
    first = next(iter(whole))
    wrong = {
        "missing": {n: a for n, a in whole.items() if n != first},
        "extra": {**whole, "extra.weight": np.ones(3, np.float32)},
        "shape": {**whole, first: whole[first][:-1]},
    }
    out = {kind: said(engine.stage, update.items(), 90) for kind, update in wrong.items()}
    for kind, receiver in (("torn here", InOneProcess()), ("torn there", DiskReceiver())):
        manifest = sender.next()
        file = sorted(Path(manifest.locator).iterdir())[2]
        data = bytearray(file.read_bytes())
        data[40] ^= 1
        file.write_bytes(bytes(data))
        out[kind] = said(engine.stage, incoming(receiver, manifest), manifest.version)
    disturb_back(model, sender, version)
    out["swap"] = said(engine.swap, sender.version)
    out["canary"] = [before, canary(engine, model)]
    out["proof"] = said(engine.prove)
    return out


def disturb_back(model: Any, sender: Sender, version: int) -> None:
    """The model of `version` again."""
    whole = dict(incoming(DiskReceiver(), sender_manifest[version]))
    model.load_state_dict({n: torch.from_numpy(a.copy()) for n, a in whole.items()}, strict=False)


sender_manifest: dict[int, WeightManifest] = {}


def undone(engine: Any, sender: Sender) -> list[str]:
    """A swap that does nothing in one of the two processes, and a good one after it."""
    engine.stage(incoming(DiskReceiver(), sender.next()), sender.version)
    engine._llm.collective_rpc(_break_swap_of_second)
    engine.swap(sender.version)
    found = [said(engine.prove)]
    engine.stage(incoming(DiskReceiver(), sender.next()), sender.version)
    engine.swap(sender.version)
    return [*found, said(engine.prove)]


def _break_swap_of_second(worker: Any) -> None:
    shadow = worker._accord_shadow
    if worker.rank == 1:
        shadow.swap = lambda: vars(shadow).pop("swap", None)


def most_files(shared: Path, work: Callable[[], Any]) -> int:
    """The most buckets that lay in shared memory at a time while the work went on."""
    most, ended = 0, threading.Event()

    def look() -> None:
        nonlocal most
        while not ended.is_set():
            for folder in shared.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    most = max(most, len(os.listdir(folder)))

    thread = threading.Thread(target=look)
    thread.start()
    work()
    ended.set()
    thread.join()
    return most


def main(folder: Path) -> None:
    model = make_model("qwen2-tied", folder)
    engine = make_engine(
        "vllm", settings(folder / "qwen2-tied", tensor_parallel=2, weights="published")
    )
    vllm_parts.BUCKET_BYTES = 30_000
    shared = folder / "shared"
    shared.mkdir()
    vllm_parts._SHARED_MEMORY = str(shared)
    sender = Sender(model, folder / "weights")
    publish, versions = sender.next, itertools.count(1)

    def remembered() -> WeightManifest:
        manifest = publish()
        sender_manifest[next(versions)] = manifest
        return manifest

    sender.next = remembered  # type: ignore[method-assign]
    out: dict[str, Any] = {"there": [], "here": []}
    for _ in range(2):
        out["there"].append(swapped(engine, sender, DiskReceiver()))
        out["here"].append(swapped(engine, sender, InOneProcess()))
    whole, _ = host_arrays(model, "float32")
    out["most"] = most_files(shared, lambda: engine.stage(whole.items(), 50))
    out["refused"] = refusals(engine, sender)
    out["undone"] = undone(engine, sender)
    out["left"] = os.listdir(shared)
    engine.close()
    (folder / "results.json").write_text(json.dumps(out), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
