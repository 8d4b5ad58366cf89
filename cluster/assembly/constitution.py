"""`accord constitution`: completions revised by principles, and preferences by principles."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.assembly.ai_judge import asking, by_letter, identity_of, make_asker, spent_line
from cluster.assembly.ai_label import Labelling
from cluster.assembly.judged_items import add_items_of
from cluster.assembly.run_session import run_session
from cluster.contracts.chat import is_text
from cluster.contracts.config.constitution import ConstitutionConfig
from cluster.contracts.durable import write_json, write_text
from cluster.contracts.errors import UserError
from cluster.pages.labelling.items import read_items
from cluster.runs.console import Reporter
from cluster.runs.run import Run
from reward_service.judge.constitution import Constitution, read_constitution
from reward_service.judge.records import Asker
from reward_service.judge.revising import Draft, revised
from reward_service.preferences.imports import UNKNOWN
from reward_service.preferences.records import utc_now
from reward_service.preferences.store import PreferenceStore

ROWS = "sft.jsonl"
FIGURES = "constitution.json"


def run_constitution(config: ConstitutionConfig, reporter: Reporter) -> Path:
    """Returns the run directory: sft.jsonl (rows for `accord sft`), constitution.json (figures).
    The judgements are in the store."""
    constitution = read_constitution(config.principles)
    drafts = _drafts(config) if "revise" in config.steps else []
    labelling = _labelling(config, constitution) if "prefer" in config.steps else None
    asker = make_asker(config.judge, config.cluster)
    run = Run.create(
        config.run.dir,
        config.run.name,
        "constitution",
        config,
        seed=config.run.seed,
        parents={"data": config.data.path, "principles": config.principles, **config.run.parents},
    )
    figures: dict[str, Any] = {
        "principles": list(constitution.principles),
        "constitution_sha256": constitution.sha256,
    }
    with run_session(run, reporter):
        progress = labelling.progress if labelling else lambda: "answers so far are in judge.cache"
        with asking(asker, progress):
            if drafts:
                with reporter.stage(f"{len(drafts)} completions, revised by {asker.model}"):
                    figures["revise"] = _revise(config, constitution, drafts, asker, run.path)
                    write_json(run.path / FIGURES, figures)
            if labelling is not None:
                name = f"{len(labelling.items)} items, compared by {asker.model}"
                with reporter.stage(name) as stage:
                    labelling.label(
                        asker,
                        lambda item: constitution.drawn(item.id, config.run.seed)[0],
                        stage,
                        letter=by_letter(config.judge),
                    )
                figures["prefer"] = labelling.figures(asker)
            write_json(run.path / FIGURES, {**figures, "spent": asdict(asker.spent)})
        reporter.say(spent_line(asker.spent))
    return run.path


def _drafts(config: ConstitutionConfig) -> list[Draft]:
    path = config.data.path
    if path.endswith(".db"):
        raise UserError(
            "a preference store holds pairs; the step 'revise' takes completions",
            where=f"data.path {path}",
            fix='give the output of accord generate, or set steps = ["prefer"]',
        )
    read = read_items(path, completions=1, license=UNKNOWN, created_at=utc_now())
    return [
        Draft(messages=item.messages, text=item.completions[0].text, label=f"completion {item.id}")
        for item in read.items[: config.max_items]
    ]


def _labelling(config: ConstitutionConfig, constitution: Constitution) -> Labelling:
    store = PreferenceStore(str(config.store))
    items = add_items_of(config.data.path, config.data.split, store)[: config.max_items]
    # Which principle an item gets follows from these; another constitution is another annotator.
    words = f"constitution {constitution.sha256}, seed {config.run.seed}"
    return Labelling(store, identity_of(config.judge, words), items)


def _revise(
    config: ConstitutionConfig,
    constitution: Constitution,
    drafts: Sequence[Draft],
    asker: Asker,
    folder: Path,
) -> dict[str, Any]:
    drawn = [constitution.drawn(draft.label, config.run.seed, config.revisions) for draft in drafts]
    now = list(drafts)
    for number in range(config.revisions):
        now = revised(asker, now, [principles[number] for principles in drawn])
    rows = [_row(before, after) for before, after in zip(drafts, now, strict=True)]
    write_text(folder / ROWS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return {
        "completions": len(rows),
        "unchanged": sum(b.text == a.text for b, a in zip(drafts, now, strict=True)),
    }


def _row(before: Draft, after: Draft) -> dict[str, Any]:
    text = is_text(after.messages)
    return {
        "prompt": after.messages[0]["content"] if text else [dict(m) for m in after.messages],
        "completion": after.text if text else [{"role": "assistant", "content": after.text}],
        "metadata": {
            "before": before.text,
            "principles": list(after.principles),
            "critiques": list(after.critiques),
        },
    }
