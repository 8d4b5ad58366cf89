"""vLLM through weight swaps with requests in flight: every token is of the weights it names.

transformers computes the log-probabilities of the newest version's tokens and of the canary.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from actors.environment import make_engine, prepare_environment
from benchmarks.gpu.report import Found
from benchmarks.gpu.scale import Scale
from cluster.contracts.records import Completion

LIMITS = {"float32": 1e-3, "bfloat16": 0.25}  # nats
STEPS_BETWEEN_SWAPS = 8


def run(scale: Scale, folder: Path, found: Found, dtype: str, *, out: Path) -> None:
    # Before torch is imported, which reads these settings once.
    prepare_environment(gpu=scale.gpus > 0)
    import transformers

    from benchmarks.gpu.models import make_model

    path = make_model(folder / "model", scale.checked, context=512)
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval().to(scale.device)
    engine = _engine(path, scale, dtype)
    prompts = {f"r{i}": [2 + (7 * i + 3 * j) % 250 for j in range(12 + i)] for i in
               range(scale.requests)}  # fmt: skip
    for name, ids in prompts.items():
        engine.submit(name, ids, None)
    torture = _Torture(engine, model, dtype, scale.swaps)
    done = torture.until_done()
    engine.close()
    found.at_most("canary, nats", max(torture.canaries), LIMITS[dtype])
    errors = torture.errors(done, prompts)
    found.at_least("completions of the newest version", len(errors), 1)
    found.at_most("tokens of the newest version, nats", max(errors, default=9e9), LIMITS[dtype])
    median = sorted(torture.steps)[len(torture.steps) // 2]
    # Between two steps: at most one engine step, or 10 ms where steps are shorter than that.
    found.at_most(
        "longest pause, s", max(torture.pauses), max(median, 0.010) if scale.gpus else None
    )
    found.figures |= {
        "step_p50_s": median,
        "pause_p50_s": sorted(torture.pauses)[len(torture.pauses) // 2],
        "swaps": torture.version,
    }


def _engine(path: Path, scale: Scale, dtype: str) -> Any:
    from actors.settings import EngineSettings

    settings = EngineSettings(
        model_path=str(path),
        dtype=dtype,
        max_tokens=scale.answer_tokens,
        stop_token_ids=(),
        max_running=scale.requests,
        max_model_len=scale.answer_tokens + 56,
        gpu_memory_fraction=0.2,
        decode_steps=1,  # on a CPU: a swap between any two tokens
    )
    return make_engine("vllm", settings)


class _Torture:
    """Decodes, and swaps in other weights after every few steps."""

    def __init__(self, engine: Any, model: Any, dtype: str, swaps: int) -> None:
        self._engine, self._model, self._dtype, self._swaps = engine, model, dtype, swaps
        self.version = 0
        self.steps, self.pauses = list[float](), list[float]()
        self.canaries = list[float]()

    def until_done(self) -> dict[str, Completion]:
        done: dict[str, Completion] = {}
        while self._engine.unfinished:
            for _ in range(STEPS_BETWEEN_SWAPS):
                began = time.perf_counter()
                done.update(self._engine.step())
                self.steps.append(time.perf_counter() - began)
            if self.version < self._swaps and self._engine.unfinished:
                self._swap()
        return done

    def _swap(self) -> None:
        import torch

        self.version += 1
        self._disturb()
        wanted = getattr(torch, self._dtype)
        tensors = {name: p.detach().to(wanted) for name, p in self._model.named_parameters()}
        self._engine.stage(tensors.items(), self.version)
        began = time.perf_counter()
        self._engine.swap(self.version)
        torch.accelerator.synchronize() if torch.accelerator.is_available() else None
        self.pauses.append(time.perf_counter() - began)
        self._engine.prove()
        ids = list(range(5, 45))
        got = torch.tensor(self._engine.sequence_logprobs(ids))
        self.canaries.append(float((got - self._logp(ids)).abs().max()))

    def _disturb(self) -> None:
        import torch

        with torch.no_grad():
            device = next(self._model.parameters()).device
            generator = torch.Generator(device=device).manual_seed(self.version)
            for parameter in self._model.parameters():
                shape = parameter.shape
                noise = torch.randn(shape, generator=generator, device=device)
                parameter.add_(0.02 * noise)
                # Rounded here too: model and engine hold the same numbers.
                parameter.copy_(parameter.to(getattr(torch, self._dtype)))

    def _logp(self, ids: list[int]) -> Any:
        import torch

        with torch.no_grad():
            tokens = torch.tensor([ids], device=next(self._model.parameters()).device)
            scores = torch.log_softmax(self._model(tokens).logits[0, :-1].float(), -1)
            return scores.gather(1, tokens[0, 1:, None])[:, 0].cpu()

    def errors(self, done: dict[str, Completion], prompts: dict[str, list[int]]) -> list[float]:
        """Largest difference of each completion that ended under the newest version, there."""
        import torch

        found = []
        for name, completion in done.items():
            span = completion.versions[-1]
            if span.version != self.version:
                continue
            exact = self._logp(prompts[name] + list(completion.token_ids))
            exact = exact[len(prompts[name]) - 1 :]
            recorded = torch.tensor(list(completion.logprobs))
            found.append(float((exact - recorded)[span.start : span.end].abs().max()))
        return found
