"""Completions of a run, chosen, searched and cut to what a page can hold."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.contracts.errors import UserError
from cluster.contracts.samples import (
    SampleInfo,
    prompt_text,
    read_samples,
    sample_file,
    sampled_steps,
)
from cluster.pages.library import Cache, signature
from learner.evaluation.samples import Sample
from learner.evaluation.samples import read_samples as read_pairs

PER_PAGE = 12
SHOWN_CHARACTERS = 4000  # of a prompt or completion in a list; its own page shows the rest
MOST_CHARACTERS = 2_000_000
MOST_BYTES = 256 << 20  # of a file that is read for a page
ORDERS = {
    "best": "highest score first",
    "worst": "lowest score first",
    "random": "random (the same each time)",
    "group": "by prompt, as trained",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One completion on a page. ``at``: its place among the completions of the step."""

    at: int
    facts: tuple[str, ...]
    score: float | None
    prompt: str
    completion: str
    cut: bool


class Samples:
    """Reads the completions of runs; the last few files stay in memory."""

    def __init__(self) -> None:
        self._steps: Cache[list[SampleInfo]] = Cache(3)
        self._pairs: Cache[list[Sample]] = Cache(3)

    def of_step(self, run: Path, step: int) -> list[SampleInfo]:
        """Raises UserError where there are none, or their file is damaged or very large."""
        file = sample_file(run, step)
        _small(file)
        return self._steps.get(file, signature(file), lambda: _read(run, step))

    def pairs(self, run: Path) -> list[Sample]:
        """Before and after training. Raises UserError as ``of_step``."""
        file = run / "samples.jsonl"
        _small(file)
        return self._pairs.get(file, signature(file), lambda: read_pairs(file))


def step_page(
    samples: Samples, run: Path, step: int | None, order: str, find: str, page: int
) -> dict[str, Any]:
    """Of ``step`` (None: the last), those that hold ``find``, in ``order``, ``page`` from 1."""
    steps = sampled_steps(run)
    chosen = steps[-1] if step is None and steps else step or 1
    found = samples.of_step(run, chosen)
    places = [at for at in ordered(found, order, chosen) if _holds(found[at], find)]
    pages = max(1, -(-len(places) // PER_PAGE))
    page = min(max(page, 1), pages)
    on_page = places[(page - 1) * PER_PAGE : page * PER_PAGE]
    scores = [sample.score for sample in found if sample.score is not None]
    return {
        "steps": steps,
        "step": chosen,
        "total": len(found),
        "fitting": len(places),
        "mean": sum(scores) / len(scores) if scores else None,
        "page": page,
        "pages": pages,
        "shown": [shown(found[at], at, SHOWN_CHARACTERS) for at in on_page],
    }


def pair_page(samples: Samples, run: Path, order: str, find: str, page: int) -> dict[str, Any]:
    """As ``step_page``, of completions before and after training; scores are gains."""
    found = samples.pairs(run)
    fitting = [
        pair
        for pair in _pairs_in_order(found, order)
        if any(
            find.casefold() in text.casefold() for text in (pair.prompt, pair.before, pair.after)
        )
    ]
    pages = max(1, -(-len(fitting) // PER_PAGE))
    page = min(max(page, 1), pages)
    return {
        "total": len(found),
        "fitting": len(fitting),
        "page": page,
        "pages": pages,
        "pairs": [_cut_pair(pair) for pair in fitting[(page - 1) * PER_PAGE : page * PER_PAGE]],
    }


def ordered(samples: Sequence[SampleInfo], order: str, seed: int) -> list[int]:
    """Places of the samples in the order that was asked for. Those without a score come last, and
    a random order depends on the seed and their number only."""
    places = list(range(len(samples)))
    if order == "random":
        random.Random(seed).shuffle(places)
    elif order in ("best", "worst"):
        sign = -1.0 if order == "best" else 1.0
        scores = [sample.score for sample in samples]
        places.sort(key=lambda at: (scores[at] is None, sign * (scores[at] or 0.0)))
    return places


def shown(sample: SampleInfo, at: int, most: int = MOST_CHARACTERS) -> Shown:
    prompt, completion = prompt_text(sample.prompt), sample.completion
    return Shown(
        at=at,
        facts=tuple(_facts(sample)),
        score=sample.score,
        prompt=prompt[:most],
        completion=completion[:most],
        cut=len(prompt) > most or len(completion) > most,
    )


def _facts(sample: SampleInfo) -> list[str]:
    facts = [f"prompt {sample.prompt_id}", f"group {sample.group}, sample {sample.sample}"]
    facts.append(f"{sample.tokens} tokens")
    if sample.finish_reason == "length":
        facts.append("cut at rollout.max_tokens")
    if sample.versions is not None and sample.step is not None:
        first, last = sample.versions
        versions = f"version {first}" if first == last else f"versions {first} to {last}"
        stale = sample.step - 1 - first
        facts.append(f"sampled by policy {versions}, staleness {stale}")
    if len(sample.parts) > 1:
        facts += [f"{name} {value:+.3f}" for name, value in sample.parts.items()]
    if sample.vetoes:
        facts.append(f"vetoed by {', '.join(sample.vetoes)}")
    return facts


def _pairs_in_order(pairs: Sequence[Sample], order: str) -> list[Sample]:
    found = list(pairs)
    if order == "random":
        random.Random(0).shuffle(found)
    elif order in ("best", "worst"):
        sign = -1.0 if order == "best" else 1.0
        found.sort(key=lambda pair: (pair.gain is None, sign * (pair.gain or 0.0)))
    return found


def _cut_pair(pair: Sample) -> dict[str, Any]:
    texts = {"prompt": pair.prompt, "before": pair.before, "after": pair.after}
    return {
        **{name: text[:SHOWN_CHARACTERS] for name, text in texts.items()},
        "cut": any(len(text) > SHOWN_CHARACTERS for text in texts.values()),
        "gain": pair.gain,
        "before_score": pair.before_score,
        "after_score": pair.after_score,
    }


def _holds(sample: SampleInfo, find: str) -> bool:
    return _within(find, sample.completion, prompt_text(sample.prompt), sample.prompt_id)


def _within(find: str, *texts: str) -> bool:
    """Large and small letters are the same."""
    wanted = find.casefold()
    return not wanted or any(wanted in text.casefold() for text in texts)


def _read(run: Path, step: int) -> list[SampleInfo]:
    try:
        return read_samples(run, step)
    except (ValueError, KeyError, TypeError, AttributeError) as problem:  # columns of another kind
        raise UserError(
            f"is damaged: {problem!r}", where=str(sample_file(run, step)), fix="leave that step out"
        ) from None


def _small(file: Path) -> None:
    try:
        size = file.stat().st_size
    except OSError:
        return  # its reader says so
    if size > MOST_BYTES:
        raise UserError(
            f"has {size >> 20} MB, too much for a page",
            where=str(file),
            fix="read it with `accord samples`",
        )
