"""What a learner step costs with adapters (LoRA), beside the same step of all weights.

    python benchmarks/lora.py                        # 16 million parameters, rank 16
    python benchmarks/lora.py --layers 12 --hidden 768 --intermediate 2048 --out lora.json

Both learners take the same steps of random rollouts in one process, in turns, so that what else
runs on the machine meets both alike. Printed: CPU seconds of a step, bytes of the optimiser's
moments, of a push and of a checkpoint, and what a worker needs to merge a push.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from record import provenance  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--intermediate", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = {**provenance(), "given": {k: v for k, v in vars(given).items() if k != "out"}}
    with tempfile.TemporaryDirectory() as folder:
        found["results"] = measured(given, Path(folder))
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found["results"]))


def measured(given: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """By kind, full and lora: medians of CPU seconds, and bytes."""
    from cluster.contracts.records import StepInput
    from cluster.measure.bench.learner_child import make_model, random_rollouts

    shape = [given.vocabulary, given.hidden, given.layers, given.heads, given.intermediate]
    model = make_model(folder, shape)
    kinds = {kind: learner(model, given, kind) for kind in ("full", "lora")}
    spent: dict[str, list[float]] = {kind: [] for kind in kinds}
    manifests: dict[str, Any] = {}
    for step in range(given.steps + 1):  # the first one warms up
        rollouts, groups = random_rollouts(given.vocabulary, step)
        batch = StepInput(step=step, group_ids=groups, payloads=(rollouts,))
        for kind in kinds if step % 2 else reversed(kinds):
            began = time.process_time()
            manifests[kind] = kinds[kind].step(batch).manifest
            spent[kind].append(time.process_time() - began)
    results = {}
    for kind, made in kinds.items():
        place = folder / f"checkpoint-{kind}"
        made.save(place)
        results[kind] = {
            "step_cpu_s": statistics.median(spent[kind][1:]),
            "trained": sum(p.numel() for p in trained(made)),
            "moment_bytes": moments(made.state.optimizers.policy),
            "push_bytes": manifests[kind].nbytes,
            "checkpoint_bytes": sum(f.stat().st_size for f in place.rglob("*.safetensors")),
        }
    results["lora"]["merge_cpu_s"] = merge_seconds(model, kinds["lora"], manifests["lora"])
    return results


def learner(model: Path, given: argparse.Namespace, kind: str) -> Any:
    from cluster.contracts.config.lora import LoraConfig
    from cluster.measure.bench.learner_child import CopyingPublisher, learner_settings
    from learner.rl.learner import PPOLearner

    settings = dataclasses.replace(
        learner_settings(model, given.dtype, {}),
        rollout_dtype=given.dtype,
        lora=LoraConfig(rank=given.rank) if kind == "lora" else None,
    )
    made = PPOLearner(settings, CopyingPublisher(), threads=1)
    made.start()
    return made


def trained(made: Any) -> list[Any]:
    return [p for group in made.state.optimizers.policy.param_groups for p in group["params"]]


def moments(optimizer: Any) -> int:
    """Bytes of AdamW's two moments."""
    rows = optimizer.state.values()
    return sum(value.nbytes for row in rows for value in row.values() if value.ndim)


def merge_seconds(model: Path, made: Any, manifest: Any) -> float:
    """CPU seconds in which a worker makes the whole model of a push, once its base is checked."""
    from actors.engines.merging import Merger
    from actors.settings import EngineSettings
    from learner.models.lora import adapter_tensors

    settings = EngineSettings(
        model_path=str(model), max_tokens=8, stop_token_ids=(1,), max_model_len=16
    )
    merger, found = Merger(settings, "cpu"), []
    policy = made.state.networks.policy
    sent = [(name, t.detach().numpy()) for name, t in adapter_tensors(policy).items()]
    for _ in range(4):
        began = time.process_time()
        for _ in merger.whole(manifest.lora, sent):
            pass
        found.append(time.process_time() - began)
    return statistics.median(found[1:])


def table(results: dict[str, dict[str, float]]) -> str:
    full, lora = results["full"], results["lora"]
    lines = ["| | all weights | LoRA | share |", "|---|---|---|---|"]
    for name in ("trained", "step_cpu_s", "moment_bytes", "push_bytes", "checkpoint_bytes"):
        share = lora[name] / full[name]
        lines.append(f"| {name} | {full[name]:.4g} | {lora[name]:.4g} | {share:.1%} |")
    lines.append(f"| merge_cpu_s of a push | - | {lora['merge_cpu_s']:.4g} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
