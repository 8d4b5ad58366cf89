"""`accord label`: fills the store, and starts the pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.assembly.choosing import check_choice, choice_told, chosen_items
from cluster.assembly.live_labelling import LiveSampling, add_new
from cluster.contracts.config.label import LabelConfig
from cluster.contracts.errors import UserError
from cluster.pages.access import Access, names_of
from cluster.pages.labelling.desk import Desk
from cluster.pages.labelling.items import read_gold, read_items
from cluster.pages.labelling.label_site import label_app, rules_of
from cluster.pages.server import PageServer
from reward_service.preferences.labelling import Labelling
from reward_service.preferences.people import People
from reward_service.preferences.records import Item, utc_now
from reward_service.preferences.store import PreferenceStore

CONNECTIONS = 512  # some fifty annotators, each with a browser that opens several


@dataclass(frozen=True, slots=True)
class LabelSite:
    """``invitation``: an address that lets one admin in, once."""

    server: PageServer
    desk: Desk
    invitation: str
    feeder: LiveSampling | None = None

    def stop(self) -> None:
        if self.feeder is not None:
            self.feeder.stop()
        self.server.stop()


def open_label_site(config: LabelConfig, say: Callable[[str], None]) -> LabelSite:
    """Raises UserError for a file, a store or an address that cannot be used; then nothing was
    added."""
    new = _read(config, say)  # first: a bad file leaves no new store behind
    store = PreferenceStore(config.store)
    labelling = Labelling(
        store,
        overlap=config.data.overlap,
        overlap_share=config.data.overlap_share,
        lease_s=config.data.lease_minutes * 60,
    )
    people = People(store)
    desk = Desk(labelling, people, rules_of(config.page, people, config.data.gold_every))
    live = None if config.live.policy is None else LiveSampling(config, labelling, say)
    added = add_new(store, new)
    progress = labelling.progress()
    if not progress.items and live is None:
        raise UserError(
            "there is nothing to label",
            where=str(store.path),
            fix="name files with completions: data.files=[completions.jsonl]",
        )
    say(f"{added} items were added; {progress.done} of {progress.items} are labelled.")
    access = Access(hosts=names_of(config.server.host), asks_token=False)  # there are sessions
    server = PageServer(
        label_app(desk),
        access,
        config.server.host,
        config.server.port,
        connections=CONNECTIONS,
    )
    if live is not None:
        desk.live = live
        live.start()
    return LabelSite(server, desk, f"{server.url}join/{people.invite('admin')}", live)


def _read(config: LabelConfig, say: Callable[[str], None]) -> list[Item]:
    data, now, found = config.data, utc_now(), []
    if config.choice is not None:
        check_choice(config.choice)
    for path in data.files:
        if config.choice is not None:
            chosen = chosen_items(path, config.choice, seed=config.live.seed, license=data.license)
            say(f"{Path(path).name}: {choice_told(chosen)}")
            found += chosen
            continue
        read = read_items(path, completions=data.completions, license=data.license, created_at=now)
        if read.too_few:
            say(f"{Path(path).name}: {read.too_few} prompts have too few different completions")
        found += read.items
    if data.gold is not None:
        found += read_gold(data.gold, license=data.license, created_at=now)
    return found
