"""How many processes train a supervised model, a reward model or DPO side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.assembly.auto.choices import Choices, counted, millions, size_of
from cluster.assembly.auto.devices import SMALL
from cluster.assembly.model_facts import ModelFacts
from cluster.contracts.config.offline import DpoConfig, RewardModelConfig, SftConfig

OfflineConfig = SftConfig | RewardModelConfig | DpoConfig

WORTH_S = 30.0
"""Estimated seconds of training from which a second process is worth its start, which takes about
five seconds of a core."""
ROWS_EACH = 8
"""Rows of a step that keep a process busy for longer than the sum of gradients takes."""
MOST = 8
_FLOPS = 5e10
"""Of one core: a third to a half of what its matrix products reach alone."""
_ROW_BYTES = 8
"""Of a row file per token: text, keys, columns that are not trained on."""
_PACKED = (".parquet", ".gz")
_PACKING = 4
"""Times that such a file is larger unpacked."""


def choose_processes(
    choices: Choices[Any],
    model: ModelFacts | None,
    rows_bytes: int | None,
    launched: int | None,
) -> None:
    """rows_bytes: of the training rows as plain text; None: not known before they are read.
    launched: the processes that torchrun has started."""
    choices.settle("fit.processes", *_processes(choices, model, rows_bytes, launched))


def _processes(
    choices: Choices[Any],
    model: ModelFacts | None,
    rows_bytes: int | None,
    launched: int | None,
) -> tuple[int, str]:
    fit, cores, size = choices.config.fit, choices.machine.cores, size_of(model)
    if launched is not None:
        return launched, "torchrun has started them"
    if choices.machine.gpus:
        return 1, "the training runs on a GPU"
    if fit.threads:
        return 1, "fit.threads says how the cores are used"
    if not size or size >= SMALL:
        what = f"of {millions(size)} parameters" if size else "of unknown size"
        return 1, f"a model {what}: its products use several threads"
    most = max(1, min(cores, fit.rows_per_step // ROWS_EACH, MOST))
    if most == 1:
        return 1, f"{counted(cores, 'core')}, {fit.rows_per_step} rows per step"
    seconds = training_seconds(choices.config, size, rows_bytes)
    if seconds is not None and seconds < WORTH_S:
        return 1, f"about {seconds:.0f} s of training, which is over before another has started"
    return most, (
        f"products of a model of {millions(size)} parameters are too small for several threads, "
        f"so each of {counted(most, 'core')} gets a process"
    )


def training_seconds(config: OfflineConfig, size: int, rows_bytes: int | None) -> float | None:
    """Of one core; good to a factor of two or three. None where nothing bounds it."""
    fit = config.fit
    bounds = [] if rows_bytes is None else [rows_bytes / _ROW_BYTES * fit.epochs]
    if fit.max_steps is not None:
        bounds.append(fit.max_steps * fit.rows_per_step * fit.max_tokens)
    seconds = [6 * size * tokens / _FLOPS for tokens in bounds]
    if fit.max_seconds is not None:
        seconds.append(fit.max_seconds)
    return min(seconds, default=None)


def bytes_of_rows(path: str) -> int | None:
    """Of a row file or a snapshot, as plain text, estimated; None for what is no file here."""
    place = Path(path)
    if place.is_dir():
        files = [file for file in place.rglob("*") if file.suffix in (*_PACKED, ".jsonl", ".arrow")]
    elif place.is_file():
        files = [place]
    else:
        return None
    return sum(file.stat().st_size * (_PACKING if file.suffix in _PACKED else 1) for file in files)
