"""What pacing admission costs and gains: the real controller and pool on virtual time.

    python benchmarks/pacing.py

For learners that take 0.5 to 2.5 times as long as the workers, narrow and wide completion lengths,
and staleness bounds of 1, 2 and 6, it simulates a run that admits as early as the bound allows and
one that is paced (`staleness.lead = "auto"`), and prints speed and staleness of both.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cluster.measure.simulation.scenario import Scenario
from cluster.measure.simulation.simulate import simulate

SHARES = (0.5, 0.8, 1.0, 1.2, 1.6, 2.5)  # the learner's time over the workers'
SPREADS = (0.3, 1.0)  # standard deviation of the lengths over their mean
BOUNDS = (1, 2, 6)
BASE = Scenario(
    workers=4, slots=64, tokens_per_s=100, length_mean=200, max_tokens=512, prompts_per_step=64,
    samples_per_prompt=4, publish_s=0.05, fetch_s=0.2, pause_s=0.01, score_s=0.1, seconds=600,
    stragglers=0, churn_per_hour=0,
)  # fmt: skip


def main() -> None:
    print("| learner / workers | spread | bound | samples per s, paced / not | token staleness |")
    print("|---|---|---|---|---|")
    ratios, violations = [], 0
    for share, spread, bound in itertools.product(SHARES, SPREADS, BOUNDS):
        scenario = replace(BASE, length_cv=spread, bound=bound).with_learner_share(share)
        early = simulate(replace(scenario, lead=bound)).figures
        paced = simulate(scenario).figures
        ratios.append(paced.samples_per_s / early.samples_per_s)
        violations += paced.violations
        print(
            f"| {share} | {spread} | {bound} | {ratios[-1]:.3f} | "
            f"{early.token_staleness:.2f} → {paced.token_staleness:.2f} |",
            flush=True,
        )
    print(f"\nspeed ratio {min(ratios):.3f} to {max(ratios):.3f}; {violations} violations")


if __name__ == "__main__":
    main()
