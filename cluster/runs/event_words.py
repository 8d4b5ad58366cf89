"""What a person should know at once of what happens to a run, in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Detail = Mapping[str, Any]


def words_for(kind: str, detail: Detail) -> str | None:
    """Of an event and its detail; None where events.jsonl is enough."""
    words = _WORDS.get(kind)
    return None if words is None else words(detail)


def _worker(detail: Detail) -> str:
    return f"{detail['worker']}: {detail['cause']}"


def _worker_serving(detail: Detail) -> str | None:
    return str(detail["note"]) if detail.get("note") else None


def _started_again(role: str) -> Callable[[Detail], str]:
    def words(detail: Detail) -> str:
        return f"the {role} is lost and started again: {str(detail['cause']).splitlines()[0]}"

    return words


def _learner_replaced(detail: Detail) -> str:
    version, seconds = detail["version"], detail["seconds"]
    return f"another learner goes on at version {version}, after {seconds:.1f} s"


def _rolled_back(detail: Detail) -> str:
    step, cause = detail["step"], detail["cause"]
    return f"the run goes back to step {step}, its newest checkpoint: {cause}"


def _gone_back(detail: Detail) -> str:
    return (
        f"the run goes on at step {detail['step']} with the weights of {detail['checkpoint']}, "
        f"as {detail['alarm']} asks; {detail['dropped']} groups are dropped"
    )


def _stalled(detail: Detail) -> str:
    where = detail.get("file") or f"no file could be written ({detail.get('cause')})"
    idle_s, waits_for = detail["idle_s"], detail["waits_for"]
    return f"nothing has moved for {idle_s} s; waiting for {waits_for}: {where}"


def _workers_missing(detail: Detail) -> str:
    serving, least = detail["serving"], detail["min_workers"]
    return f"{serving} of at least {least} workers serve: {detail['cause']}"


def _prompt_set_aside(detail: Detail) -> str:
    return f"{detail['where'] or detail['prompt']}: set aside, {detail['cause']}"


def _rollouts_not_written(detail: Detail) -> str:
    return f"training goes on without rollouts on disk: {detail['cause']}"


def _rollouts_written_again(detail: Detail) -> str:
    return f"rollouts are written again; those of {detail['missing']} steps are missing"


def _sink_failed(detail: Detail) -> str:
    return (
        f"training goes on, but {detail['sink']} does not take the numbers of step "
        f"{detail['step']}: {detail['cause']}"
    )


def _sink_recovered(detail: Detail) -> str:
    return f"{detail['sink']} takes numbers again, after {detail['failures']} failures"


def _learner_out_of_memory(detail: Detail) -> str:
    return (
        f"step {detail['step']} did not fit into the learner's memory; it was trained with "
        f"learner.tokens_per_microbatch = {detail['tokens_per_microbatch']}. Set the key to this "
        "value to save the attempts that fail"
    )


def _checkpoint_failed(detail: Detail) -> str:
    return (
        f"no checkpoint was written at step {detail['step']}; training goes on, and the next "
        f"interval tries again: {detail['cause']}"
    )


def _cores_dealt_out(detail: Detail) -> str:
    return f"step {detail['step']}: {cores_text(detail['cores'])}: {detail['why']}"


def cores_text(rows: Any) -> str:
    """Who runs on which cores, of the event `cores_dealt_out` in a line. The rows are taken as they
    come: they may be another release's."""
    found = rows if isinstance(rows, list) else []
    told = [row for row in found if isinstance(row, dict) and isinstance(row.get("roles"), list)]
    return "; ".join(
        f"{row.get('cores')}: {', '.join(map(str, row['roles'])) or 'nobody'}" for row in told
    )


def _evaluated(detail: Detail) -> str:
    step = detail["step"]
    if detail["problem"] is not None:
        return f"evaluation of step {step}: no scores; training goes on: {detail['problem']}"
    parts = [f"score {detail['score']:+.4g} ({detail['judge']})"]
    if detail["win_rate"] is not None:
        interval = f"{detail['ci_low']:.0%} to {detail['ci_high']:.0%}"
        parts.append(f"win rate against the start {detail['win_rate']:.0%} ({interval})")
    if detail["kl"] is not None:
        parts.append(f"KL {detail['kl']:.3g}")
    parts.append(f"{detail['length']:.0f} tokens")
    parts += ["the best so far"] * bool(detail["best"])
    return f"evaluation of step {step}: {', '.join(parts)}"


_WORDS: Mapping[str, Callable[[Detail], str | None]] = {
    "worker_serving": _worker_serving,
    "worker_lost": _worker,
    "worker_not_joined": _worker,
    "worker_broken": _worker,
    "learner_lost": _started_again("learner"),
    "reward_service_lost": _started_again("reward service"),
    "learner_replaced": _learner_replaced,
    "rolled_back": _rolled_back,
    "gone_back": _gone_back,
    "stalled": _stalled,
    "workers_missing": _workers_missing,
    "prompt_set_aside": _prompt_set_aside,
    "rollouts_not_written": _rollouts_not_written,
    "rollouts_written_again": _rollouts_written_again,
    "sink_failed": _sink_failed,
    "sink_recovered": _sink_recovered,
    "learner_out_of_memory": _learner_out_of_memory,
    "checkpoint_failed": _checkpoint_failed,
    "evaluated": _evaluated,
    "cores_dealt_out": _cores_dealt_out,
}
