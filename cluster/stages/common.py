"""Small things several stages need."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from cluster.contracts.config import ModelConfig, RolloutConfig


class MonotonicClock:
    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def engine_settings(
    model: ModelConfig, rollout: RolloutConfig, stop_ids: tuple[int, ...], max_prompt_tokens: int
) -> Any:
    """The engine's part of a config (``actors.settings.EngineSettings``)."""
    from actors.settings import EngineSettings

    wanted = max_prompt_tokens + rollout.max_tokens
    path = Path(model.path)
    return EngineSettings(
        model_path=str(path.absolute()) if path.exists() else model.path,
        dtype=rollout.dtype,
        temperature=rollout.temperature,
        max_tokens=rollout.max_tokens,
        stop_token_ids=stop_ids,
        max_running=rollout.max_running,
        kv_cache_mb=rollout.kv_cache_mb,
        block_size=rollout.block_size,
        max_model_len=min(wanted, context_length(model) or wanted),
        kv_on_swap=rollout.kv_on_swap,
        tensor_parallel=rollout.tensor_parallel,
        gpu_memory_fraction=rollout.gpu_memory_fraction,
        trust_remote_code=model.trust_remote_code,
        revision=model.revision,
    )


def context_length(model: ModelConfig) -> int | None:
    """Most tokens the model can attend to, or None when its config does not say."""
    import transformers

    from learner.loading import explained, require_directory

    require_directory(model.path, "config.json")
    config = explained(
        lambda: transformers.AutoConfig.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        ),
        model.path,
        "model",
    )
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None
