"""`accord ai-label`: an AI judge compares completions, and a preference store keeps its answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.assembly.ai_judge import asking, by_letter, identity_of, make_asker, spent_line
from cluster.assembly.choosing import chosen_items
from cluster.assembly.judged_items import add_items_of, new_items
from cluster.assembly.run_session import run_session
from cluster.contracts.config.ai_label import AiLabelConfig
from cluster.contracts.durable import write_json
from cluster.runs.console import Reporter, Stage
from cluster.runs.run import Run
from reward_service.judge.agreement import agreement_with_people
from reward_service.judge.comparing import Tally
from reward_service.judge.labelling import JudgeIdentity, judgements_of
from reward_service.judge.records import Asker
from reward_service.preferences.records import Item
from reward_service.preferences.store import PreferenceStore

FIGURES = "ai_label.json"


@dataclass(slots=True)
class Labelling:
    """Items of a store and how many of them a judge has judged. ``before``: in earlier runs."""

    store: PreferenceStore
    identity: JudgeIdentity
    items: Sequence[Item]
    before: int = 0
    done: int = 0
    tally: Tally = field(default_factory=Tally)

    def label(
        self, asker: Asker, criteria: Callable[[Item], str], stage: Stage, *, letter: bool
    ) -> None:
        """Each judgement is in the store as soon as it is known; items that this judge has judged
        before are not judged again."""
        mine = {
            entry.item_id
            for entry in self.store.judgements()
            if entry.annotator_id == self.identity.annotator_id
        }
        left = [item for item in self.items if item.id not in mine]
        self.before = len(self.items) - len(left)
        for judgement in judgements_of(
            asker, left, criteria, self.identity, self.tally, letter=letter
        ):
            self.store.add_judgement(judgement)
            self.done += 1
            stage.update(self.done, {}, total=len(left))

    def progress(self) -> str:
        return f"{self.before + self.done} of {len(self.items)} items are judged and stored"

    def figures(self, asker: Asker) -> dict[str, Any]:
        items = {item.id for item in self.items}
        entries = self.store.judgements()
        mine = [
            entry
            for entry in entries
            if entry.annotator_id == self.identity.annotator_id and entry.item_id in items
        ]
        with_people = agreement_with_people(entries, self.identity.annotator_id, items)
        return {
            "store": str(self.store.path),
            "annotator_id": self.identity.annotator_id,
            "judge": dict(self.identity.as_record()),
            "items": len(self.items),
            "judged": self.done,
            "judged_before": self.before,
            "ties": sum(set(entry.ranks) == {1} for entry in mine),
            **self.tally.as_record(),
            "spent": asdict(asker.spent),
            "agreement_with_people": asdict(with_people),
            "agreement": str(with_people),
        }


def run_ai_label(config: AiLabelConfig, reporter: Reporter) -> Path:
    """Returns the run directory: ai_label.json (figures). The judgements are in the store."""
    asker = make_asker(config.judge, config.cluster)
    store = PreferenceStore(config.store)
    items = _items(config, store)[: config.max_items]
    run = Run.create(
        config.run.dir,
        config.run.name,
        "ai-label",
        config,
        seed=config.run.seed,
        parents={"data": config.data.path, **config.run.parents},
    )
    work = Labelling(store, identity_of(config.judge, config.criteria), items)
    with run_session(run, reporter), asking(asker, work.progress):
        with reporter.stage(f"{len(items)} items, judged by {asker.model}") as stage:
            work.label(asker, lambda _: config.criteria, stage, letter=by_letter(config.judge))
        figures = work.figures(asker)
        write_json(run.path / FIGURES, figures)
        reporter.say(headline(figures))
        reporter.say(spent_line(asker.spent))
    return run.path


def _items(config: AiLabelConfig, store: PreferenceStore) -> list[Item]:
    data = config.data
    if config.choice is None:
        return add_items_of(data.path, data.split, store)
    items = chosen_items(data.path, config.choice, seed=config.run.seed, split=data.split)
    store.add_items(new_items(store, items))
    return items


def headline(figures: dict[str, Any]) -> str:
    consistency = figures["position_consistency"]
    orders = "" if consistency is None else f"; both orders agree in {consistency:.1%}"
    return (
        f"{figures['judged']} items judged ({figures['judged_before']} before), "
        f"{figures['ties']} ties{orders}; {figures['agreement']}"
    )
