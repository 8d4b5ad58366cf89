"""What time was spent on."""

from __future__ import annotations


class Stopwatch:
    """Seconds by part. Every moment belongs to exactly one, so the parts add up to the whole."""

    def __init__(self, now: float, part: str) -> None:
        self._since, self._part = now, part
        self._seconds: dict[str, float] = {}

    def turn(self, now: float, part: str, *, was: str | None = None) -> None:
        """From now on it is ``part``. ``was``: what it has been since the last turn after all."""
        self._part = was or self._part
        self._seconds = self.totals(now)
        self._since, self._part = now, part

    def totals(self, now: float) -> dict[str, float]:
        spent = self._seconds.get(self._part, 0.0) + now - self._since
        return {**self._seconds, self._part: spent}
