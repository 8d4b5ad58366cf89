"""Policies' completions, compared by an AI judge that does not know who wrote which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from cluster.assembly.ai_judge import asking, by_letter, identity_of, make_asker
from cluster.assembly.contest import Comparison
from cluster.assembly.judged_comparisons import TIE, Judged
from cluster.contracts.config.base import ClusterConfig
from cluster.contracts.config.judge import JudgeConfig
from reward_service.judge.comparing import Pair, Tally, verdicts

SCORES = {"a": (1.0, 0.0), "b": (0.0, 1.0), "tie": TIE}


def judge_by_ai(
    judge: JudgeConfig, criteria: str, cluster: ClusterConfig, compared: Sequence[Comparison]
) -> Judged:
    """Each pair in both orders; equal completions are a tie without being asked about."""
    scores = [TIE] * len(compared)
    differ = [n for n, comparison in enumerate(compared) if not comparison.equal]
    pairs = [
        Pair(
            messages=compared[n].messages,
            a=compared[n].a,
            b=compared[n].b,
            criteria=criteria,
            reference=compared[n].reference,
            label=compared[n].label,
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
                "equal_completions": len(compared) - len(differ),
                "with_reference": sum(bool(pair.reference) for pair in pairs),
                **tally.as_record(),
                "spent": asdict(asker.spent),
            },
        }
    return Judged(scores, record)
