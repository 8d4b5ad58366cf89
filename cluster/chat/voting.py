"""Votes on the answers of two models, as judgements of a preference store.

The two are shown in an order that is drawn for each question and are not named before the end. The
store keeps which model wrote which answer: its path, the hash of its files, and how it was sampled.
"""

from __future__ import annotations

import hashlib
import random
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from cluster.chat.line_editing import state_folder
from cluster.chat.voice import ChatSettings
from cluster.contracts.errors import UserError
from cluster.runs.artefacts import artefact_hash
from cluster.runs.policies import policy_directory
from reward_service.preferences.people import Annotator, People
from reward_service.preferences.records import (
    LETTERS,
    Candidate,
    Item,
    Judgement,
    derived_id,
    utc_now,
)
from reward_service.preferences.store import PreferenceStore

Choice = Literal["first", "second", "tie", "both_bad"]
CONSENT = (
    "Your questions, the models' answers and your votes are kept under a pseudonym. They train and "
    "evaluate language models. Your name and your address are not kept; do not write about "
    "yourself. Whoever runs this chat deletes your votes if you name your pseudonym."
)
PSEUDONYM = "annotator"  # the file that holds it


@dataclass(frozen=True, slots=True)
class Author:
    """A model. ``version``: the hash of its files; of a hub id the id itself."""

    path: str
    version: str

    @staticmethod
    def of(path: str) -> Author:
        """``path`` as `accord chat` takes it: a run, a model directory, or a hub id."""
        place = policy_directory(path)
        known = Path(place).exists()
        return Author(place, f"sha256:{artefact_hash(Path(place))}" if known else place)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """``shown``: names of the models, first and second as shown. ``answers``: by name.
    ``number``: any text that no other vote of this annotator has."""

    number: str
    messages: Sequence[Mapping[str, str]]
    answers: Mapping[str, str]
    shown: tuple[str, str]
    choice: Choice
    seconds: float | None = None


@dataclass(slots=True)
class Voting:
    """Thread-safe. ``authors``: of the two models, by name."""

    store: PreferenceStore
    authors: Mapping[str, Author]
    settings: ChatSettings
    seed: int
    tally: Counter[str] = field(default_factory=Counter)
    people: People = field(init=False)
    consent: str = field(init=False)

    def __post_init__(self) -> None:
        self.people = People(self.store)
        version = hashlib.sha256(CONSENT.encode()).hexdigest()[:8]
        self.consent = self.people.publish("consent", version, CONSENT).version

    def admit(self, who: str) -> None:
        """``who`` has read ``CONSENT`` and goes on."""
        self.people.register(Annotator(id=who, role="annotator"))
        self.people.agree(who, f"consent {self.consent}")

    def order(self) -> tuple[str, str]:
        """The names of the models, in an order drawn anew."""
        first, second = random.SystemRandom().sample(list(self.authors), 2)
        return first, second

    def cast(self, who: str, vote: Vote) -> None:
        """Store it; sent twice, it is stored once. Raises what the store raises."""
        item, judgement = self._records(who, vote)
        if self.store.judgement(judgement.id) is not None:
            return
        self.store.add([item], [judgement])
        places = {"first": vote.shown[0], "second": vote.shown[1]}
        self.tally[places.get(vote.choice, vote.choice)] += 1

    def summary(self) -> str:
        """How often each model was preferred: the first time that they are named."""
        counts = [f"{name} ({self.authors[name].path}) {self.tally[name]}" for name in self.authors]
        return (
            f"votes: {', '.join(counts)}, ties {self.tally['tie']}, both bad "
            f"{self.tally['both_bad']}"
        )

    def _records(self, who: str, vote: Vote) -> tuple[Item, Judgement]:
        item_id = derived_id("chat", who, vote.number)
        # Which one is called "a" follows from a hash, so that it tells nothing.
        names = sorted(self.authors, key=lambda name: derived_id(item_id, vote.answers[name]))
        now = utc_now()
        item = Item(
            id=item_id,
            messages=tuple(dict(message) for message in vote.messages),
            completions=tuple(self._candidate(name, vote.answers[name]) for name in names),
            source="accord chat",
            license="unknown",
            created_at=now,
        )
        shown = "".join(LETTERS[names.index(name)] for name in vote.shown)
        better = {"first": vote.shown[0], "second": vote.shown[1]}.get(vote.choice)
        ranks = tuple(1 if better in (None, name) else 2 for name in names)
        judgement = Judgement(
            id=derived_id("vote", item_id),
            item_id=item_id,
            annotator_id=who,
            answer="all_bad" if vote.choice == "both_bad" else "ranking",
            ranks=() if vote.choice == "both_bad" else ranks,
            consent=self.consent,
            created_at=now,
            shown_order=shown,
            duration_s=None if vote.seconds is None else round(vote.seconds, 1),
            source="person",
        )
        return item, judgement

    def _candidate(self, name: str, text: str) -> Candidate:
        author = self.authors[name]
        return Candidate(
            text=text,
            policy_version=author.version,
            run=author.path,
            sampling={**asdict(self.settings), "seed": self.seed},
        )


def open_voting(store: str, models: Mapping[str, str], settings: ChatSettings, seed: int) -> Voting:
    """``models``: paths by name. Raises UserError for a store that cannot be used."""
    if len(models) != 2:
        raise UserError(
            "a vote needs two models", where="--store", fix="name the second one: --before MODEL"
        )
    authors = {name: Author.of(path) for name, path in models.items()}
    return Voting(PreferenceStore(store), authors, settings, seed)


def own_pseudonym() -> str:
    """Of whoever chats at this terminal: made once, and kept beside the history."""
    file = state_folder() / PSEUDONYM
    try:
        return file.read_text("ascii").strip() or _new_pseudonym(file)
    except (OSError, ValueError):
        return _new_pseudonym(file)


def _new_pseudonym(file: Path) -> str:
    name = f"chat-{secrets.token_hex(4)}"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.write_text(name + "\n", "ascii")
    except OSError:
        return name  # another one the next time
    return name
