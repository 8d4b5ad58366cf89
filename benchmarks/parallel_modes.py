"""Each way of training on several processes, and pairs of them, against one process.

    python benchmarks/parallel_modes.py [--width 64] [--layers 4] [--only WORD ...] [--out FILE]

For each mode a learner takes two steps on the same rollouts, on 2 or 4 processes over gloo, in
float32 with one plain gradient step (Adam's epsilon is 1: Adam would turn the rounding of tiny
gradients into whole steps). Printed are the largest differences to one process, relative to the
largest number: of the losses, of the first update (the gradient), of the weights after two steps;
then what the process that holds most has of weights and moments, and its peak memory above that of
an empty one. Modes that do not go together are listed with the reason.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa
import torch
import transformers
from record import provenance
from tokenizers import Tokenizer, models, pre_tokenizers

from cluster.contracts.config.algorithm import AlgorithmConfig, BatchConfig, StalenessConfig
from cluster.contracts.config.base import ModelConfig
from cluster.contracts.config.learner import LearnerConfig, WeightsConfig
from cluster.contracts.config.parallel_modes import PAIRS
from cluster.contracts.metrics import values
from cluster.contracts.records import StepInput
from cluster.contracts.rollout_table import SCHEMA
from learner.compute.ranks import SINGLE, Ranks, join, meeting_place, whole
from learner.compute.sharding import local
from learner.rl.catch_up import Digests
from learner.rl.learner import PPOLearner
from learner.settings import LearnerSettings

VOCAB, PROMPTS, SAMPLES, STEPS = 64, 4, 4, 2
TIMEOUT_S = 300.0

ALGORITHMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ppo": ({"advantage": "gae"}, {"packing": "padded"}),
    "grpo": ({"advantage": "grpo", "kl": {"place": "loss"}}, {"packing": "packed"}),
}
"""(algorithm, learner): padded rows with a value head and the KL in the reward, and packed ones
with the KL in the loss."""


@dataclass(frozen=True, slots=True)
class Mode:
    """A way of training. same: what one process needs as well for the same result."""

    name: str
    processes: int
    learner: Mapping[str, Any]
    same: Mapping[str, Any]
    algorithms: tuple[str, ...] = ("ppo", "grpo")


def mode(name: str, processes: int, same: Mapping[str, Any] | None = None, **learner: Any) -> Mode:
    return Mode(name, processes, learner, same or {})


FSDP: dict[str, Any] = {"sharding": "fsdp2"}
OWN: dict[str, Any] = {"value_model": "own", "value_lr": 0.05}
CHECKPOINTED: dict[str, Any] = {"gradient_checkpointing": True}
SMALL_MOMENTS: dict[str, Any] = {"optimizer": "adamw8bit"}
MODES = (
    mode("data", 2),
    mode("fsdp2", 2, **FSDP),
    mode("sequence", 2, sequence_parallel=2),
    mode("tensor", 2, tensor_parallel=2),
    mode("data x sequence", 4, sequence_parallel=2),
    mode("data x tensor", 4, tensor_parallel=2),
    mode("sequence x tensor", 4, sequence_parallel=2, tensor_parallel=2),
    mode("fsdp2 on four", 4, **FSDP),
    mode("sequence on four", 4, sequence_parallel=4),
    mode("tensor on four", 4, tensor_parallel=4),
    mode("fsdp2 x sequence", 4, sequence_parallel=2, **FSDP),
    mode("fsdp2 x tensor", 4, tensor_parallel=2, **FSDP),
    mode("fsdp2 x sequence x tensor", 4, sequence_parallel=2, tensor_parallel=2, **FSDP),
    mode("fsdp2 x checkpointing", 2, **FSDP, **CHECKPOINTED),
    mode("sequence x checkpointing", 2, sequence_parallel=2, **CHECKPOINTED),
    mode("tensor x checkpointing", 2, tensor_parallel=2, **CHECKPOINTED),
    mode("fsdp2 x tensor x checkpointing", 4, tensor_parallel=2, **FSDP, **CHECKPOINTED),
    mode("fsdp2 kept after forward", 2, reshard_after_forward=False, **FSDP),
    mode("fsdp2 x prefetch", 2, prefetch_layers=2, **FSDP),
    mode("fsdp2 x offload of moments", 2, offload=["optimizer"], **FSDP),
    mode("fsdp2 x offload of weights", 2, offload=["parameters"], **FSDP),
    mode("fsdp2 x offload of activations", 2, offload=["activations"], **FSDP, **CHECKPOINTED),
    mode("sequence x offload of activations", 2, sequence_parallel=2, offload=["activations"],
         **CHECKPOINTED),
    mode("tensor x offload of moments", 2, tensor_parallel=2, offload=["optimizer"]),
    mode("fsdp2 x tensor x offload of weights", 4, tensor_parallel=2, offload=["parameters"],
         **FSDP),
    mode("fsdp2 x 8-bit moments", 2, SMALL_MOMENTS, **SMALL_MOMENTS, **FSDP),
    mode("tensor x 8-bit moments", 2, SMALL_MOMENTS, **SMALL_MOMENTS, tensor_parallel=2),
    mode("sequence x 8-bit moments", 2, SMALL_MOMENTS, **SMALL_MOMENTS, sequence_parallel=2),
    Mode("fsdp2 x own value", 2, {**FSDP, **OWN}, OWN, ("ppo",)),
    Mode("sequence x own value", 2, {"sequence_parallel": 2, **OWN}, OWN, ("ppo",)),
    Mode("tensor x own value", 2, {"tensor_parallel": 2, **OWN}, OWN, ("ppo",)),
    Mode("fsdp2 x tensor x own value", 4, {"tensor_parallel": 2, **FSDP, **OWN}, OWN, ("ppo",)),
)  # fmt: skip


def make_model(folder: Path, width: int, layers: int, kind: str, tied: bool) -> str:
    """A directory with a fresh model that four processes can split, and a tokenizer."""
    words = {"<pad>": 0, "<end>": 1, **{f"w{i}": i for i in range(2, VOCAB)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<pad>"
    )
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=width // 8,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def rollouts(step: int) -> tuple[pa.Table, tuple[int, ...]]:
    """Random tokens in rows of many lengths."""
    rng = np.random.default_rng(step)
    groups = tuple(range(PROMPTS * step, PROMPTS * (step + 1)))
    rows = []
    for group in groups:
        prompt = rng.integers(2, VOCAB, rng.integers(2, 12)).astype(np.int32)
        for sample in range(SAMPLES):
            count = int(rng.integers(1, 33))
            rows.append(
                {
                    "group_id": group,
                    "sample": sample,
                    "prompt_ids": prompt,
                    "token_ids": rng.integers(2, VOCAB, count).astype(np.int32),
                    "logprobs": rng.normal(-np.log(VOCAB), 0.02, count).astype(np.float32),
                    "span_version": [step],
                    "span_end": [count],
                    **{key: [] for key in ("set_end", "set_count", "set_ids")},
                    "finish_reason": "stop",
                    "score": float(rng.normal()),
                    "score_parts": "{}",
                }
            )
    return pa.Table.from_pylist(rows, schema=SCHEMA), groups


def settings(model: str, algorithm: str, learner: Mapping[str, Any]) -> LearnerSettings:
    method, own = ALGORITHMS[algorithm]
    plain = {"lr": 0.1, "eps": 1.0, "tokens_per_microbatch": 64, "max_grad_norm": 1e6}
    return LearnerSettings(
        model=ModelConfig(path=model),
        learner=LearnerConfig.model_validate({**plain, **own, **learner}),
        algorithm=AlgorithmConfig.model_validate(method),
        staleness=StalenessConfig(),
        batch=BatchConfig(prompts_per_step=PROMPTS, samples_per_prompt=SAMPLES),
        weights=WeightsConfig(),
        rollout_dtype="float32",
        temperature=1.0,
        max_tokens=32,
        seed=0,
        canary_prompt=(4, 5, 6),
    )


def train(given: LearnerSettings, ranks: Ranks = SINGLE) -> dict[str, Any]:
    """Weights before and after each step, losses, and what this process held."""
    gc.collect()
    before = _memory("VmRSS")
    # Linux forgets the peak of before.
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    learner = PPOLearner(given, Digests(on_device=False), ranks=ranks)
    learner.start()
    networks, optimizers = learner.state.networks, learner.state.optimizers
    modules = [networks.policy, *([networks.value] if networks.value is not None else [])]
    weights, losses = [], []
    for step in range(-1, STEPS):
        if step >= 0:
            table, groups = rollouts(step)
            done = learner.step(StepInput(step=step, group_ids=groups, payloads=(table,)))
            found = values(done.metrics)
            losses += [found[name] for name in ("policy/loss", "value/loss") if name in found]
        named = [p for module in modules for p in module.parameters()]
        weights.append([whole(p.detach()).cpu().numpy().copy() for p in named])
    moments = [
        value
        for one in (optimizers.policy, optimizers.value)
        if one is not None
        for state in one.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim
    ]
    held = sum(local(tensor).nbytes for tensor in [*named, *moments])
    peak = _memory("VmHWM") - before
    return {"weights": weights, "losses": losses, "held": held, "peak": peak}


def _memory(name: str) -> int:
    """Bytes, of this process."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {name}")


