"""Small records of preference stores. As a program, it writes them until it is killed."""

from __future__ import annotations

import sys

from reward_service.preferences.records import Candidate, Item, Judgement
from reward_service.preferences.store import PreferenceStore

WHEN = "2026-01-02T03:04:05+00:00"


def record(number: int) -> tuple[Item, Judgement]:
    item = Item(
        id=f"i{number}",
        messages=({"role": "user", "content": f"question {number} " * 40},),
        completions=(Candidate(text="yes"), Candidate(text="no")),
        source="here",
        license="CC0-1.0",
        created_at=WHEN,
    )
    judgement = Judgement(
        id=f"j{number}",
        item_id=item.id,
        annotator_id="ann",
        answer="ranking",
        ranks=(1, 2),
        consent="c1",
        created_at=WHEN,
    )
    return item, judgement


def main(path: str, first: int) -> None:
    store = PreferenceStore(path)
    for number in range(first, 10**9):
        item, judgement = record(number)
        store.add([item], [judgement])
        sys.stdout.write(f"{number}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
