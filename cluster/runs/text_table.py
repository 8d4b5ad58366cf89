"""Tables as plain text, the same on a terminal and in a file."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> list[str]:
    """One line per row, columns two spaces apart.

    ``right``: a letter per column, "r" where its cells stand to the right; left otherwise.
    """
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    sides = [str.rjust if side == "r" else str.ljust for side in right.ljust(len(header), "l")]
    return [
        "  ".join(
            side(cell, width) for side, cell, width in zip(sides, line, widths, strict=True)
        ).rstrip()
        for line in lines
    ]
