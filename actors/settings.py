"""What an engine is built from, and where the randomness of a worker comes from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from cluster.contracts.config.base import ModelConfig
from cluster.contracts.config.rollout import RolloutConfig
from cluster.contracts.config.train import TrainConfig
from cluster.machine.shipment import known_as


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSettings:
    """The LoRA adapters of one engine. ``trained``: names of those that come as updates, all of one
    ``rank`` and ``alpha``. ``fixed``: (name, folder in peft's layout, rank) of those that stay."""

    trained: tuple[str, ...] = ()
    rank: int = 1
    alpha: float = 1.0
    fixed: tuple[tuple[str, str, int], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.trained, *(name for name, _, _ in self.fixed))

    @property
    def largest_rank(self) -> int:
        return max(self.rank, *(rank for _, _, rank in self.fixed), 1)


DECODE_STEPS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """One engine. ``max_model_len`` is the longest prompt plus ``max_tokens``.

    ``top_k`` 0, ``top_p`` 1, ``min_p`` 0 and empty ``allowed_tokens``: no limit (see
    ``actors.engines.token_limits``). ``record_token_sets``: completions say what they were sampled
    from, as the learner needs it; nobody else does. ``stop``: strings that end a completion.
    ``decode_steps``: most tokens that vLLM decodes of a sequence before it looks at requests and
    swaps again (``actors.engines.vllm_multistep``); 0: vLLM's own loop.
    ``weights``: "disk" reads those of the model's directory; "published" starts with memory as it
    is, and the engine serves nothing before it is given a version. Then no weights need be there.
    ``adapters``: requests are answered by one of these, or by the model itself; None: by the model,
    and an update is of all its weights.
    """

    model_path: str
    dtype: str = "float32"
    quantization: Literal["none", "int8", "fp8"] = "none"
    temperature: float = 1.0
    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...]
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    allowed_tokens: tuple[int, ...] = ()
    banned_tokens: tuple[int, ...] = ()
    record_token_sets: bool = True
    stop: tuple[str, ...] = ()
    max_running: int = 64
    decode_steps: int = DECODE_STEPS
    kv_cache_mb: int = 64
    block_size: int = 32
    max_model_len: int
    seed: int = 0
    kv_on_swap: Literal["recompute", "keep"] = "recompute"
    tensor_parallel: int = 1
    gpu_memory_fraction: float = 0.45
    shares_gpu: bool = False  # then its cache has `kv_cache_mb`; else what the fraction leaves
    trust_remote_code: bool = False
    revision: str | None = None
    weights: Literal["disk", "published"] = "disk"
    adapters: AdapterSettings | None = None

    def with_paths(self, here: Callable[[str], str]) -> EngineSettings:
        """For a worker's process: with the paths at which its host has model and adapters."""
        adapters = self.adapters
        if adapters is not None:
            fixed = tuple((name, here(folder), rank) for name, folder, rank in adapters.fixed)
            adapters = replace(adapters, fixed=fixed)
        return replace(self, model_path=here(self.model_path), adapters=adapters)

    @property
    def precision(self) -> str:
        """What its rounding noise depends on."""
        return self.dtype if self.quantization == "none" else self.quantization

    @property
    def limits_tokens(self) -> bool:
        """Whether anything but the temperature shapes what can be sampled."""
        varies = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        early = self.min_tokens > 0 and bool(self.stop_token_ids)
        return bool(varies or early or self.allowed_tokens or self.banned_tokens)


def adapter_settings(config: TrainConfig) -> AdapterSettings | None:
    """The adapters of `[[policies]]`, None where a run has one policy."""
    if not config.policies or config.lora is None:
        return None
    return AdapterSettings(
        trained=tuple(policy.name for policy in config.policies),
        rank=config.lora.rank,
        alpha=config.lora.scale * config.lora.rank,
    )


def derive_seed(*parts: int | str) -> int:
    """A seed below 2**31 that differs whenever any part does.

    A worker uses (run seed, "worker", index, incarnation): with one seed for all, every worker and
    every restarted one would sample the same answers to the same prompt.
    """
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def engine_settings(
    model: ModelConfig,
    rollout: RolloutConfig,
    stop_ids: tuple[int, ...],
    max_prompt_tokens: int,
    context: int | None,
) -> EngineSettings:
    """The engine's part of a config. context: tokens the model can attend to, None unknown."""
    wanted = max_prompt_tokens + rollout.max_tokens
    return EngineSettings(
        model_path=known_as(model.path),
        dtype=rollout.dtype,
        quantization=rollout.quantization,
        temperature=rollout.temperature,
        max_tokens=rollout.max_tokens,
        min_tokens=rollout.min_tokens,
        stop_token_ids=stop_ids,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        min_p=rollout.min_p,
        allowed_tokens=rollout.allowed_tokens,
        banned_tokens=rollout.banned_tokens,
        stop=rollout.stop,
        max_running=rollout.max_running,
        kv_cache_mb=rollout.kv_cache_mb,
        block_size=rollout.block_size,
        max_model_len=min(wanted, context or wanted),
        kv_on_swap=rollout.kv_on_swap,
        tensor_parallel=rollout.tensor_parallel,
        gpu_memory_fraction=rollout.gpu_memory_fraction,
        shares_gpu=0 < rollout.gpus < 1,
        trust_remote_code=model.trust_remote_code,
        revision=model.revision,
        # Seeds of one's own ask for what vLLM itself samples with them, to the last bit.
        decode_steps=0 if rollout.request_seeds else DECODE_STEPS,
    )
