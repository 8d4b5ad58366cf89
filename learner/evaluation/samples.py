"""Answers before and after training to the same prompts: file, choice of a few, statistics."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.contracts.errors import UserError
from learner.evaluation.run_files import number, write_atomic


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One line of ``samples.jsonl``. A score is None where no judge was asked."""

    prompt: str
    before: str
    after: str
    before_score: float | None = None
    after_score: float | None = None

    @property
    def gain(self) -> float | None:
        if self.before_score is None or self.after_score is None:
            return None
        return self.after_score - self.before_score


@dataclass(frozen=True, slots=True)
class Chosen:
    """A sample and why it is shown."""

    reason: str
    sample: Sample


@dataclass(frozen=True, slots=True)
class TextStats:
    """Of a list of texts: length in words, and the share of 3-grams that repeat within a text."""

    count: int
    mean_words: float
    median_words: float
    longest_words: int
    repeated_3grams: float
    distinct_2grams: float


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """One JSON object a line, complete or not there at all."""
    lines = [json.dumps(asdict(sample), ensure_ascii=True) + "\n" for sample in samples]
    write_atomic(path, "".join(lines))


def read_samples(path: Path) -> list[Sample]:
    """Raises UserError naming the line that cannot be used.

    A prompt may also be a list of chat messages; it becomes one text with the roles written out.
    """
    found = []
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", where=str(path)) from error
    for at, line in enumerate(lines, start=1):
        if line.strip():
            found.append(_parse(line, f"{path.name}:{at}"))
    return found


def _parse(line: str, where: str) -> Sample:
    fix = 'each line is {"prompt", "before", "after", "before_score", "after_score"}'
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not JSON ({error})", where=where, fix=fix) from error
    if not isinstance(record, dict):
        raise UserError("is not a JSON object", where=where, fix=fix)
    texts = {key: _text(record.get(key)) for key in ("prompt", "before", "after")}
    for key, text in texts.items():
        if text is None:
            raise UserError(f"has no text under {key!r}", where=where, fix=fix)
    scores = {}
    for key in ("before_score", "after_score"):
        scores[key] = number(record, key)
        if scores[key] is None and record.get(key) is not None:
            what = f"{key} is {record[key]!r}, not a finite number"
            raise UserError(what, where=where, fix=fix)
    return Sample(
        prompt=texts["prompt"] or "",
        before=texts["before"] or "",
        after=texts["after"] or "",
        before_score=scores["before_score"],
        after_score=scores["after_score"],
    )


def _text(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(m, dict) for m in value):
        return "\n\n".join(f"{m.get('role', '?')}: {m.get('content', '')}" for m in value)
    return None


def choose(samples: Sequence[Sample], random_count: int = 3, seed: int = 0) -> list[Chosen]:
    """A fair few: largest gain, worst, median gain, and some drawn by ``seed`` alone.

    The random ones depend on the seed and the number of samples, never on their content or score.
    No sample is shown twice.
    """
    order = list(range(len(samples)))
    random.Random(seed).shuffle(order)
    scored = sorted(
        (gain, i) for i, sample in enumerate(samples) if (gain := sample.gain) is not None
    )
    picks: list[tuple[str, int]] = []
    if scored:
        worst_gain, worst = scored[0]
        picks.append(("largest improvement", scored[-1][1]))
        picks.append(("worst regression" if worst_gain < 0 else "smallest improvement", worst))
        picks.append(("typical (median change)", scored[(len(scored) - 1) // 2][1]))
    picks += [("random", i) for i in order]
    chosen: list[Chosen] = []
    seen: set[int] = set()
    drawn = 0
    for reason, i in picks:
        if i in seen or (reason == "random" and drawn == random_count):
            continue
        seen.add(i)
        drawn += reason == "random"
        chosen.append(Chosen(reason, samples[i]))
    return chosen


def distinct_ngrams(text: str, n: int) -> float:
    """Different word n-grams as a share of all (distinct-n, Li et al. 2016); 1 when too short."""
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def text_stats(texts: Sequence[str]) -> TextStats:
    """Raises ValueError without texts."""
    if not texts:
        raise ValueError("there are no texts")
    words = [len(text.split()) for text in texts]
    return TextStats(
        count=len(texts),
        mean_words=statistics.fmean(words),
        median_words=float(statistics.median(words)),
        longest_words=max(words),
        repeated_3grams=1 - statistics.fmean(distinct_ngrams(text, 3) for text in texts),
        distinct_2grams=statistics.fmean(distinct_ngrams(text, 2) for text in texts),
    )
