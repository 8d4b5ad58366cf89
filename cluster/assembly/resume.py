"""Continuing a run of any training command, from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from cluster.contracts.callbacks import AnyCallback
from cluster.contracts.config.file import override_word
from cluster.contracts.errors import UserError
from cluster.runs.console import Reporter
from cluster.runs.view import RunView

OFFLINE = ("sft", "reward-model", "dpo")


def resume_run(
    run: RunView,
    overrides: Mapping[str, Any],
    reporter: Reporter,
    callbacks: Sequence[AnyCallback],
) -> Path:
    """The run directory, trained to its end. Raises UserError for a run that cannot be resumed."""
    command, path = str(run.manifest["command"]), str(run.path)
    words = [override_word(key, value) for key, value in overrides.items()]
    if command == "train":
        from cluster.assembly.training_resume import resume_training

        return resume_training(path, words, reporter, callbacks=callbacks)
    if command in OFFLINE:
        from cluster.assembly.offline import resume_offline

        known = cast(Literal["sft", "reward-model", "dpo"], command)
        return resume_offline(known, path, words, reporter, callbacks=callbacks)
    raise UserError(
        f"is a run of `accord {command}`, which cannot be resumed",
        where=path,
        fix=f"give a run of train, {', '.join(OFFLINE)}",
    )
