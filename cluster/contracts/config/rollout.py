"""Prompts, and how answers to them are sampled."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cluster.contracts.config.base import (
    DType,
    Labels,
    Resources,
    Section,
    auto,
    labels,
    resources,
)


class DataConfig(Section):
    prompts: str = Field(
        description="File of prompts (JSONL, JSON, CSV, TSV or Parquet, also .gz), or "
        "`datasets:NAME`."
    )
    split: str = Field("train", description="Split of `datasets:NAME`.")
    prompt_key: str = Field("", description="Column with the prompt. Empty: Accord finds it.")
    max_prompt_tokens: int = Field(
        512,
        ge=1,
        description="Longest prompt, in tokens. A longer one is an error that names its row.",
    )
    skip_bad_rows: bool = Field(
        False,
        description="Leave out and count the rows that cannot be read, instead of stopping at "
        "the first.",
    )
    skip_long_prompts: bool = Field(
        False,
        description="Leave out and count the prompts over `max_prompt_tokens`, instead of "
        "stopping at the first.",
    )
    shuffle: bool = Field(
        True, description="Shuffle the prompts anew in every pass over them, by the seed."
    )


LEAST_TEMPERATURE = 1e-4
"""Below it vLLM takes the most probable token, whatever limits there are."""


class RolloutConfig(Section):
    workers: int = Field(1, ge=1, description="Number of rollout workers at the start.")
    engine: Literal["auto", "vllm", "transformers"] = Field(
        "auto", description="auto: vLLM if it is installed, else transformers. The run says so."
    )
    dtype: DType = auto(
        "float32",
        rule="bfloat16 on a GPU that has it; on a CPU whichever was measured to be faster",
        description="Number type that the engine computes in.",
    )
    quantization: Literal["none", "int8", "fp8"] = Field(
        "none",
        description="Number type of the engine's matrices (vLLM only, in training). none: that of "
        "`dtype`. int8, fp8: 8 bits with a scale per row, activations per token; embeddings, head "
        "and norms stay in `dtype`. It is faster, and less exact: use it with "
        "`staleness.correction` = 'token-tis' and watch `monitors.engine_mismatch`. fp8 needs a "
        "GPU.",
    )
    temperature: float = Field(
        1.0, gt=0, description="Sampling temperature. The learner uses it too."
    )
    max_tokens: int = auto(
        64,
        rule="what the model's context leaves beside the longest prompt, at most 256 on a CPU and "
        "1024 on a GPU",
        ge=1,
        description="Longest completion, in tokens.",
    )
    min_tokens: int = Field(
        0,
        ge=0,
        description="Shortest completion, in tokens. The policy cannot end it earlier.",
    )
    top_k: int = Field(
        0,
        ge=0,
        description="Sample only from the `top_k` most probable tokens. 0: from all. In "
        "training each token then carries the ids it was sampled from: 4 bytes "
        "times `top_k`.",
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Sample only from the most probable tokens whose probabilities add up to "
        "this. 1: from all. Training also needs `top_k`, which limits their number.",
    )
    min_p: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Sample only from tokens at least this many times as probable as the most "
        "probable one. 0: from all. Training also needs `top_k`, which limits their "
        "number.",
    )
    allowed_tokens: tuple[int, ...] = Field(
        (),
        description="Ids of the only tokens that may be sampled. Include the end token. Empty: "
        "all.",
    )
    banned_tokens: tuple[int, ...] = Field((), description="Ids of tokens that are never sampled.")
    stop: tuple[str, ...] = Field(
        (),
        description="Strings that end a completion, as an end token does. Their tokens belong "
        "to the completion and are trained. The text ends before them.",
    )
    max_running: int = auto(
        64,
        rule="the worker's share of all completions that can be in flight; at most 64 on "
        "a CPU and 512 on a GPU, and no more than its cache holds at full length",
        ge=1,
        description="Most sequences that one worker decodes at once.",
    )
    kv_cache_mb: int = auto(
        64,
        rule="room for `max_running` sequences at full length; at least 64, and for all "
        "workers together at most a quarter of the machine's memory (on a GPU: what "
        "`gpu_memory_fraction` leaves)",
        ge=8,
        description="Key-value cache of one worker, in MiB: on a CPU, and on a GPU that it shares "
        "(`gpus` below 1). A worker with a GPU of its own takes what `gpu_memory_fraction` "
        "leaves.",
    )
    gpu_memory_fraction: float = auto(
        0.45,
        rule="0.9 of a GPU without the learner, 0.45 of a GPU with it, divided by the "
        "workers on that GPU; less room for the second copy of the weights that a "
        "weight update needs",
        gt=0,
        le=0.95,
        description="Share of a GPU's memory that one worker takes.",
    )
    block_size: int = Field(
        32,
        description="Tokens per block of the key-value cache. Completions share a cached prefix "
        "in whole blocks.",
    )
    tensor_parallel: int = Field(
        1, ge=1, description="Number of GPUs over which one worker splits the model."
    )
    cpus: float = auto(
        1,
        rule="1 for a model below 50 million parameters, and on a GPU; else half of the "
        "cores divided by the workers, at most 16",
        gt=0,
        description="CPU cores of one worker.",
    )
    gpus: float = auto(
        0,
        rule="0 without a GPU; `tensor_parallel` if there are enough for all workers and "
        "learner processes; else a share of one",
        ge=0,
        description="GPUs that Ray reserves for one worker. Below 1, workers share one.",
    )
    resources: Resources = resources("a worker")
    labels: Labels = labels("a worker")
    kv_on_swap: Literal["recompute", "keep"] = Field(
        "recompute",
        description="What happens to the key-value cache of unfinished completions when new "
        "weights come. recompute: it is computed again with them. keep: it stays, "
        "which is faster. In both cases the recorded log-probabilities are those "
        "that the token was sampled with.",
    )
    start_timeout_s: float = Field(
        180,
        gt=0,
        description="A worker that is not ready this many seconds after its process has begun "
        "could not start. The time that it waits for room on the cluster does not count.",
    )
    stall_timeout_s: float = Field(
        120,
        gt=0,
        description="A worker that has work and samples no token for this many seconds is "
        "replaced.",
    )
    request_timeout_s: float = Field(
        7200,
        ge=0,
        description="A completion that is not finished this many seconds after its engine was "
        "given it is aborted, with its whole group. The group is given out once more. If it is "
        "late again, its prompt is set aside. 0: no limit.",
    )
    min_workers: int = Field(
        1,
        ge=0,
        description="The run goes on while at least this many workers serve. With fewer it gives "
        "out no prompts and waits for workers.",
    )
    max_workers: int | None = Field(
        None, ge=1, description="Most rollout workers that `autoscale` asks for."
    )
    autoscale: bool = Field(
        False,
        description="Change the number of workers by itself, within `min_workers` and "
        "`max_workers`: more while the learner waits for completions, fewer while the workers "
        "have no work. Where Ray has an autoscaler, ask it for the machines. "
        "`accord scale RUN N` overrules it, `accord scale RUN auto` gives it the choice again.",
    )
    workers_timeout_s: float = Field(
        1800,
        ge=0,
        description="The run writes a checkpoint and ends when fewer than `min_workers` have "
        "served for this many seconds. 0: it waits for ever.",
    )
    request_seeds: bool = Field(
        False,
        description="The randomness of a completion depends only on the run's seed, its group "
        "and its place in the group, not on the worker that samples it. vLLM's own loop and "
        "sampler are used, which are slower on a CPU.",
    )
    max_restarts: int = Field(
        3,
        ge=0,
        description="Most restarts of one worker within ten minutes. After one more loss the "
        "run goes on without this worker for ten minutes, and ends when it cannot have "
        "`min_workers` without it. A lost machine does not count.",
    )

    @model_validator(mode="after")
    def _check(self) -> RolloutConfig:
        if self.temperature < LEAST_TEMPERATURE and self.limits_tokens:
            raise ValueError(
                f"temperature = {self.temperature} is as good as none: an engine then takes the "
                f"most probable token and applies no limits. Set it to {LEAST_TEMPERATURE} or more"
            )
        if "" in self.stop:
            raise ValueError("stop holds an empty string: it would end every completion at once")
        if self.autoscale and (self.max_workers or 0) < max(1, self.min_workers):
            raise ValueError(
                "autoscale = true needs max_workers, the most workers it may ask for, and not "
                f"below min_workers = {self.min_workers}"
            )
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
