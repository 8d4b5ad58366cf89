"""Small things several stages need."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.contracts.config import ModelConfig, RolloutConfig, Section
from cluster.contracts.errors import BadReward, UserError
from cluster.runs import Run


class MonotonicClock:
    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


@contextmanager
def recorded(run: Run, *, fresh: bool = True) -> Iterator[None]:
    """The manifest's status tells how the command ended.

    A mistake of the user's that shows before anything was done leaves no directory behind
    (``fresh``: it was made by this command), so that the corrected command may use the same name.
    """
    try:
        yield
    except KeyboardInterrupt:
        run.update_manifest(status="interrupted")
        raise
    except BaseException as problem:
        if not run.path.exists() or run_status(run) == "failed":
            raise  # recorded further in
        if fresh and isinstance(problem, UserError | BadReward) and not _has_results(run):
            shutil.rmtree(run.path)
        else:
            run.event("run_failed", cause=str(problem))
            run.update_manifest(status="failed")
        raise
    run.update_manifest(status="finished")


def open_run(path: str, command: str) -> Run:
    """The run to be continued. Raises UserError when another command made it."""
    run = Run.open(path)
    made_by = _manifest(run)["command"]
    if made_by != command:
        raise UserError(
            f"is a run of `accord {made_by}`, not of `accord {command}`",
            where=path,
            fix=f"give a run directory that `accord {command}` made",
        )
    return run


def run_status(run: Run) -> str:
    return str(_manifest(run)["status"])


def refuse_changes(before: Section, after: Section, path: str, free: Collection[str]) -> None:
    """Raise UserError naming settings that differ; ``free``: sections and section.key that may."""
    changed = []
    for section in type(after).model_fields:
        old, new = getattr(before, section), getattr(after, section)
        if section in free or old == new:
            continue
        if not isinstance(new, Section):
            changed.append(section)
            continue
        keys = [key for key in type(new).model_fields if getattr(old, key) != getattr(new, key)]
        changed += [f"{section}.{key}" for key in keys if f"{section}.{key}" not in free]
    if changed:
        raise UserError(
            f"these settings cannot change on resume: {', '.join(changed)}",
            where=path,
            fix="start a new run from its policy/, or leave them out",
        )


def _manifest(run: Run) -> dict[str, Any]:
    path = run.path / "manifest.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {"command": content["command"], "status": content["status"], **content}
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(
            f"is damaged: {problem!r}", where=str(path), fix="restore it, or start a new run"
        ) from None


def _has_results(run: Run) -> bool:
    metrics = run.path / "metrics.jsonl"
    return (run.path / "checkpoints").exists() or (metrics.exists() and metrics.stat().st_size > 0)


def prompt_room(model: ModelConfig, max_tokens: int) -> int | None:
    """Tokens the model's context leaves for a prompt beside ``max_tokens`` of answer, None when it
    is not known. Raises UserError when that is nothing."""
    context = context_length(model)
    if context is None:
        return None
    room = context - max_tokens
    if room < 1:
        raise UserError(
            f"rollout.max_tokens = {max_tokens} leaves no room for a prompt in the model's context "
            f"of {context} tokens",
            where=model.path,
            fix="lower rollout.max_tokens",
        )
    return room


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
        min_tokens=rollout.min_tokens,
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
