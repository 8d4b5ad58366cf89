"""What a run came to, in one sentence, and what to look at before trusting it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from learner.evaluation.contest_panel import ranking_verdict
from learner.evaluation.lines import series
from learner.evaluation.run_files import Row, number
from learner.evaluation.samples import TextStats

HARDLY = 0.1  # of the scores' standard deviation: a change of the mean reward that says nothing

UNFINISHED = {
    "running": "The run is not finished, or it was killed.",
    "interrupted": "The run was interrupted.",
    "waiting": "The run waits for its judge.",
    "stopped": "The run was stopped with `accord stop`.",
    "failed": "The run failed.",
}


def verdict(
    figures: Mapping[str, Any],
    manifest: Row,
    rows: Sequence[Row],
    events: Sequence[Row],
    evaluation: Row | None = None,
) -> str:
    """One or two sentences; empty where the files say nothing about a result."""
    status = str(manifest.get("status"))
    ranked = ranking_verdict(evaluation)
    result = (
        ranked or _judged(figures) or _trained(figures, rows) or _ranked(figures) or _fitted(rows)
    )
    parts = [result] if result else []
    if status in UNFINISHED:
        cause = next(
            (e.get("cause") for e in reversed(events) if e.get("kind") == "run_failed"), ""
        )
        first = str(cause).strip().split("\n")[0]
        parts.insert(0, UNFINISHED[status] + (f" Cause: {first}" if first else ""))
    return " ".join(parts)


def _judged(figures: Mapping[str, Any]) -> str:
    rate, low, high = (figures[key] for key in ("win_rate", "ci_low", "ci_high"))
    if rate is None:
        return ""
    wins = f"it wins {rate:.1%} of the comparisons"
    if low is None or high is None:
        return f"Against the baseline, the policy wins {rate:.1%} of the comparisons."
    interval = f"(95% interval {low:.1%} to {high:.1%})"
    if low > 0.5:
        return f"The policy is better than the baseline: {wins} {interval}."
    if high < 0.5:
        return f"The policy is worse than the baseline: {wins} {interval}."
    return f"No difference between policy and baseline can be told: {wins} {interval}."


def _trained(figures: Mapping[str, Any], rows: Sequence[Row]) -> str:
    first, last = figures["reward_first"], figures["reward_last"]
    if first is None or last is None:
        return ""
    deviations = series(rows, "rewards/std")[1]
    spread = max(deviations, default=0.0)
    change = last - first
    steps = figures["steps"]
    if abs(change) <= HARDLY * spread or change == 0:
        moved = f"The reward hardly changed over {steps} steps ({first:.3g} to {last:.3g})"
    else:
        word = "rose" if change > 0 else "fell"
        moved = f"The reward {word} from {first:.3g} to {last:.3g} over {steps} steps"
    kl = figures["kl_last"]
    return moved + (f", at a KL of {kl:.3g} nats per completion." if kl is not None else ".")


def _ranked(figures: Mapping[str, Any]) -> str:
    accuracy = figures["reward_model_accuracy"]
    return (
        ""
        if accuracy is None
        else f"The reward model ranks {accuracy:.1%} of held-out pairs right."
    )


def _fitted(rows: Sequence[Row]) -> str:
    for name, what in (
        ("rewards/accuracies", "share of pairs ranked right"),
        ("eval/loss", "held-out loss"),
        ("train/loss", "training loss"),
    ):
        values = series(rows, name)[1]
        if values:
            return (
                f"The {what} went from {values[0]:.3g} to {values[-1]:.3g} over {len(rows)} steps."
            )
    return ""


def alarms(events: Sequence[Row]) -> list[str]:
    """The alarms of a run's events, each with the steps it lasted."""
    found: dict[int, list[Any]] = {}
    open_at: dict[str, int] = {}
    for place, event in enumerate(events):
        if event.get("kind") != "alarm":
            continue
        name, step = str(event.get("alarm")), number(event, "step")
        if event.get("change") == "start":
            open_at[name] = place
            found[place] = [step, None, str(event.get("text", name))]
        elif event.get("change") == "again" and name in open_at:
            found[open_at[name]][2] += f" At step {step:.0f}: {event.get('text')}"
        elif name in open_at:
            found[open_at.pop(name)][1] = step
    return [f"{_span(first, last)}: {text}" for first, last, text in found.values()]


MOST_MARKS = 20


def alarm_steps(events: Sequence[Row]) -> list[float]:
    """At which an alarm began or a monitor had the run go back, ascending; the first of many."""
    found = {
        step
        for event in events
        if event.get("kind") == "gone_back"
        or (event.get("kind") == "alarm" and event.get("change") == "start")
        if (step := number(event, "step")) is not None
    }
    return sorted(found)[:MOST_MARKS]


def _span(first: float | None, last: float | None) -> str:
    begun = "At an unknown step" if first is None else f"From step {first:.0f}"
    return f"{begun} to the end" if last is None else f"{begun} to {last:.0f}"


def warnings(
    figures: Mapping[str, Any],
    stats: tuple[TextStats, TextStats] | None,
    length_r: float | None,
    evaluation: Row | None = None,
) -> list[str]:
    """Signs that the reward was gamed, in plain words with the numbers that raised them."""
    found = []
    same = (evaluation or {}).get("judge_was_reward")
    if isinstance(same, list) and same:
        names = ", ".join(map(str, same))
        found.append(
            f"The judge ({names}) is what the policy was trained on, so the win rate says nothing "
            "about how good the policy is. Evaluate with a judge that training never used."
        )
    before, after = figures["length_first"], figures["length_last"]
    if before and after is not None and not 2 / 3 <= after / before <= 1.5:
        found.append(f"Completions went from {before:.3g} to {after:.3g} tokens on average.")
    if length_r is not None and length_r > 0.7:
        found.append(
            f"The reward follows completion length (correlation {length_r:.2f} over the steps)."
        )
    if stats and stats[1].repeated_3grams > stats[0].repeated_3grams + 0.1:
        found.append(
            f"Completions repeat themselves more: {stats[1].repeated_3grams:.0%} of their 3-grams "
            f"are repeats, {stats[0].repeated_3grams:.0%} before."
        )
    start, end = figures["reward_first"], figures["reward_last"]
    high = figures["ci_high"]
    if start is not None and end is not None and end > start and high is not None and high < 0.5:
        found.append("The training reward rose, but the judge prefers the baseline.")
    entropy = figures["entropy_first"], figures["entropy_last"]
    if entropy[0] and entropy[1] is not None and entropy[1] < 0.2 * entropy[0]:
        found.append(f"Entropy fell from {entropy[0]:.3g} to {entropy[1]:.3g} nats per token.")
    return found
