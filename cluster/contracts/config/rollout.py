"""Prompts, and how answers to them are sampled."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cluster.contracts.config.base import DType, Section


class DataConfig(Section):
    prompts: str = Field(
        description="File of prompts (JSONL, JSON, CSV, TSV or Parquet, also .gz), or "
        "`datasets:NAME`."
    )
    split: str = Field("train", description="Split of `datasets:NAME`.")
    prompt_key: str = Field("", description="Column with the prompt; empty: recognised by shape.")
    max_prompt_tokens: int = Field(
        512, ge=1, description="Longest prompt, in tokens; a longer one is an error naming its row."
    )
    skip_bad_rows: bool = Field(
        False,
        description="Leave rows that cannot be read out (counted and reported) instead of "
        "stopping at the first.",
    )
    skip_long_prompts: bool = Field(
        False, description="Leave prompts over the limit out (counted and reported) instead."
    )
    shuffle: bool = Field(True, description="A new seeded order each epoch.")


class RolloutConfig(Section):
    workers: int = Field(1, ge=1, description="Rollout workers at the start.")
    engine: Literal["auto", "vllm", "transformers"] = Field(
        "auto", description="auto: vllm where it has a build, else transformers (announced)."
    )
    dtype: DType = Field("float32", description="Type the engine computes in.")
    temperature: float = Field(
        1.0, gt=0, description="Sampling temperature, the same in the learner."
    )
    max_tokens: int = Field(64, ge=1, description="Longest completion, in tokens.")
    min_tokens: int = Field(
        0,
        ge=0,
        description="Shortest completion, in tokens: before it no end can be sampled.",
    )
    max_running: int = Field(64, ge=1, description="Sequences decoded at once by one worker.")
    kv_cache_mb: int = Field(64, ge=8, description="Key-value cache of a CPU engine, MiB.")
    gpu_memory_fraction: float = Field(
        0.45, gt=0, le=0.95, description="Part of a GPU's memory for its engine."
    )
    block_size: int = Field(
        32, description="Tokens of a cache block; prefixes are shared by block."
    )
    tensor_parallel: int = Field(1, ge=1, description="GPUs of one worker.")
    cpus: float = Field(1, gt=0, description="CPUs Ray reserves for one worker.")
    gpus: float = Field(0, ge=0, description="GPUs Ray reserves for one worker.")
    kv_on_swap: Literal["recompute", "keep"] = Field(
        "recompute",
        description="Cache of requests in flight at a weight swap: recomputed under the new "
        "weights, or kept (faster; log-probabilities recorded are the behaviour's in both cases).",
    )
    start_timeout_s: float = Field(180, gt=0, description="A worker not ready by then is an error.")
    stall_timeout_s: float = Field(
        120,
        gt=0,
        description="A worker that finishes nothing for this long while busy is replaced.",
    )
    request_seeds: bool = Field(
        False,
        description="Each sample's randomness depends on the run's seed, its group and its place "
        "alone, not on which worker draws it; slower on CPU.",
    )
    max_restarts: int = Field(3, ge=0, description="Restarts of one worker before the run stops.")

    @model_validator(mode="after")
    def _check(self) -> RolloutConfig:
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens = {self.min_tokens} is over max_tokens = {self.max_tokens}"
            )
        return self
