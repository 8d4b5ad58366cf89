"""How many tokens of each sequence are decoded between two looks at swaps, requests and aborts."""

from __future__ import annotations

WORK = 5e9  # floating-point operations in one turn: about 50 ms of a core
FEW_LEFT = 0.75  # a turn ends when fewer of its sequences go on: others may wait for the seats


def steps_at_once(rows: int, parameters: int, most: int) -> int:
    """Decode steps in one turn of `rows` sequences: as many as `WORK` allows, from 1 to `most`.

    parameters: of the model's products. A turn makes whoever waits wait longer, and saves nothing
    worth it where the products are large.
    """
    return max(1, min(most, int(WORK / (2.0 * max(1, parameters) * max(1, rows)))))
