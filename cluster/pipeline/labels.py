"""The labels of a round: its pairs go into the store, and people, a function or an AI judge judge
them. Everything may be interrupted and done again: what is in the store stays, and nothing comes in
twice."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.assembly.labelling import open_label_site
from cluster.assembly.live_labelling import add_new
from cluster.contracts.config.ai_label import AiLabelConfig, JudgedData
from cluster.contracts.config.choice import ChoiceConfig
from cluster.contracts.config.label import LabelConfig
from cluster.contracts.config.pipeline import PipelineConfig
from cluster.contracts.durable import json_text, write_text
from cluster.pipeline.completions import COMPLETIONS, metadata_in
from cluster.pipeline.rounds import Round, Waiting
from cluster.pipeline.simulated import Annotate, simulated_judgements
from cluster.runs.console import Reporter, Stage, result
from reward_service.preferences.agreement import krippendorff_alpha, units_of, votes
from reward_service.preferences.records import Item, Judgement, prompt_hash, utc_now
from reward_service.preferences.store import PreferenceStore

CHOSEN = "choice.json"  # in the folder of the round: by what its pairs were chosen
LOOK_EVERY_S = 1.0
GRACE_S = 5.0  # after the last label, for the annotator's next page and for taking it back


class RoundLabels:
    """The items of one round in the pipeline's store."""

    def __init__(self, config: PipelineConfig, at: Round, store: Path, reporter: Reporter) -> None:
        self._config = config
        self._at = at
        self._folder = at.path("completions")
        self._source = f"{at.record.folder.name}/round-{at.number}"
        self._store = PreferenceStore(store)
        self._reporter = reporter

    def add_items(self) -> bool:
        """Chooses the pairs and adds those that are not there yet, once for each [choice] that is
        asked for: after `choice.count` was raised, there are more. Returns whether it chose."""
        choice = choice_of_round(self._config, self._at)
        asked, done = json_text(choice.model_dump()), self._at.path(CHOSEN)
        if done.is_file() and done.read_text(encoding="utf-8") == asked:
            return False
        from cluster.assembly.choosing import choice_told, chosen_items

        items = chosen_items(
            str(self._folder / COMPLETIONS),
            choice,
            seed=self._config.run.seed + self._at.number - 1,
            license=self._config.label.data.license,
        )
        self._reporter.say(choice_told(items))
        add_new(self._store, (replace(item, source=self._source) for item in items))
        write_text(done, asked)
        return True

    def collect(self, waiting: Waiting) -> dict[str, Any]:
        """Returns, when every item of the round is judged, what is known of the labels."""
        by = self._config.label.by
        if by == "people":
            self._by_people(waiting)
        elif by == "ai":
            self._by_ai()
        else:
            self._simulated()
        return {"by": by, **self._figures()}

    # -- by whom -----------------------------------------------------------------------------------

    def _simulated(self) -> None:
        """All in one transaction: an interrupted attempt leaves none behind."""
        label = self._config.label
        assert label.annotate is not None
        annotate = Annotate(label.annotate)
        columns = metadata_in(self._folder)
        seed, now = self._config.run.seed, utc_now()
        judged = {(entry.item_id, entry.annotator_id) for entry in self._store.judgements()}
        new: list[Judgement] = []
        with self._reporter.stage("simulated annotators"):
            for item in self._items():
                found = simulated_judgements(
                    annotate, item, columns.get(prompt_hash(item.messages), {}), seed,
                    label.data.overlap, now,
                )  # fmt: skip
                new += [one for one in found if (one.item_id, one.annotator_id) not in judged]
            self._store.add([], new)

    def _by_ai(self) -> None:
        from cluster.assembly.ai_label import run_ai_label

        label, folder = self._config.label, self._at.path("ai_label")
        assert label.judge is not None
        shutil.rmtree(folder, ignore_errors=True)  # what was judged is in the store
        store = str(self._store.path)
        config = AiLabelConfig(
            run={"dir": str(folder.parent), "name": folder.name, "seed": self._config.run.seed},
            data=JudgedData(path=store),
            store=store,
            judge=label.judge,
            criteria=label.criteria,
            cluster=self._config.cluster,
        )
        run_ai_label(config, self._reporter)

    def _by_people(self, waiting: Waiting) -> None:
        if not self.open():
            return
        site = open_label_site(self._label_config(), self._reporter.say)
        try:
            self._reporter.tell(
                "Open this address in a browser to label. It is an invitation for an admin, who "
                "can invite others, and works once. Ctrl-C stops here; to go on later: accord "
                f"resume {self._at.record.folder}"
            )
            result(site.invitation)
            with self._reporter.stage("labels", len(self._items())) as stage:
                self._wait(stage, waiting)
        finally:
            site.stop()

    def _wait(self, stage: Stage, waiting: Waiting) -> None:
        """Until every item is answered, and still is a moment later (an answer can be undone)."""
        told, since = -1, time.monotonic()
        while True:
            left, total = self.open(), len(self._items())
            done = total - left
            if done != told:
                told, since = done, time.monotonic()
                stage.update(done, {}, total=total)
                waiting({"by": "people", "items": total, "done": done, **self._figures()})
            if not left and time.monotonic() - since > GRACE_S:
                return
            time.sleep(LOOK_EVERY_S)

    def _label_config(self) -> LabelConfig:
        label = self._config.label
        return LabelConfig(
            store=str(self._store.path), data=label.data, page=label.page, server=label.server
        )

    # -- what is in the store ----------------------------------------------------------------------

    def _items(self) -> list[Item]:
        return [item for item in self._store.items() if item.source == self._source]

    def open(self) -> int:
        """Items of the round that too few annotators have answered. A skip and a flag are answers:
        an item that nobody can judge holds up nothing."""
        answers = Counter(entry.item_id for entry in self._store.judgements())
        return sum(answers[item.id] < self._wanted(item) for item in self._items())

    def _wanted(self, item: Item) -> int:
        asked = 1 if item.chosen_by is None else item.chosen_by.judgements
        return max(self._config.label.data.overlap, asked)

    def _figures(self) -> dict[str, Any]:
        own = {item.id for item in self._items()}
        labels = [one for one in self._store.judgements() if one.item_id in own and one.is_label]
        units = [
            [vote.choice for vote in cast.values()] for cast in units_of(votes(labels)).values()
        ]
        return {
            "items": len(own),
            "labels": len(labels),
            "annotators": len({one.annotator_id for one in labels}),
            "alpha": krippendorff_alpha(units),
        }


def choice_of_round(config: PipelineConfig, at: Round) -> ChoiceConfig:
    """Rewards to choose by are those of the round before, unless [choice] names a reward model. The
    first round has none: there, pairs are chosen at random."""
    choice = config.choice
    if not choice.needs_scores or choice.reward_model is not None:
        return choice
    if at.number == 1:
        return choice.model_copy(update={"strategy": "random"})
    before = at.record.folder / f"round-{at.number - 1}" / "reward_model" / "reward_model"
    return choice.model_copy(update={"reward_model": str(before)})
