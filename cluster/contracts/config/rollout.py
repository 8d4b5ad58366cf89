"""Prompts, and how answers to them are sampled."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cluster.contracts.config.base import DType, Section, auto


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
        description="Leave out rows that cannot be read (counted and reported) instead of "
        "stopping at the first.",
    )
    skip_long_prompts: bool = Field(
        False, description="Leave out prompts over the limit (counted and reported) instead."
    )
    shuffle: bool = Field(True, description="A new seeded order each epoch.")


LEAST_TEMPERATURE = 1e-4
"""Below it vLLM takes the most probable token, whatever limits there are."""


class RolloutConfig(Section):
    workers: int = Field(1, ge=1, description="Rollout workers at the start.")
    engine: Literal["auto", "vllm", "transformers"] = Field(
        "auto", description="auto: vllm where it has a build, else transformers (announced)."
    )
    dtype: DType = auto(
        "float32",
        rule="bfloat16 on a GPU, float32 on a CPU",
        description="Type the engine computes in.",
    )
    temperature: float = Field(
        1.0, gt=0, description="Sampling temperature, the same in the learner."
    )
    max_tokens: int = auto(
        64,
        rule="what the model's context leaves beside the longest prompt, at most 256",
        ge=1,
        description="Longest completion, in tokens.",
    )
    min_tokens: int = Field(
        0,
        ge=0,
        description="Shortest completion, in tokens: before it no end can be sampled.",
    )
    top_k: int = Field(
        0,
        ge=0,
        description="Sample from the so many most probable tokens only; 0: from all. In training "
        "each token carries the ids it was sampled from: 4 bytes times top_k per token.",
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Sample from the most probable tokens that together make up this much of the "
        "probability; 1: from all. Training needs top_k beside it, as a bound.",
    )
    min_p: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Sample from tokens at least this many times as probable as the most probable "
        "one; 0: from all. Training needs top_k beside it, as a bound.",
    )
    allowed_tokens: tuple[int, ...] = Field(
        (),
        description="Token ids of which completions may consist, the end token among them; empty: "
        "all tokens.",
    )
    banned_tokens: tuple[int, ...] = Field(
        (), description="Token ids that are never sampled; empty: none."
    )
    stop: tuple[str, ...] = Field(
        (),
        description="Strings that end a completion, as an end token does. Their tokens stay in it "
        "and are trained; its text ends before them.",
    )
    max_running: int = auto(
        64,
        rule="a worker's part of all completions that may be outstanding, at most 64 on a CPU and "
        "512 on a GPU, and no more than its cache holds at full length",
        ge=1,
        description="Sequences that one worker decodes at once.",
    )
    kv_cache_mb: int = auto(
        64,
        rule="max_running sequences at full length, at least 64, at most a quarter of the "
        "machine's memory for all workers",
        ge=8,
        description="Key-value cache of a CPU engine, in MiB.",
    )
    gpu_memory_fraction: float = auto(
        0.45,
        rule="0.9 of a GPU of its own, 0.45 where the learner is on the same GPU, divided by the "
        "workers on it; less a second copy of the weights, which a weight update stages",
        gt=0,
        le=0.95,
        description="Share of a GPU's memory that one engine takes.",
    )
    block_size: int = Field(
        32, description="Tokens of a cache block; prefixes are shared by block."
    )
    tensor_parallel: int = Field(1, ge=1, description="GPUs of one worker.")
    cpus: float = auto(
        1,
        rule="1 for a model below 50 million parameters and on a GPU; else half of the cores, "
        "divided by the workers, at most 16",
        gt=0,
        description="CPU cores of one worker.",
    )
    gpus: float = auto(
        0,
        rule="0 without a GPU; a GPU for each worker and learner process where there are enough; "
        "else a share",
        ge=0,
        description="GPUs of one worker.",
    )
    kv_on_swap: Literal["recompute", "keep"] = Field(
        "recompute",
        description="Cache of requests in flight at a weight swap: recomputed under the new "
        "weights, or kept (faster; log-probabilities recorded are the behaviour's in both cases).",
    )
    start_timeout_s: float = Field(
        180, gt=0, description="A worker not ready after so many seconds is an error."
    )
    stall_timeout_s: float = Field(
        120,
        gt=0,
        description="A busy worker that finishes nothing for so many seconds is replaced.",
    )
    request_seeds: bool = Field(
        False,
        description="Each sample's randomness depends on the run's seed, its group and its place "
        "alone, not on which worker draws it; slower on CPU.",
    )
    max_restarts: int = Field(3, ge=0, description="Restarts of one worker before the run stops.")

    @model_validator(mode="after")
    def _check(self) -> RolloutConfig:
        if self.temperature < LEAST_TEMPERATURE and self.limits_tokens:
            raise ValueError(
                f"temperature = {self.temperature} is as good as none: an engine then takes the "
                f"most probable token and applies no limits. Set it to {LEAST_TEMPERATURE} or more"
            )
        if "" in self.stop:
            raise ValueError("stop holds an empty string: it would end every completion at once")
        if self.min_tokens > self.max_tokens and "max_tokens" in self.model_fields_set:
            raise ValueError(
                f"min_tokens = {self.min_tokens} is over max_tokens = {self.max_tokens}"
            )
        return self

    @property
    def limits_tokens(self) -> bool:
        """Whether anything but the temperature shapes what can be sampled."""
        varies = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        return bool(varies or self.allowed_tokens or self.banned_tokens or self.min_tokens)