def work(rank: int, size: int, port: int, folder: Path) -> None:
    """One of `size` processes: every task in turn."""
    torch.set_num_threads(1)
    tasks = ForkingPickler.loads((folder / "tasks.pkl").read_bytes())
    ranks = join(rank, size, ("127.0.0.1", port), gpu=False, timeout_s=TIMEOUT_S)
    train(tasks[0][1], ranks)  # what the first one loads is nobody's peak
    found: list[Any] = []
    for name, given in tasks:
        print(f"{rank}: {name}", file=sys.stderr, flush=True)
        outcome = train(given, ranks)
        # Whole weights are the same on every rank; those of the first will do.
        found.append(outcome if rank == 0 else {**outcome, "weights": None})
        ranks.barrier()
        (folder / f"found-{rank}.pkl").write_bytes(ForkingPickler.dumps(found))
    ranks.leave()
    os._exit(0)


def on_processes(
    size: int, tasks: Sequence[tuple[str, LearnerSettings]], folder: Path
) -> list[list[Any]]:
    """What each of `size` processes found of each task."""
    (folder / "tasks.pkl").write_bytes(ForkingPickler.dumps(list(tasks)))
    store = meeting_place("127.0.0.1", TIMEOUT_S)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, __file__, "--child", str(rank), str(size), str(store.port), folder],
            env=environment,
        )
        for rank in range(size)
    ]
    try:
        codes = [child.wait(TIMEOUT_S * 4) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait(20)
    if any(codes):
        raise SystemExit(f"processes ended with {codes}")
    return [
        ForkingPickler.loads((folder / f"found-{rank}.pkl").read_bytes()) for rank in range(size)
    ]


def differences(found: Mapping[str, Any], alone: Mapping[str, Any]) -> dict[str, float]:
    def largest(pairs: list[tuple[Any, Any]]) -> float:
        scale = max(float(np.abs(b).max()) for _, b in pairs)
        return max(float(np.abs(a - b).max()) for a, b in pairs) / scale

    def moved(outcome: Mapping[str, Any]) -> list[Any]:
        start, first = outcome["weights"][:2]
        return [after - before for before, after in zip(start, first, strict=True)]

    return {
        "loss": largest([(np.array(found["losses"]), np.array(alone["losses"]))]),
        "gradient": largest(list(zip(moved(found), moved(alone), strict=True))),
        "weights": largest(list(zip(found["weights"][-1], alone["weights"][-1], strict=True))),
    }


def table(chosen: Sequence[Mode], model: str, folder: Path) -> list[dict[str, Any]]:
    """One row for each mode and algorithm."""
    cases, refused = list[tuple[Mode, str, LearnerSettings]](), list[dict[str, Any]]()
    for one in chosen:
        for algorithm in one.algorithms:
            learner = {"processes": one.processes, **one.learner}
            try:
                cases.append((one, algorithm, settings(model, algorithm, learner)))
            except ValueError as problem:
                why = str(problem).splitlines()[1].strip()
                refused.append({"mode": one.name, "processes": one.processes, "refused": why})
                break
    found: dict[tuple[str, str], list[Any]] = {}
    for size in sorted({one.processes for one, _, _ in cases}):
        here = [case for case in cases if case[0].processes == size]
        tasks = [(f"{one.name} {algorithm}", given) for one, algorithm, given in here]
        by_rank = on_processes(size, tasks, folder)
        for index, (one, algorithm, _) in enumerate(here):
            found[one.name, algorithm] = [rank[index] for rank in by_rank]
    alone: dict[tuple[str, str], Any] = {}
    rows = []
    for one, algorithm, _ in cases:
        key = (algorithm, repr(one.same))
        if not alone:
            train(settings(model, algorithm, one.same))
        if key not in alone:
            alone[key] = train(settings(model, algorithm, one.same))
        ours, reference = found[one.name, algorithm], alone[key]
        rows.append(
            {
                "mode": one.name,
                "processes": one.processes,
                "algorithm": algorithm,
                **differences(ours[0], reference),
                "held": max(rank["held"] for rank in ours),
                "held alone": reference["held"],
                "peak": max(rank["peak"] for rank in ours),
                "peak alone": reference["peak"],
            }
        )
    return rows + refused


def printed(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| mode | processes | method | loss | gradient | weights after 2 steps "
        "| held, MB (alone) | peak, MB (alone) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "refused" in row:
            lines.append(f"| {row['mode']} | | | refused: {row['refused']} | | | | |")
            continue
        held, held_alone, peak, peak_alone = (
            f"{row[name] / 1e6:.2f}" for name in ("held", "held alone", "peak", "peak alone")
        )
        lines.append(
            f"| {row['mode']} | {row['processes']} | {row['algorithm']} | {row['loss']:.1e} "
            f"| {row['gradient']:.1e} | {row['weights']:.1e} | {held} ({held_alone}) "
            f"| {peak} ({peak_alone}) |"
        )
    lines += [f"| {' x '.join(pair.modes)} | | | refused: {pair.why} | | | | |" for pair in PAIRS]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--kind", default="qwen2", choices=("qwen2", "qwen3", "llama"))
    parser.add_argument("--untied", action="store_true")
    parser.add_argument("--only", nargs="*", default=[], help="modes whose name has all words")
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args(arguments)
    modes = [
        one
        for one in MODES
        if all(word in one.name for word in chosen.only) and one.processes in chosen.processes
    ]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(
            Path(folder) / "model", chosen.width, chosen.layers, chosen.kind, not chosen.untied
        )
        rows = table(modes, model, Path(folder))
    print(printed(rows))
    if chosen.out is not None:
        shape = {"kind": chosen.kind, "width": chosen.width, "layers": chosen.layers}
        record = {**provenance(), "model": shape, "rows": rows}
        chosen.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        rank, size, port = (int(word) for word in sys.argv[2:5])
        work(rank, size, port, Path(sys.argv[5]))
    main()
