"""`accord plan --gpus`: what a run would need of each GPU, whether it fits, and what to change.

The GPUs need not be there: shapes come from a config.json, and nothing is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.assembly.auto.resolve import resolve_training
from cluster.assembly.model_facts import ModelFacts, facts_of, read_model_facts
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import UserError
from cluster.machine.hardware import Machine
from cluster.measure.sizes import Sizes, engine_sizes, learner_sizes
from cluster.runs.console import result

GB = 1 << 30
MB = 1 << 20
ROOM = 0.92
"""Share of a GPU's memory that may be planned: the rest is lost between allocations."""
MORE = (2, 4, 8, 16, 32, 64, 128)
LEAST_CACHE = 0.05
"""Share of a GPU that an engine's cache needs at least, to decode more than a few sequences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A run on given GPUs. learner, engine: of one process, and of one GPU of a worker. shared:
    whether both lie on the same GPU. problems: sentences, empty where all fits. changes: keys and
    values with which it would, on `enough` GPUs of this kind; empty where none are needed or none
    were found."""

    parameters: int
    gpu_bytes: float
    gpus: int
    wanted: int
    learner: Sizes
    engine: Sizes
    shared: bool
    problems: tuple[str, ...]
    changes: Mapping[str, Any]
    enough: int


def fit_on(
    config: TrainConfig, model: ModelFacts, gpus: int, gpu_memory_gb: float, *, advise: bool = True
) -> Fit:
    """What `config` needs on `gpus` GPUs of one kind, of which each process takes one or more."""
    machine = Machine(
        cores=64,
        memory_mb=1 << 20,
        shared_memory_mb=1 << 19,
        gpus=gpus,
        gpu_memory_mb=int(gpu_memory_gb * 1024),
    )
    resolved = resolve_training(config, machine, model).config
    room = gpu_memory_gb * GB
    learner, engine = learner_sizes(resolved, model), engine_sizes(resolved, model, room)
    engines = resolved.rollout.workers * resolved.rollout.tensor_parallel
    wanted = resolved.learner.processes + engines
    shared = 0 < resolved.learner.gpus < 1
    problems = list(_problems(resolved, learner, engine, shared, room))
    if wanted > gpus and not shared:
        problems.append(
            f"{wanted} GPUs are wanted ({resolved.learner.processes} for learner.processes, "
            f"{engines} for rollout.workers x rollout.tensor_parallel), {gpus} are there"
        )
    enough, changes = gpus, dict[str, Any]()
    if problems and advise:
        enough, changes = _changes(config, model, gpus, gpu_memory_gb)
    return Fit(
        parameters=model.parameters,
        gpu_bytes=room,
        gpus=gpus,
        wanted=wanted,
        learner=learner,
        engine=engine,
        shared=shared,
        problems=tuple(problems),
        changes=changes,
        enough=enough,
    )


def _problems(
    config: TrainConfig, learner: Sizes, engine: Sizes, shared: bool, room: float
) -> Iterator[str]:
    cache = engine.device["key-value cache (what is left)"]
    fixed = engine.total - cache
    least = LEAST_CACHE * room
    if shared and learner.total + fixed + least > ROOM * room:
        yield (
            f"learner and engine share a GPU and need {(learner.total + fixed + least) / GB:.0f} "
            f"GB of it together; {ROOM * room / GB:.0f} GB can be used"
        )
    elif learner.total > ROOM * room:
        yield (
            f"a learner process needs {learner.total / GB:.0f} GB; {ROOM * room / GB:.0f} GB of a "
            "GPU can be used"
        )
    if not shared and fixed + least > config.rollout.gpu_memory_fraction * room:
        yield (
            f"an engine needs {(fixed + least) / GB:.0f} GB of a GPU, with a cache of "
            f"{least / GB:.0f} GB; rollout.gpu_memory_fraction gives it "
            f"{config.rollout.gpu_memory_fraction * room / GB:.0f} GB"
        )


def _changes(
    config: TrainConfig, model: ModelFacts, gpus: int, gpu_memory_gb: float
) -> tuple[int, dict[str, Any]]:
    """The first of the usual combinations that fits, without the keys that are so already, and on
    how many GPUs: on more than there are only if none fits on these."""
    for count in (gpus, *(more for more in MORE if more > gpus)):
        for candidate in _candidates(config, count):
            try:
                changed = TrainConfig.model_validate(_with(config, candidate))
            except ValueError:
                continue  # what the user set does not go with it
            if not fit_on(changed, model, count, gpu_memory_gb, advise=False).problems:
                return count, {k: v for k, v in candidate.items() if _value(config, k) != v}
    return gpus, {}


