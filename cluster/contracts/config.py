"""What a user may set: one model a section, every key described where it is declared.

No torch, ray, vllm or grpc here, so that ``--help`` and a config error answer at once. A role
receives only its own section. Unknown keys are errors (``configfile`` names the nearest valid one),
nothing is repaired silently, nothing changes while a run goes on.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


DType = Literal["float32", "bfloat16"]


class RunConfig(Section):
    name: str = Field(
        "", description="Folder name of the run under `dir`; empty: made from the command and time."
    )
    dir: str = Field("runs", description="Where runs are kept.")
    seed: int = Field(0, ge=0, description="Seeds data order, initialisation and sampling.")
    parents: dict[str, str] = Field(
        default_factory=dict, description="Lineage: role -> run or model directory it came from."
    )


class ModelConfig(Section):
    path: str = Field(description="A model directory (HF layout) or a hub id.")
    revision: str | None = Field(None, description="Revision of a hub id.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")
    dtype: DType = Field(
        "float32", description="Type the learner computes in; master weights stay float32."
    )
    chat_template: str | None = Field(
        None, description="Path of a Jinja chat template, for a tokenizer that has none."
    )


class DataConfig(Section):
    prompts: str = Field(
        description="JSONL or Parquet file, or `datasets:NAME` for a datasets name."
    )
    split: str = Field("train", description="Split of a datasets name.")
    prompt_key: str = Field("", description="Column with the prompt; empty: recognised by shape.")
    max_prompt_tokens: int = Field(
        512, ge=1, description="A longer prompt is an error naming its row."
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
    max_tokens: int = Field(64, ge=1, description="Longest answer, in tokens.")
    min_tokens: int = Field(
        0,
        ge=0,
        description="Shortest answer: before it no end can be sampled (at most max_tokens).",
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


class RewardModelSource(Section):
    type: Literal["model"] = "model"
    path: str = Field(description="A reward-model directory made by `accord reward-model`.")
    weight: float = 1.0
    name: str = "model"
    normalise: bool = Field(True, description="Centre and scale as stored with the reward model.")


class FunctionSource(Section):
    type: Literal["function"] = "function"
    path: str = Field(
        description="`file.py:function`; called with lists prompts, completions and each metadata "
        "column by keyword, returns one number a completion."
    )
    weight: float = 1.0
    name: str = "function"


class RulesSource(Section):
    type: Literal["rules"] = "rules"
    min_words: int | None = None
    max_words: int | None = None
    required: list[str] = Field(
        default_factory=list, description="Regular expressions to be found."
    )
    forbidden: list[str] = Field(
        default_factory=list, description="Regular expressions not to be found."
    )
    repetition: bool = Field(False, description="Penalise the share of repeated 3-grams.")
    weight: float = 1.0
    name: str = "rules"


class GrpcSource(Section):
    type: Literal["grpc"] = "grpc"
    address: str = Field(description="host:port of a service speaking accord.reward.v1.")
    weight: float = 1.0
    name: str = "grpc"


RewardSource = Annotated[
    RewardModelSource | FunctionSource | RulesSource | GrpcSource, Field(discriminator="type")
]


class RewardConfig(Section):
    sources: list[RewardSource] = Field(
        min_length=1, description="Rewards; their weighted sum is the score."
    )
    deadline_s: float = Field(
        30, gt=0, description="Deadline of one scoring call, retries included."
    )
    max_batch: int = Field(64, ge=1, description="Most rollouts scored in one pass.")
    max_wait_ms: float = Field(5, ge=0, description="How long a batch waits to fill.")
    clip: float | None = Field(None, gt=0, description="Clip the weighted sum to ±clip.")
    address: str | None = Field(
        None,
        description="Use a running reward service instead of starting one (`accord serve-reward`).",
    )


class BatchConfig(Section):
    prompts_per_step: int = Field(32, ge=1)
    samples_per_prompt: int = Field(4, ge=1)
    steps: int = Field(100, ge=1, description="Learner steps of the run.")


class StalenessConfig(Section):
    bound: int = Field(
        2, ge=0, description="Most learner steps between sampling and training; 0: synchronous."
    )
    correction: Literal[
        "none", "decoupled", "token-tis", "sequence-tis", "token-mask", "sequence-mask"
    ] = Field("decoupled", description="Importance correction of tokens from older weights.")
    cap: float = Field(5.0, gt=1, description="Upper limit of the importance weight.")


class KLConfig(Section):
    coef: float = Field(0.05, ge=0, description="Weight of the per-token KL to the reference.")
    place: Literal["reward", "loss"] = "reward"
    estimator: Literal["k1", "k2", "k3", "k3+"] = Field(
        "k1", description="k1 belongs in the reward; in the loss use k2 or k3+ (its gradient)."
    )
    controller: Literal["fixed", "adaptive"] = "fixed"
    target: float = Field(6.0, gt=0, description="Adaptive: wanted KL, nats per answer.")
    horizon: int = Field(10000, ge=1, description="Adaptive: samples over which to correct.")


class AlgorithmConfig(Section):
    advantage: Literal["gae", "grpo", "rloo", "reinforce++", "reinforce-baseline"] = "gae"
    loss: Literal["ppo", "reinforce", "cispo", "gspo"] = "ppo"
    gamma: float = Field(1.0, gt=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    clip_low: float | None = Field(
        None,
        gt=0,
        description="Ratio clipped below 1 - this; "
        "None: the loss's own (ppo 0.2, gspo 3e-4, cispo 1.0).",
    )
    clip_high: float | None = Field(
        None,
        gt=0,
        description="Ratio clipped above 1 + this; "
        "None: the loss's own (ppo 0.2, gspo 4e-4, cispo 0.28).",
    )
    dual_clip: float | None = Field(
        None, gt=1, description="ppo only: bound of the loss where the advantage is negative."
    )
    clip_value: float = Field(0.2, gt=0)
    value_coef: float = Field(0.1, ge=0)
    entropy_coef: float = Field(0.0, ge=0)
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    scale_by_std: bool = Field(True, description="GRPO: divide by the group's standard deviation.")
    aggregate: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"] = "token-mean"
    missing_eos_penalty: float = Field(
        0.0, ge=0, description="Taken off the score of an answer that did not end by itself."
    )
    truncated: Literal["keep", "mask", "bootstrap"] = Field(
        "keep",
        description="Answers cut at max_tokens: trained as they are, left out of the loss, or "
        "continued with the value estimate (gae only).",
    )
    kl: KLConfig = KLConfig()


class LearnerConfig(Section):
    lr: float = Field(1e-5, gt=0)
    value_lr: float | None = Field(None, gt=0, description="None: as lr.")
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    max_grad_norm: float = Field(1.0, gt=0)
    epochs: int = Field(1, ge=1, description="Passes over the samples of a step.")
    minibatches: int = Field(1, ge=1, description="Optimiser steps a pass.")
    tokens_per_microbatch: int = Field(2048, ge=16, description="Padded tokens of a forward pass.")
    packing: Literal["auto", "padded", "packed"] = Field(
        "auto",
        description="Rows of a microbatch: padded to the longest, or packed end to end. auto: "
        "packed on a GPU in bfloat16 (flash attention), else padded (faster on a CPU).",
    )
    activation_memory_mb: int | None = Field(
        None,
        ge=0,
        description="With one update a step: memory for the forward pass that measures the step "
        "to wait for its loss, instead of being run twice. A step that needs more runs it twice, "
        "with the same result. None: an eighth of the machine's, a quarter of what is free on a "
        "GPU; 0: always twice.",
    )
    value_model: Literal["auto", "own", "shared"] = Field(
        "auto",
        description="auto: own network from the reward model when `value_path` is set, else "
        "a head on the policy's trunk.",
    )
    value_path: str | None = Field(None, description="Reward model the value network starts from.")
    value_warmup_steps: int = Field(0, ge=0, description="First steps train the value only.")
    reference_path: str | None = Field(
        None, description="Reference model; None: the starting policy."
    )
    gradient_checkpointing: bool = False
    compile: bool = Field(
        False,
        description="torch.compile of the models. On one CPU core a step got up to 11 % faster, "
        "after one to two minutes of compiling at the start.",
    )
    deterministic: bool = Field(False, description="Deterministic kernels (slower).")
    processes: int = Field(
        1, ge=1, description="Processes of the learner, which share the microbatches of a step."
    )
    sharding: Literal["none", "fsdp2"] = Field(
        "none",
        description="With several processes. none: each holds all weights. fsdp2: weights, "
        "gradients and optimiser state are dealt out to them (`fully_shard`).",
    )
    cpus: float = Field(1, gt=0, description="Of each process.")
    gpus: float = Field(0, ge=0, description="GPUs of each process of the learner.")
    start_timeout_s: float = Field(180, gt=0)
    step_timeout_s: float = Field(1800, gt=0)


class WeightsConfig(Section):
    transport: Literal["object_store", "disk", "collective", "shared_device"] = Field(
        "object_store",
        description="How weights travel: Ray's object store; a shared directory; NCCL between GPUs "
        "(gloo on CPU); memory of the one GPU that learner and engine share (CUDA IPC).",
    )
    canary_tolerance: float | None = Field(
        None,
        gt=0,
        description="Largest |Δlogp| of the canary; None: 1e-3 in float32, 0.5 in bfloat16.",
    )
    timeout_s: float = Field(
        120, gt=0, description="A worker not on the new weights by then is replaced."
    )


class CheckpointConfig(Section):
    every: int = Field(50, ge=1, description="Learner steps between checkpoints.")
    keep: int = Field(2, ge=1, description="Newest checkpoints kept.")


class LoggingConfig(Section):
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "accord"
    ray_metrics: bool = True
    save_rollouts: bool = Field(
        True, description="Write every trained group to rollouts/*.parquet."
    )


class ClusterConfig(Section):
    address: str | None = Field(
        None,
        description="Ray cluster to join ('auto', host:port); None: start one on this machine.",
    )
    num_cpus: int | None = Field(
        None, ge=1, description="Logical CPUs of a started cluster; None: one a core, at least 8."
    )
    object_store_mb: int = Field(256, ge=80, description="Object store of a started cluster.")
    dashboard: bool = Field(False, description="Start the Ray dashboard with a started cluster.")
    pin_cores: bool = Field(
        True, description="On one machine with few cores: each role keeps to its own core."
    )


class TrainConfig(Section):
    """`accord train`: on-line reinforcement learning."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    reward: RewardConfig
    batch: BatchConfig = BatchConfig()
    rollout: RolloutConfig = RolloutConfig()
    staleness: StalenessConfig = StalenessConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    learner: LearnerConfig = LearnerConfig()
    weights: WeightsConfig = WeightsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        problems = list(train_problems(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self


def train_problems(config: TrainConfig) -> list[str]:
    """Every cross-section problem, so that the user sees all of them at once."""
    found = []
    algorithm, batch = config.algorithm, config.batch
    groups = ("grpo", "rloo", "reinforce-baseline")
    if algorithm.advantage in groups and batch.samples_per_prompt < 2:
        found.append(
            f"algorithm.advantage = {algorithm.advantage!r} compares answers to one prompt: "
            "set batch.samples_per_prompt to 2 or more"
        )
    if algorithm.truncated == "bootstrap" and algorithm.advantage != "gae":
        found.append(
            "algorithm.truncated = 'bootstrap' needs values: set algorithm.advantage = 'gae'"
        )
    if algorithm.kl.place == "reward" and algorithm.kl.estimator != "k1":
        found.append("algorithm.kl.estimator must be 'k1' in the reward (an unbiased penalty)")
    if algorithm.kl.place == "loss" and algorithm.kl.estimator == "k1" and algorithm.kl.coef > 0:
        found.append(
            "algorithm.kl.estimator = 'k1' has no useful gradient in the loss: use 'k3+' or 'k2'"
        )
    if algorithm.dual_clip is not None and algorithm.loss != "ppo":
        found.append(
            f"algorithm.dual_clip belongs to algorithm.loss = 'ppo', not {algorithm.loss!r}"
        )
    if algorithm.loss == "reinforce" and (algorithm.clip_low or algorithm.clip_high):
        found.append(
            "algorithm.clip_low and clip_high do nothing with algorithm.loss = 'reinforce'"
        )
    samples = batch.prompts_per_step * batch.samples_per_prompt
    if config.learner.minibatches > samples:
        found.append(f"learner.minibatches is over the {samples} samples of a step")
    found += _process_problems(config.learner)
    names = [source.name for source in config.reward.sources]
    if len(set(names)) != len(names):
        found.append(f"reward.sources have the same name twice ({names}): give each a `name`")
    return found


def _process_problems(learner: LearnerConfig) -> list[str]:
    found = []
    if learner.sharding != "none" and learner.processes == 1:
        found.append(
            f"learner.sharding = {learner.sharding!r} deals weights out to several processes: set "
            "learner.processes to 2 or more, or learner.sharding = 'none'"
        )
    if learner.sharding != "none" and learner.compile:
        found.append("learner.compile cannot be had together with learner.sharding: leave one out")
    if learner.processes > 1 and 0 < learner.gpus < 1:
        found.append(
            f"learner.gpus = {learner.gpus} puts several of the {learner.processes} "
            "learner.processes on one GPU, which NCCL refuses: set learner.gpus to 1 (a GPU for "
            "each process) or learner.processes to 1"
        )
    return found


class FitConfig(Section):
    """The loop shared by SFT, reward model and DPO."""

    epochs: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=1, description="Stop after so many optimiser steps.")
    max_seconds: float | None = Field(
        None, gt=0, description="Stop after so long, with a full schedule."
    )
    lr: float = Field(1e-4, gt=0)
    warmup_ratio: float = Field(0.05, ge=0, le=1)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    max_grad_norm: float = Field(1.0, gt=0)
    rows_per_step: int = Field(32, ge=1, description="Rows of one optimiser step.")
    tokens_per_microbatch: int = Field(4096, ge=16)
    max_tokens: int = Field(
        512, ge=2, description="Longest row; longer ones are left out and counted."
    )
    eval_fraction: float = Field(0.05, ge=0, lt=1, description="Held out, by prompt hash.")
    eval_every: int = Field(100, ge=1, description="Optimiser steps between evaluations.")
    checkpoint_every: int = Field(500, ge=1)
    threads: int = Field(0, ge=0, description="Compute threads; 0: one a core.")


class SftDataConfig(Section):
    path: str = Field(
        description="JSONL or Parquet file, or `datasets:NAME`, with messages, "
        "prompt+completion or text."
    )
    split: str = "train"


class SftConfig(Section):
    """`accord sft`: supervised fine-tuning on the assistant's tokens."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: SftDataConfig
    fit: FitConfig = FitConfig()
    logging: LoggingConfig = LoggingConfig()


class PairsConfig(Section):
    path: str = Field(
        description="prompt/chosen/rejected as JSONL, Parquet or `datasets:NAME`, or a preference "
        "store (`*.db`), whose pairs are exported into the run."
    )
    split: str = "train"


class RewardModelConfig(Section):
    """`accord reward-model`: a scalar head learnt from comparisons (Bradley-Terry)."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: PairsConfig
    fit: FitConfig = FitConfig()
    use_margin: bool = Field(False, description="Subtract the annotators' strength in the loss.")
    centre_coef: float = Field(0.0, ge=0, description="Weight of (chosen + rejected)² in the loss.")
    logging: LoggingConfig = LoggingConfig()


class DpoConfig(Section):
    """`accord dpo`: direct preference optimisation."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: PairsConfig
    fit: FitConfig = FitConfig()
    beta: float = Field(0.1, gt=0)
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    logging: LoggingConfig = LoggingConfig()


class EvaluateConfig(Section):
    """`accord evaluate`: answers of two policies to the same prompts, compared."""

    run: RunConfig = RunConfig()
    policy: ModelConfig
    baseline: ModelConfig
    data: DataConfig
    judge: RewardConfig = Field(description="Scores both; training should never have seen it.")
    samples: int = Field(1, ge=1, description="Answers a prompt.")
    max_prompts: int | None = Field(None, ge=1)
    tie_margin: float = Field(0.0, ge=0, description="Scores closer than this are a tie.")
    rollout: RolloutConfig = RolloutConfig()
    cluster: ClusterConfig = ClusterConfig()
