"""Several rewards -> one score, with every part kept."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from cluster.contracts.config.reward import RewardConfig
from cluster.contracts.errors import AccordError, BadReward, UserError
from cluster.contracts.records import Prompt, Score
from cluster.contracts.registry import REWARD_KINDS
from reward_service.access import Access
from reward_service.source import (
    Part,
    ScoreItem,
    ServiceInfo,
    Source,
    SourceContext,
    SourceInfo,
)


class Composition:
    """value = clip(sum, or smallest, of weight * part, less what constraints lack).

    A source with a number in ``at_least`` is a constraint: it adds weight * min(0, part - number).
    One with names in ``policies`` scores the completions of these policies alone; which policy an
    item is of stands in its column ``policy``.
    ``version`` changes with all that can change a value. ``score`` raises what a source raises; a
    source that fails never counts as 0.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        clip: float | None = None,
        *,
        combine: Literal["sum", "minimum"] = "sum",
        at_least: Sequence[float | None] = (),
        policies: Sequence[Sequence[str]] = (),
    ) -> None:
        self._sources = tuple(sources)
        self._weights = tuple(weights)
        self._clip = clip
        self._combine = combine
        self._at_least = tuple(at_least) or (None,) * len(self._sources)
        self._policies = tuple(map(tuple, policies)) or ((),) * len(self._sources)
        names = [source.name for source in sources]
        if len(set(names)) != len(names):
            raise UserError(
                f"two sources have the same name: {names}",
                where="reward.sources",
                fix="give each source a `name` of its own",
            )
        self.sources = tuple(
            SourceInfo(name=s.name, type=s.type, weight=w, content=s.content)
            for s, w in zip(self._sources, self._weights, strict=True)
        )
        self.tokenizer = next((s.tokenizer for s in sources if s.tokenizer), "")
        parts = [[s.name, s.type, s.weight, s.content] for s in self.sources]
        rule: list[Any] = [parts, clip, combine, self._at_least]
        if any(self._policies):
            rule.append(self._policies)
        self.version = hashlib.sha256(json.dumps(rule).encode()).hexdigest()

    def info(self, max_batch: int) -> ServiceInfo:
        return ServiceInfo(
            name="accord",
            scorer_version=self.version,
            sources=self.sources,
            max_batch=max_batch,
            tokenizer=self.tokenizer,
        )

    def score(self, items: Sequence[ScoreItem]) -> list[Score]:
        found: list[dict[int, Part]] = [{} for _ in items]
        for place, source in enumerate(self._sources):
            rows = [row for row, item in enumerate(items) if self._scores(place, item)]
            if rows:
                parts = self._parts(source, [items[row] for row in rows])
                for row, part in zip(rows, parts, strict=True):
                    found[row][place] = part
        return [self._sum(item, parts) for item, parts in zip(items, found, strict=True)]

    def _scores(self, place: int, item: ScoreItem) -> bool:
        wanted = self._policies[place]
        return not wanted or item.metadata.get("policy") in wanted

    def _parts(self, source: Source, items: Sequence[ScoreItem]) -> list[Part]:
        try:
            parts = source.score(items)
        except AccordError:
            raise
        except Exception as error:
            raise BadReward(
                f"the reward source {source.name!r} failed on {len(items)} items (first "
                f"{items[0].label}): {type(error).__name__}: {error}"
            ) from error
        if len(parts) != len(items):
            raise BadReward(
                f"the reward source {source.name!r} gave {len(parts)} scores for {len(items)} items"
            )
        for item, part in zip(items, parts, strict=True):
            if not math.isfinite(part.value):
                raise BadReward(
                    f"the reward source {source.name!r} scored {item.label} as {part.value}"
                )
        return parts

    def _sum(self, item: ScoreItem, parts: Mapping[int, Part]) -> Score:
        value = self._combined(item, {place: part.value for place, part in parts.items()})
        if not math.isfinite(value):
            raise BadReward(f"the rewards of {item.label} together are {value}")
        if self._clip is not None:
            value = max(-self._clip, min(self._clip, value))
        return Score(
            value=value,
            parts=_named({self._sources[place].name: part for place, part in parts.items()}),
            scorer_version=self.version,
            vetoes=tuple(veto for part in parts.values() for veto in part.vetoes),
        )

    def _combined(self, item: ScoreItem, values: Mapping[int, float]) -> float:
        wanted, lacking = [], 0.0
        for place, value in values.items():
            weight, bound = self._weights[place], self._at_least[place]
            if bound is None:
                wanted.append(weight * value)
            else:
                lacking += weight * min(0.0, value - bound)
        if not wanted:
            raise BadReward(
                f"no source scores {item.label}, of policy {item.metadata.get('policy')!r}"
            )
        return (min(wanted) if self._combine == "minimum" else sum(wanted)) + lacking

    def close(self) -> None:
        for source in self._sources:
            source.close()


def _named(parts: Mapping[str, Part]) -> dict[str, float]:
    named: dict[str, float] = {}
    for name, part in parts.items():
        named[name] = part.value
        named |= {f"{name}/{key}": value for key, value in part.detail.items()}
    return named


def build(
    cfg: RewardConfig, *, threads: int = 1, remote: Mapping[str, Access] | None = None
) -> Composition:
    """Load every source; ``remote``: what lets sources of type grpc in, by their names.

    Raises UserError for what cannot be loaded or reached.
    """
    sources: list[Source] = []
    try:
        for source in cfg.sources:
            sources.append(_load(source, cfg, threads, remote or {}))
        return Composition(
            sources,
            [source.weight for source in cfg.sources],
            cfg.clip,
            combine=cfg.combine,
            at_least=[source.at_least for source in cfg.sources],
            policies=[source.policies for source in cfg.sources],
        )
    except BaseException:
        for loaded in sources:
            loaded.close()
        raise


def _load(source: Any, cfg: RewardConfig, threads: int, remote: Mapping[str, Access]) -> Source:
    context = SourceContext(
        threads=threads,
        device=cfg.device,
        dtype=cfg.dtype if "dtype" in cfg.model_fields_set else None,
        deadline_s=cfg.deadline_s,
        access=remote.get(source.name),
    )
    made: Source = _module(source).make(source, context)
    return made


def check_source(source: Any, prompts: Sequence[Prompt]) -> None:
    """What can be found wrong with a source without starting anything. Raises UserError."""
    _module(source).check(source, prompts)


def _module(source: Any) -> Any:
    """Imported one by one: a service of rules alone needs neither torch nor a channel."""
    word = "plugin" if REWARD_KINDS.origin(source.type) else source.type
    return importlib.import_module(f"reward_service.sources.{word}")