def _candidates(config: TrainConfig, gpus: int) -> Iterator[dict[str, Any]]:
    """From the ones that cost least speed to those that cost most."""
    savings: tuple[dict[str, Any], ...] = (
        {},
        {"learner.gradient_checkpointing": True},
        {"learner.gradient_checkpointing": True, "learner.tokens_per_microbatch": 4096},
        {**_SMALL, "learner.optimizer": "adamw8bit"},
        {**_SMALL, "learner.offload": ["optimizer"]},
        {**_SMALL, "learner.offload": ["parameters", "activations"]},
        {**_SMALL, "lora.rank": 16},
    )
    for saving in savings:
        counts = (1, 2, 4, 8, 16, 32, 64)
        for engine in (1, 2, 4, 8):
            # What lies on hosts is better spread over as many as there are.
            for learner in counts[::-1] if "learner.offload" in saving else counts:
                if learner + engine <= gpus and learner >= config.learner.processes:
                    several: dict[str, Any] = {"learner.processes": learner}
                    if learner > 1:
                        several["learner.sharding"] = "fsdp2"
                    engines = {"rollout.workers": 1, "rollout.tensor_parallel": engine}
                    if _value(config, "weights.transport") == "shared_device":
                        engines["weights.transport"] = "collective"  # type: ignore[assignment]
                    yield {**saving, **several, **engines}


_SMALL = {"learner.gradient_checkpointing": True, "learner.tokens_per_microbatch": 4096}


def _with(config: TrainConfig, changes: Mapping[str, Any]) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    for key, value in changes.items():
        section, name = key.split(".")
        tree[section] = {**(tree.get(section) or {}), name: value}
    return tree


def _value(config: TrainConfig, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name, None)


def shapes(config: TrainConfig, model_config: str | None) -> ModelFacts:
    """Of the file, or of the config's model. Raises UserError where they cannot be read."""
    if model_config is None:
        found = read_model_facts(config.model)
        if found is None:
            raise UserError(
                "the model's config.json cannot be read, so its sizes are not known",
                where=config.model.path,
                fix="name one with --model-config, such as examples/shapes/qwen2_7b.json",
            )
        return found
    if not Path(model_config).is_file():
        raise UserError(
            "there is no such file", where=str(model_config), fix="check --model-config"
        )
    try:
        return facts_of(json.loads(Path(model_config).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as problem:
        raise UserError(
            f"is no config.json of a decoder: {problem!r}",
            where=model_config,
            fix="give the config.json of a model directory",
        ) from None


def show_fit(
    config: TrainConfig, gpus: int, gpu_memory_gb: float, model_config: str | None, as_json: bool
) -> None:
    """Print what the run needs of each GPU. Raises UserError as `shapes`."""
    fit = fit_on(config, shapes(config, model_config), gpus, gpu_memory_gb)
    if as_json:
        result(json.dumps(asdict(fit)))
        return
    for line in fit_lines(fit):
        result(line)


def fit_lines(fit: Fit) -> list[str]:
    """For people."""
    lines = [
        f"a model of {fit.parameters / 1e9:.2f} billion parameters on {fit.gpus} GPUs of "
        f"{fit.gpu_bytes / GB:.0f} GB ({fit.wanted} wanted)"
    ]
    for title, sizes in (
        ("a learner process, GB of its GPU", fit.learner),
        ("a GPU of a worker, GB", fit.engine),
    ):
        lines += ["", title, *_rows(sizes.device), f"  {'together':<36} {sizes.total / GB:8.1f}"]
        if sizes.host:
            lines += ["  in the host's memory", *_rows(sizes.host)]
    if fit.shared:
        lines += ["", "learner and worker share the only GPU"]
    lines += ["", *(fit.problems or ("fits",))]
    if fit.problems:
        words = " ".join(
            f"{k}={json.dumps(v, separators=(',', ':'))}" for k, v in fit.changes.items()
        )
        where = "" if fit.enough == fit.gpus else f" on {fit.enough} GPUs of this kind"
        lines.append(
            f"change{where}: {words}" if words else "no combination of settings makes it fit"
        )
    return lines


def _rows(sizes: Mapping[str, float]) -> list[str]:
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    return [f"  {name:<36} {size / GB:8.1f}" for name, size in ordered]
