"""Peak memory of each process of a sharded learner: while it loads, and over one PPO step.

    python -m benchmarks.sharded_memory --size 1b --processes 4

A model with random weights is written to a temporary folder first. Each process is the real
learner, over gloo. What `accord plan` says of the same config is printed beside what was measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu.scale import Shape

MB = 1 << 20
TIMEOUT_S = 1500.0


def _shape(vocabulary: int, hidden: int, layers: int, heads: int, inner: int) -> Shape:
    return Shape(
        vocabulary=vocabulary,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads // 2,
        intermediate=inner,
    )


SIZES = {
    "tiny": _shape(300, 64, 3, 4, 160),
    "50m": _shape(4096, 640, 8, 10, 1920),
    "130m": _shape(4096, 1024, 10, 16, 3072),
    "350m": _shape(16384, 1280, 20, 10, 3584),
    "1b": _shape(32768, 2048, 15, 16, 8192),
}


def peak_mb() -> float:
    """MiB of resident memory at most since `reset_peak`."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def reset_peak() -> float:
    """Start anew at the memory of now, which is returned (MiB)."""
    from learner.compute.optimizer import release_memory

    release_memory()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_mb()


def work(rank: int, port: int, task: dict[str, Any]) -> dict[str, float]:
    """One process: what it had before, and its peaks above that."""
    import torch

    import learner.rl.learner
    import learner.rl.publish
    from benchmarks.gpu.learners import KeepingPublisher, make_learner
    from benchmarks.gpu.models import rollouts
    from cluster.contracts.records import StepInput
    from learner.compute.ranks import SINGLE, join
    from learner.rl.learner import PPOLearner
    from learner.rl.networks import build_networks
    from learner.settings import CANARY_PROMPT_TOKENS

    torch.set_num_threads(1)
    size, shape = task["processes"], SIZES[task["size"]]
    ranks = SINGLE
    if size > 1:
        ranks = join(rank, size, ("127.0.0.1", port), gpu=False, timeout_s=TIMEOUT_S)
    settings = make_learner(
        Path(task["folder"]),
        task["dtype"],
        None,
        groups=task["groups"],
        samples=2,
        rollout_dtype=task["dtype"],
        **task["learner"],
    ).settings
    if not task["reference"]:
        kl = settings.algorithm.kl.model_copy(update={"coef": 0.0})
        algorithm = settings.algorithm.model_copy(update={"kl": kl})
        settings = dataclasses.replace(settings, algorithm=algorithm)
    # Everything is imported, and torch's thread pools are made, before memory is looked at.
    torch.randn(64, 64, requires_grad=True).matmul(torch.randn(64, 64)).sum().backward()
    found = {"before_mb": reset_peak()}

    def build(*given: Any) -> Any:
        made = build_networks(*given)
        found["loading_mb"] = peak_mb() - found["before_mb"]
        found["loaded_mb"] = reset_peak() - found["before_mb"]
        found["parameters"] = sum(p.numel() for p in made[0].policy.parameters())
        return made

    if not task["steps"]:
        kept = build(settings, ranks)
        ranks.barrier()
        del kept
        ranks.leave()
        return found

    class Dropping(KeepingPublisher):
        def put(self, arrays: Any) -> None:
            self._coming |= dict.fromkeys(arrays)

    changed: Any = learner.rl.learner
    changed.build_networks = build
    # Each token of the canary is a pass over the whole model: time, not memory.
    changed = learner.rl.publish
    changed.CANARY_TOKENS = CANARY_PROMPT_TOKENS
    trained = PPOLearner(settings, Dropping(), ranks=ranks)
    trained.start()
    found["starting_mb"] = peak_mb() - found["before_mb"]
    found["started_mb"] = reset_peak() - found["before_mb"]
    for step in range(task["steps"]):
        table, groups = rollouts(shape, step, task["groups"], 2, task["tokens"])
        trained.step(StepInput(step=step, group_ids=groups, payloads=(table,)))
        found["step_mb"] = peak_mb() - found["before_mb"]
    trained.close()
    ranks.leave()
    return found


def measure(task: dict[str, Any]) -> list[dict[str, float]]:
    """One process after the other starts; their figures by rank."""
    from learner.compute.ranks import meeting_place

    store = meeting_place("127.0.0.1", TIMEOUT_S)
    command = [sys.executable, "-m", "benchmarks.sharded_memory", "--task", json.dumps(task)]
    processes = [
        subprocess.Popen(
            [*command, "--rank", str(rank), "--port", str(store.port)],
            stdout=subprocess.PIPE,
            text=True,
            # As many arenas as threads would keep freed memory, each its own.
            env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        )
        for rank in range(task["processes"])
    ]
    try:
        told = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
        if any(process.returncode for process in processes):
            raise SystemExit("a process ended with an error")
    finally:
        for process in processes:
            process.kill()
            process.wait(10)
    return [json.loads(text.splitlines()[-1]) for text in told]


def run(args: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.gpu.models import make_model

    keys: dict[str, Any] = {
        "gradient_checkpointing": True,
        "tokens_per_microbatch": args.tokens,
        "optimizer": args.optimizer,
        **({"processes": args.processes, "sharding": "fsdp2"} if args.processes > 1 else {}),
        **dict(pair.split("=", 1) for pair in args.set),
    }
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        make_model(Path(folder), SIZES[args.size], dtype="bfloat16")
        task = {
            "folder": folder,
            "size": args.size,
            "processes": args.processes,
            "dtype": args.dtype,
            "groups": args.processes,
            "tokens": args.tokens // 2,
            "learner": keys,
            "steps": args.steps,
            "reference": not args.no_reference,
        }
        planned = plan(task)
        return {"task": {**task, "folder": ""}, "ranks": measure(task), "planned_mb": planned}


def plan(task: dict[str, Any]) -> dict[str, float]:
    """What `accord plan` says of a process of the same learner."""
    from cluster.assembly.model_facts import facts_of
    from cluster.contracts.config.train import TrainConfig
    from cluster.measure.sizes import learner_sizes

    config = TrainConfig.model_validate(
        {
            "model": {"path": task["folder"], "dtype": task["dtype"]},
            "data": {"prompts": "none"},
            "reward": {"sources": [{"type": "rules"}]},
            "rollout": {"dtype": task["dtype"]},
            "algorithm": {} if task["reference"] else {"kl": {"coef": 0.0}},
            "learner": task["learner"],
        }
    )
    facts = facts_of(json.loads((Path(task["folder"]) / "config.json").read_text("utf-8")))
    sizes = learner_sizes(config, facts)
    named = {name: round(size / MB, 1) for name, size in sizes.device.items()}
    return {**named, "together": round(sizes.total / MB, 1)}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--optimizer", choices=("adamw", "adamw8bit"), default="adamw")
    parser.add_argument("--tokens", type=int, default=128, help="of a microbatch")
    parser.add_argument("--steps", type=int, default=1, help="0: load only")
    parser.add_argument("--no-reference", action="store_true", help="KL coefficient 0")
    parser.add_argument("--folder", help="where the model is written; default: the system's")
    parser.add_argument("--set", nargs="*", default=[], help="further keys of `learner`: KEY=VALUE")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.task is not None:
        found: dict[str, Any] = dict(work(args.rank, args.port, json.loads(args.task)))
    else:
        found = run(args)
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
