"""`accord replay`: the learner alone trains again on a run's rollouts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.assembly.recorded_steps import recorded
from cluster.assembly.run_session import open_run
from cluster.contracts.config.file import load_config
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import UserError
from cluster.contracts.records import RunState
from cluster.runs.console import Reporter, result
from cluster.runs.run import Run

if TYPE_CHECKING:
    from learner.rl.replay import Replayed
    from learner.rl.step_record import RecordedStep

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def replay_run(path: str, verify: bool, steps: int | None, reporter: Reporter) -> None:
    """Replay what the newest checkpoint has learnt, or its first ``steps`` steps.

    Raises UserError where that cannot be (no rollouts, changed settings, another command's run) and
    ``learner.rl.replay.Differs``, naming the step, where it does not give what the run gave.
    """
    run = open_run(path, "train")
    config = load_config(TrainConfig, str(run.path / "config.toml"))
    if verify and config.learner.processes > 1:
        raise UserError(
            f"was trained by {config.learner.processes} processes, whose sums a replay in one "
            "process does not repeat to the last bit",
            where=path,
            fix="replay it without --verify",
        )
    found = run.checkpoints.newest_good()
    checkpoint, state = found.path, found.state
    wanted = _steps_wanted(steps, state, path)
    recorded = _recorded_steps(run, config, state, wanted)
    # OpenMP reads them once, when torch is imported.
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(recorded[0].record.threads)))
    from learner.rl.replay import different_tensor, replay_steps
    from learner.rl.step_record import Differs
    from learner.settings import learner_settings

    reporter.say(f"replaying {wanted} of {state.step} steps of {run.path.name}")
    # Any prompt does for the canary: it changes nothing that is learnt.
    settings = learner_settings(config, canary_prompt=recorded[0].prompt, run_dir=None)
    try:
        with reporter.stage("replay", wanted) as stage:
            done = replay_steps(
                settings,
                recorded,
                state.rollbacks,
                until=wanted,
                verify=verify,
                on_step=lambda step, so_far: stage.update(step + 1, _numbers(so_far)),
            )
        if verify and wanted == state.step:
            for policy in _policies(run, checkpoint):
                if (name := different_tensor(done.policy, policy)) is not None:
                    raise Differs(f"{policy}: the replay ends with another {name}")
    except Differs as problem:
        raise Differs(f"{run.path}: {problem}{_other_versions(run)}") from problem
    _report(run, done, verify, wanted == state.step)


def _report(run: Run, done: Replayed, verify: bool, whole: bool) -> None:
    rate = _numbers(done)["perf/tokens_per_s"]
    result(
        f"{run.path.name}: {done.steps} steps, {done.tokens} tokens, {done.seconds:.1f} s in the "
        f"learner, {rate:.0f} tokens/s"
    )
    if verify:
        end = " and the policy" if whole else ""
        result(f"verified: the weights after every step{end} equal the run's, bit for bit")


def _numbers(done: Replayed) -> dict[str, float]:
    return {"perf/tokens_per_s": done.tokens / max(done.seconds, 1e-9)}


def _steps_wanted(steps: int | None, state: RunState, path: str) -> int:
    if steps is not None and steps > state.step:
        raise UserError(
            f"the newest checkpoint holds {state.step} steps, {steps} were asked for",
            where=path,
            fix=f"ask for at most --steps {state.step}",
        )
    return state.step if steps is None else steps


def _recorded_steps(
    run: Run, config: TrainConfig, state: RunState, wanted: int
) -> list[RecordedStep]:
    """The first ``wanted`` rollouts files, checked to be whole and of these settings."""
    from learner.rl.step_record import settings_digest
    from learner.settings import learner_settings

    folder = run.path / "rollouts"
    if not any(folder.glob("step-*.parquet")):
        raise UserError(
            "saved no rollouts, so there is nothing to replay",
            where=str(folder),
            fix="train with logging.save_rollouts = true",
        )
    expected = settings_digest(learner_settings(config, canary_prompt=(0,), run_dir=None))
    dropped = {int(row["group"]) for row in state.dropped}
    per_step = config.batch.prompts_per_step
    given_up = {int(row["step"]) for row in state.rollbacks}
    steps = []
    for step in range(wanted):
        if step in given_up:  # the run went back: nothing was trained on
            continue
        found = recorded(folder / f"step-{step:06d}.parquet", step)
        if found.record.settings != expected:
            raise UserError(
                f"its settings are not those step {step} was trained with",
                where=str(run.path / "config.toml"),
                fix="put the file back as the run wrote it",
            )
        groups = set(range(step * per_step, (step + 1) * per_step)) - dropped
        if groups != set(found.group_ids):
            raise UserError(
                f"holds groups {sorted(found.group_ids)}, step {step} trained on {sorted(groups)}",
                where=str(found.path),
                fix="put the file back as the run wrote it",
            )
        steps.append(found)
    return steps


def _policies(run: Run, checkpoint: Path) -> list[Path]:
    """The checkpoint's policy or adapter, and the run's own once it is finished."""
    manifest = json.loads((run.path / "manifest.json").read_text(encoding="utf-8"))
    finished = manifest.get("status") in ("finished", "stopped")
    own = [run.path / name for name in ("policy", "adapter")] if finished else []
    saved = [checkpoint / name for name in ("policy", "adapter")]
    return [folder for folder in (*saved, *own) if folder.is_dir()]


def _other_versions(run: Run) -> str:
    """What may explain a difference: other arithmetic."""
    import torch

    manifest = json.loads((run.path / "manifest.json").read_text(encoding="utf-8"))
    made_with = manifest.get("versions", {}).get("torch")
    if made_with is None or made_with == torch.__version__:
        return ""
    return f" (the run was made with torch {made_with}, this is {torch.__version__})"
