"""A labelling site over a new store, with a clock that the test moves."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from cluster.contracts.config.label import LabelPageConfig
from cluster.pages.labelling.desk import Desk
from cluster.pages.labelling.label_site import label_app, rules_of
from reward_service.preferences.labelling import Labelling
from reward_service.preferences.people import People
from reward_service.preferences.records import Candidate, Gold, Item, derived_id
from reward_service.preferences.store import PreferenceStore


@dataclass
class Clock:
    now: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def an_item(name: str, texts: Iterable[str], gold: tuple[int, ...] | None = None) -> Item:
    return Item(
        id=derived_id(name),
        messages=({"role": "user", "content": name},),
        completions=tuple(Candidate(text=text) for text in texts),
        source="test",
        license="unknown",
        created_at="2027-01-15T08:00:00+00:00",
        gold=Gold(ranks=gold) if gold else None,
    )


@dataclass
class Visitor:
    """A browser without scripts: it keeps its cookie, and sends forms as they stand on the page."""

    client: TestClient

    def get(self, path: str, status: int = 200) -> str:
        answer = self.client.get(path)
        assert answer.status_code == status, (path, answer.status_code, answer.text)
        self.at = answer.url.path
        return answer.text

    def send(self, path: str, status: int = 200, **fields: str) -> str:
        """``fields`` beside the hidden ones of the form for ``path``, as its page shows it now."""
        shown = {"admin": "/admin", "task": path, "welcome": path}.get(path.split("/")[1], "/")
        page = self.client.get(shown)
        hidden = hidden_fields(page.text, path)
        answer = self.client.post(path, data={**hidden, **fields})
        assert answer.status_code == status, (path, answer.status_code, answer.text)
        self.at = answer.url.path
        return answer.text

    def task(self) -> str:
        """Where the next item is."""
        self.get("/")
        return self.at

    def label(self, choice: str = "first-2", **fields: str) -> str:
        """Labels the next item; returns its path."""
        path = self.task()
        self.send(path, action="submit", choice=choice, **fields)
        return path


def hidden_fields(html: str, action: str) -> dict[str, str]:
    forms = re.findall(r"<form[^>]*>.*?</form>", html, re.DOTALL)
    form = next(one for one in forms if f'action="{action}"' in one)
    return dict(re.findall(r'<input type="hidden" name="([\w-]+)" value="([^"]*)"', form))


@dataclass
class Site:
    store: PreferenceStore
    desk: Desk
    clock: Clock
    items: list[Item] = field(default_factory=list)
    open_browsers: ExitStack = field(default_factory=ExitStack)

    def browser(self) -> TestClient:
        """One that nobody has signed in with."""
        if not hasattr(self, "app"):
            self.app = label_app(self.desk)
        client = TestClient(self.app, base_url="http://127.0.0.1")
        return self.open_browsers.enter_context(client)  # one event loop for all its requests

    def visitor(self, role: Any = "annotator", *, accepted: bool = True) -> Visitor:
        client = self.browser()
        visitor = Visitor(client)
        answer = client.post(f"/join/{self.desk.people.invite(role)}")
        assert answer.status_code == 200, answer.text
        if accepted:
            visitor.send("/welcome", agree="yes")
        return visitor

    def item_at(self, path: str) -> Item:
        found = self.store.item(path.rpartition("/")[2])
        assert found is not None
        return found


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def open_site(tmp_path: Path, clock: Clock) -> Iterator[Callable[..., Site]]:
    made: list[Site] = []

    def make(
        items: Iterable[Item] | None = None, overlap: int = 1, gold_every: int = 10, **page: Any
    ) -> Site:
        store = PreferenceStore(tmp_path / "preferences.db")
        chosen = list(items) if items is not None else pairs(6)
        store.add_items(chosen)
        labelling = Labelling(store, overlap=overlap, lease_s=900.0, clock=clock)
        people = People(store, clock=clock)
        rules = rules_of(LabelPageConfig(**page), people, gold_every)
        made.append(Site(store, Desk(labelling, people, rules), clock, chosen))
        return made[-1]

    yield make
    for site in made:
        site.open_browsers.close()


def pairs(count: int) -> list[Item]:
    return [an_item(f"question {n}", (f"answer {n} one", f"answer {n} two")) for n in range(count)]


@pytest.fixture
def make_item() -> Callable[..., Item]:
    return an_item
