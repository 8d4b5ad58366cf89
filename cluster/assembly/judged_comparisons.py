"""Judged comparisons of policies -> the record in evaluation.json: win rates, a ranking, results by
category and by turn. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.assembly.contest import Comparison, Written
from cluster.contracts.config.evaluate import BASELINE, POLICY, EvaluateConfig
from cluster.contracts.errors import UserError
from learner.evaluation.ranking import Outcome, ranking
from learner.evaluation.win_rate import length_controlled, outcomes, win_rate

Scores = tuple[float, float]
TIE: Scores = (0.5, 0.5)


@dataclass(frozen=True, slots=True)
class Judged:
    """``scores``: of the left and the right completion of each comparison, None where it was not
    judged. An AI judge and people give 1 to what they prefer, 0 to the other, 0.5 each for a tie.
    ``record``: what evaluation.json says of the judge."""

    scores: Sequence[Scores | None]
    record: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Result:
    comparison: Comparison
    scores: Scores


def evaluation_record(
    config: EvaluateConfig, written: Written, compared: Sequence[Comparison], judged: Judged
) -> dict[str, Any]:
    """Raises UserError where no comparison was judged."""
    results = [
        Result(comparison, scores)
        for comparison, scores in zip(compared, judged.scores, strict=True)
        if scores is not None
    ]
    if not results:
        raise UserError(
            "no comparison has a label: all were skipped or flagged",
            where=str(judged.record.get("judge", "")),
            fix="put them back on the admin page of `accord label`, and run the same command again",
        )
    names = written.names
    policies = [
        _policy(written, n, results, config.contestants[name].path) for n, name in enumerate(names)
    ]
    record: dict[str, Any] = {**judged.record, "not_judged": len(compared) - len(results)}
    if config.policies:
        record |= {"policies": policies, "ranking": _ranking(config, names, results)}
        record["comparisons"] = [
            {"policy": names[left], "baseline": names[right], **_pair(config, written, own)}
            for (left, right), own in _by(results, lambda c: (c.left, c.right)).items()
        ]
    else:
        record |= _pair(config, written, results)
        for name, policy in zip((POLICY, BASELINE), policies, strict=True):
            record[name] = policy["path"]
            for key in ("mean_score", "mean_length"):
                record[f"{key}_{name}"] = policy[key]
    categories = _by(results, lambda c: c.category)
    if any(categories):
        record["categories"] = {
            name or "(none)": _by_policy(config, names, own)
            for name, own in sorted(categories.items())
        }
    turns = _by(results, lambda c: c.turn)
    if len(turns) > 1:
        record["turns"] = {
            str(turn + 1): _by_policy(config, names, own) for turn, own in sorted(turns.items())
        }
    return record


def result_line(record: Mapping[str, Any]) -> str:
    """For a person who waits for the result."""
    if "ranking" in record:
        rows = [
            f"{place}. {one['policy']} {one['rating']:+.0f} ({one['ci_low']:+.0f} to "
            f"{one['ci_high']:+.0f}), win rate {one['win_rate']:.1%}"
            for place, one in enumerate(record["ranking"], start=1)
        ]
        return "rating (95 % interval): " + "; ".join(rows)
    return (
        f"win rate {record['win_rate']:.1%} (95 % interval {record['ci_low']:.1%} to "
        f"{record['ci_high']:.1%}; {record['wins']} wins, {record['ties']} ties, "
        f"{record['losses']} losses)"
    )


def _policy(written: Written, policy: int, results: Sequence[Result], path: str) -> dict[str, Any]:
    scores = [
        result.scores[0 if result.comparison.left == policy else 1]
        for result in results
        if policy in (result.comparison.left, result.comparison.right)
    ]
    return {
        "policy": written.names[policy],
        "path": path,
        "mean_score": statistics.fmean(scores) if scores else None,
        "mean_length": statistics.fmean(_words(one.text) for one in written.of(policy)),
    }


def _words(text: str) -> int:
    return len(text.split())


def _pair(config: EvaluateConfig, written: Written, results: Sequence[Result]) -> dict[str, Any]:
    """Of the left policy against the right one, which are the same two in all ``results``."""
    record: dict[str, Any] = _rate(config, [(r.comparison, r.scores) for r in results])
    left, right = results[0].comparison.left, results[0].comparison.right
    lengths = [[_words(one.text) for one in written.of(policy)] for policy in (left, right)]
    differences = [
        float(lengths[0][r.comparison.place] - lengths[1][r.comparison.place]) for r in results
    ]
    outcome = outcomes([r.scores for r in results], config.tie_margin)
    controlled = length_controlled(outcome, differences)
    if controlled is not None:
        record["length_controlled_win_rate"] = controlled.rate
    return record


def _rate(
    config: EvaluateConfig, scored: Sequence[tuple[Comparison, Scores]]
) -> dict[str, float | int | str]:
    return win_rate(
        [scores for _, scores in scored],
        [comparison.question for comparison, _ in scored],
        tie_margin=config.tie_margin,
        seed=config.run.seed,
    ).as_record()


def _ranking(
    config: EvaluateConfig, names: Sequence[str], results: Sequence[Result]
) -> list[dict[str, Any]]:
    found = outcomes([r.scores for r in results], config.tie_margin).tolist()
    played = [
        Outcome(r.comparison.left, r.comparison.right, outcome, r.comparison.question)
        for r, outcome in zip(results, found, strict=True)
    ]
    try:
        rated = ranking(played, len(names), seed=config.run.seed)
    except ValueError as problem:  # all pairs of a policy were skipped or flagged
        raise UserError(f"cannot be ranked: {problem}", where="policies") from None
    return [
        {
            "policy": names[one.policy],
            "rating": one.rating,
            "ci_low": one.ci_low,
            "ci_high": one.ci_high,
            "win_rate": one.win_rate,
            "wins": one.wins,
            "ties": one.ties,
            "losses": one.losses,
        }
        for one in rated
    ]


def _by_policy(
    config: EvaluateConfig, names: Sequence[str], results: Sequence[Result]
) -> dict[str, Any]:
    """Win rate of each policy against those that it was compared with. Of two, of the first."""
    found = {}
    for policy, name in enumerate(names if config.policies else names[:1]):
        own = [
            (r.comparison, r.scores if r.comparison.left == policy else (r.scores[1], r.scores[0]))
            for r in results
            if policy in (r.comparison.left, r.comparison.right)
        ]
        if own:
            found[name] = _rate(config, own)
    return found


def _by(results: Sequence[Result], key: Callable[[Comparison], Any]) -> dict[Any, list[Result]]:
    found: dict[Any, list[Result]] = {}
    for result in results:
        found.setdefault(key(result.comparison), []).append(result)
    return found
