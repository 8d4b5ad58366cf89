"""What publishing and receiving a model's weights takes, in memory and time: a learner and a
worker, each a process of its own, a random model, bfloat16 on the wire.

    python benchmarks/push_memory.py --size 1B --transport object_store --bucket-mb 64

Memory is what a process holds above its resting state, at its peak, in MB. heap: its own memory.
mapped: memory that it shares (Ray's object store, files): one copy of it for the whole machine.
The worker rests with its second set of weights already there. --whole: one bucket for all, which is
how a model travels without buckets.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# size -> (vocabulary, hidden, intermediate, layers, heads, heads of keys and values)
SIZES = {
    "1M": (512, 128, 384, 4, 4, 2),
    "100M": (16000, 640, 1792, 16, 10, 2),
    "1B": (32000, 2048, 5632, 20, 32, 4),
}
MB = 1 << 20
WAIT_S = 600.0


class Memory:
    """Peaks of this process's memory above where it stood at the start of a `with watch()`."""

    def __init__(self) -> None:
        self.peaks: dict[str, float] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        rest, self.peaks = _held(), {"heap": 0.0, "mapped": 0.0}
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(0.002):
                now = _held()
                for kind in self.peaks:
                    self.peaks[kind] = max(self.peaks[kind], now[kind] - rest[kind])

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        began = time.perf_counter()
        try:
            yield
        finally:
            self.peaks["seconds"] = time.perf_counter() - began
            ended.set()
            thread.join()
            self.peaks = {kind: round(peak, 3) for kind, peak in self.peaks.items()}


def _held() -> dict[str, float]:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    held = {line.split(":")[0]: float(line.split()[1]) / 1024 for line in lines if "Rss" in line}
    return {"heap": held["RssAnon"], "mapped": held["RssShmem"] + held["RssFile"]}


class Learner:
    """Publishes version after version of one model."""

    def __init__(self, task: dict[str, Any]) -> None:
        import torch
        from transformers import Qwen2Config, Qwen2ForCausalLM
        from transformers.initialization import no_init_weights

        import learner.rl.publish  # now, so that it is not measured
        from cluster.weights.transports import PublisherOptions, make_publisher

        assert learner.rl.publish
        torch.set_num_threads(1)
        vocabulary, hidden, intermediate, layers, heads, shared = SIZES[task["size"]]
        config = Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=shared,
            tie_word_embeddings=False,
        )
        with no_init_weights():
            self._policy = Qwen2ForCausalLM(config)
        for number, parameter in enumerate(self._policy.parameters()):
            parameter.data.fill_(0.01 + number * 1e-4)
        self._policy.requires_grad_(False)
        self._limit = int(task["bucket_mb"] * MB)
        options = PublisherOptions(directory=task["folder"])
        self._publisher = make_publisher(task["transport"], options)
        self.memory = Memory()

    def publish(self, version: int) -> tuple[Any, dict[str, Any]]:
        from learner.rl.publish import buckets, canary

        with self.memory.watch():
            check = canary(self._policy, range(2, 34), "bfloat16", None)
        of_canary = self.memory.peaks
        self._publisher.retain([])
        with self.memory.watch(), self._publisher.open(version) as update:
            for arrays, dtypes in buckets(
                self._policy,
                "bfloat16",
                on_device=self._publisher.on_device,
                limit_bytes=self._limit,
            ):
                update.add(arrays, dtypes)
                del arrays
            manifest = update.close(check)
        found = {"GB": round(manifest.nbytes / 1e9, 3), "buckets": manifest.buckets}
        found |= {"largest tensor": round(max(t.nbytes for t in manifest.tensors) / MB, 3)}
        return manifest, found | {"canary": of_canary, "publish": self.memory.peaks}


class Worker:
    """Takes updates into a second set of weights."""

    def __init__(self, task: dict[str, Any]) -> None:
        import torch

        from cluster.weights.intake import Intake
        from cluster.weights.transports import make_receiver

        torch.set_num_threads(1)
        self._intake = Intake(make_receiver(task["transport"], "cpu"), WAIT_S)
        self._second: dict[str, Any] = {}
        self.memory = Memory()

    def receive(self, manifest: Any) -> dict[str, Any]:
        import torch

        from actors.engines.host_tensors import to_tensor

        if not self._second:
            kinds = {t.name: (t.shape, getattr(torch, t.dtype)) for t in manifest.tensors}
            self._second = {n: torch.zeros(shape, dtype=d) for n, (shape, d) in kinds.items()}
        with self.memory.watch():
            for name, array in self._intake.take(manifest):
                self._second[name].copy_(to_tensor(array))
                del array
        return self.memory.peaks


def measure(task: dict[str, Any], versions: int) -> dict[str, Any]:
    """The last of `versions` pushes. From the second on, memory that the first one has taken and
    given back may be there already: for memory look at the first, for time at later ones."""
    import ray

    from cluster.contracts.telemetry import telemetry_off

    telemetry_off()
    root = str(Path(__file__).resolve().parents[1])
    ray.init(
        num_cpus=4,
        object_store_memory=task["store_mb"] * MB,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}},
    )
    try:
        learner: Any = ray.remote(Learner).remote(task)
        worker: Any = ray.remote(Worker).remote(task)
        found: dict[str, Any] = {}
        for version in range(versions):
            manifest, found = ray.get(learner.publish.remote(version), timeout=WAIT_S)
            found["receive"] = ray.get(worker.receive.remote(manifest), timeout=WAIT_S)
            del manifest
        return task | found
    finally:
        ray.shutdown()


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="100M")
    parser.add_argument("--transport", default="object_store")
    parser.add_argument("--bucket-mb", type=float, default=64)
    parser.add_argument("--whole", action="store_true", help="one bucket for all of it")
    parser.add_argument("--versions", type=int, default=1)
    parser.add_argument("--store-mb", type=int, default=3000, help="of Ray's object store")
    parser.add_argument("--json", type=Path, help="append the result to this file, one a line")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        task = {"size": given.size, "transport": given.transport, "store_mb": given.store_mb,
                "bucket_mb": 1e6 if given.whole else given.bucket_mb, "folder": folder}  # fmt: skip
        found = measure(task, given.versions)
    del found["folder"]
    text = json.dumps(found)
    print(text)
    if given.json is not None:
        with given.json.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
