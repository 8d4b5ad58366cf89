"""What an engine is built from, and where the randomness of a worker comes from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """One engine. ``max_model_len`` is the longest prompt plus ``max_tokens``."""

    model_path: str
    dtype: str = "float32"
    temperature: float = 1.0
    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...]
    max_running: int = 64
    kv_cache_mb: int = 64
    block_size: int = 32
    max_model_len: int
    seed: int = 0
    kv_on_swap: Literal["recompute", "keep"] = "recompute"
    tensor_parallel: int = 1
    gpu_memory_fraction: float = 0.45
    trust_remote_code: bool = False
    revision: str | None = None


def derive_seed(*parts: int | str) -> int:
    """A seed below 2**31 that differs whenever any part does.

    A worker uses (run seed, "worker", index, incarnation): with one seed for all, every worker and
    every restarted one would sample the same answers to the same prompt.
    """
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
