"""What test_gpu_engine.py asserts about: vLLM on CUDA through weight swaps. A process of its own.

Usage: python engine_checks.py FOLDER; writes FOLDER/results.json.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from actors.environment import make_engine, prepare_environment

prepare_environment(gpu=True)

import torch  # noqa: E402
import transformers  # noqa: E402

from actors.settings import EngineSettings  # noqa: E402
from cluster.contracts.records import Completion  # noqa: E402

SWAPS = 20


def make_model(folder: Path) -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder / "model")
    return model.cuda()


@torch.no_grad()
def disturb(model: Any, seed: int) -> None:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, device="cuda")
        parameter.add_(0.02 * noise)


@torch.no_grad()
def logp(model: Any, ids: list[int]) -> torch.Tensor:
    tokens = torch.tensor([ids], device="cuda")
    scores = torch.log_softmax(model(tokens).logits[0, :-1].float(), -1)
    return scores.gather(1, tokens[0, 1:, None])[:, 0].cpu()


def check(folder: Path, dtype: str) -> dict[str, Any]:
    """A swap after every eighth step with 32 requests in flight, from host and device tensors."""
    model = make_model(folder)
    if dtype == "bfloat16":
        model = model.bfloat16().float()
    settings = EngineSettings(
        model_path=str(folder / "model"),
        dtype=dtype,
        max_tokens=200,
        stop_token_ids=(),
        max_running=32,
        max_model_len=256,
        gpu_memory_fraction=0.2,
    )
    engine: Any = make_engine("vllm", settings)
    prompts = {f"r{i}": [(7 * i + 3 * j) % 1000 for j in range(12 + i)] for i in range(32)}
    for name, ids in prompts.items():
        engine.submit(name, ids, None)
    done: dict[str, Completion] = {}
    steps, pauses, canaries = list[float](), list[float](), list[float]()
    version = 0
    while engine.unfinished:
        for _ in range(8):
            began = time.perf_counter()
            done.update(engine.step())
            steps.append(time.perf_counter() - began)
        if version < SWAPS and engine.unfinished:
            version += 1
            disturb(model, version)
            wanted = getattr(torch, dtype)
            tensors = {name: p.detach().to(wanted) for name, p in model.named_parameters()}
            engine.stage(tensors.items(), version)
            began = time.perf_counter()
            engine.swap(version)
            torch.cuda.synchronize()
            pauses.append(time.perf_counter() - began)
            engine.prove()
            ids = list(range(5, 45))
            got = torch.tensor(engine.sequence_logprobs(ids))
            canaries.append(float((got - logp(model, ids)).abs().max()))
    last = {
        name: completion
        for name, completion in done.items()
        if completion.versions[-1].version == version
    }
    errors = []
    for name, completion in last.items():
        exact = logp(model, prompts[name] + list(completion.token_ids))[len(prompts[name]) - 1 :]
        span = completion.versions[-1]
        recorded = torch.tensor(list(completion.logprobs))
        errors.append(float((exact - recorded)[span.start : span.end].abs().max()))
    engine.close()
    return {
        "step_p50_s": sorted(steps)[len(steps) // 2],
        "pause_max_s": max(pauses),
        "pause_p50_s": sorted(pauses)[len(pauses) // 2],
        "canary_max": max(canaries),
        "last_version_max": max(errors),
        "compared": len(errors),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    found = check(folder, sys.argv[2])
    (folder / "results.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
