"""Which number type a role computes in: on a GPU what the card has, on a CPU what is faster there.

Weights that an optimiser updates, its moments, logits, losses, advantages and values are float32
in either case; see docs/devices.md.
"""

from __future__ import annotations

from typing import Any

from cluster.assembly.auto.choices import Choices, Load
from cluster.assembly.model_facts import ModelFacts
from cluster.contracts.devices import NUMBER_TYPE

PAYS = 1.2
"""Products in bfloat16 that are so many times as fast make a whole step faster by a tenth at least
(`accord bench learner` has both): about half of a small model's step is products."""
TRAINED_ROWS = 512  # of a microbatch; with more, products are as fast
DECODED_ROWS = 128  # at most, of a decoding step
FIRST_WITH_BFLOAT16 = 8.0  # compute capability (Ampere)

Choice = tuple[str, str]


def _number_type(
    choices: Choices[Any], model: ModelFacts | None, *, on_gpu: bool, rows: int
) -> Choice:
    """The type, and why. rows: of the matrices that the role multiplies with the model's."""
    machine = choices.machine
    if on_gpu:
        return _of_gpu(machine.gpu_compute)
    if machine.products is None:
        return NUMBER_TYPE.cpu, "nobody measured how fast this machine multiplies"
    if model is None:
        return NUMBER_TYPE.cpu, "the model's config cannot be read"
    found = machine.products(rows, model.hidden, model.intermediate or model.hidden)
    why = f"measured: {found.describe()}; it pays from {PAYS} times"
    return ("bfloat16" if found.gain >= PAYS else "float32"), why


def _of_gpu(compute: float | None) -> Choice:
    if compute is None:
        return NUMBER_TYPE.cuda, "on a GPU"
    there = f"the GPU has compute capability {compute:g}"
    if compute < FIRST_WITH_BFLOAT16:
        return "float32", f"{there}, and bfloat16 needs {FIRST_WITH_BFLOAT16:g}"
    return NUMBER_TYPE.cuda, f"{there}, which multiplies bfloat16 at a multiple of the speed"


def choose_engine_type(choices: Choices[Any], model: ModelFacts | None, load: Load) -> None:
    """rollout.dtype."""
    if choices.is_set("rollout.dtype"):
        return
    config = choices.config
    outstanding = DECODED_ROWS if load.outstanding is None else load.outstanding
    rows = max(1, min(DECODED_ROWS, outstanding // load.engines))
    kind, why = _number_type(choices, model, on_gpu=config.rollout.gpus > 0, rows=rows)
    held = _weights_held_in_short(config)
    if held and choices.is_set("model.dtype") and config.model.dtype == "bfloat16":
        kind, why = "bfloat16", f"{held} in model.dtype, and engines have to round as it does"
    choices.settle("rollout.dtype", kind, why)


def choose_learner_type(choices: Choices[Any], model: ModelFacts | None) -> None:
    """model.dtype of a training run, once rollout.dtype is known."""
    if choices.is_set("model.dtype"):
        return
    config = choices.config
    on_gpu = config.learner.gpus > 0
    kind, why = _number_type(choices, model, on_gpu=on_gpu, rows=TRAINED_ROWS)
    held = _weights_held_in_short(config)
    if held and config.rollout.dtype == "float32":
        kind, why = "float32", f"{held} in it, and rollout.dtype is float32"
    choices.settle("model.dtype", kind, why)


def choose_training_type(choices: Choices[Any], model: ModelFacts | None) -> None:
    """model.dtype of SFT, a reward model or DPO: they compute on a GPU where there is one."""
    if not choices.is_set("model.dtype"):
        on_gpu = choices.machine.gpus > 0
        kind, why = _number_type(choices, model, on_gpu=on_gpu, rows=TRAINED_ROWS)
        choices.settle("model.dtype", kind, why)


def choose_reward_type(
    choices: Choices[Any], model: ModelFacts | None, *, keeps_scores: bool
) -> None:
    """reward.dtype of a run's own services. model: the first reward model, None without one.
    keeps_scores: when they were saved, all scored in bfloat16 as in float32, nearly."""
    reward = choices.config.reward
    if choices.is_set("reward.dtype"):
        return
    if reward.address is not None or not any(s.type == "model" for s in reward.sources):
        choices.settle("reward.dtype", NUMBER_TYPE.cpu, "not used: no reward model scores here")
        return
    on_gpu = reward.device != "cpu" and (reward.gpus > 0 or reward.device == "cuda")
    if not on_gpu and not keeps_scores:
        # A reward model whose scores lie close together would be refused in bfloat16.
        why = "no reward model here is known to keep its scores in bfloat16"
        choices.settle("reward.dtype", "float32", why)
        return
    choices.settle("reward.dtype", *_number_type(choices, model, on_gpu=on_gpu, rows=TRAINED_ROWS))


def _weights_held_in_short(config: Any) -> str | None:
    """What has the learner hold weights in `model.dtype` and not only compute in it. Then it can
    not tell whether engines that compute in float32 have the right ones."""
    if getattr(config, "lora", None) is not None:
        return "[lora] holds the frozen weights"
    learner = getattr(config, "learner", None)
    if learner is not None and learner.sharding == "fsdp2":
        return "learner.sharding = 'fsdp2' gathers weights"
    return None
