"""Two policies' completions, compared by an AI judge that does not know which is which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.assembly.ai_judge import asking, by_letter, identity_of, make_asker
from cluster.contracts.config.base import ClusterConfig
from cluster.contracts.config.judge import JudgeConfig
from cluster.contracts.records import Rollout
from reward_service.judge.comparing import Pair, Tally, verdicts

SCORES = {"a": (1.0, 0.0), "b": (0.0, 1.0), "tie": (0.5, 0.5)}


@dataclass(frozen=True, slots=True)
class Compared:
    """``scores``: 1 for the completion that is preferred, 0 for the other, 0.5 each for a tie;
    (policy, baseline) per pair. ``record``: what evaluation.json says of the judge."""

    scores: list[tuple[float, float]]
    record: Mapping[str, Any]


def compare_policies(
    judge: JudgeConfig,
    criteria: str,
    cluster: ClusterConfig,
    after: Sequence[Rollout],
    before: Sequence[Rollout],
) -> Compared:
    """Each pair in both orders; equal completions are a tie without being asked about."""
    scores = [SCORES["tie"]] * len(after)
    differ = [
        n
        for n, (a, b) in enumerate(zip(after, before, strict=True))
        if a.text.strip() != b.text.strip()
    ]
    pairs = [
        Pair(
            messages=before[n].prompt.messages,
            a=after[n].text,
            b=before[n].text,
            criteria=criteria,
            label=f"prompt {before[n].prompt.where or before[n].prompt.id}",
        )
        for n in differ
    ]
    tally = Tally()
    asker = make_asker(judge, cluster)
    with asking(asker, lambda: f"{tally.verdicts} of {len(pairs)} pairs are judged"):
        for place, verdict in verdicts(asker, pairs, letter=by_letter(judge)):
            tally.add(verdict)
            scores[differ[place]] = SCORES[verdict.choice]
        record = {
            "judge": judge.model,
            "ai_judge": {
                **identity_of(judge, criteria).as_record(),
                "equal_completions": len(after) - len(differ),
                **tally.as_record(),
                "spent": asdict(asker.spent),
            },
        }
    return Compared(scores, record)
