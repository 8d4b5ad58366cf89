"""`accord label --policy RUN`: new completions from the newest policy while people label.

Whenever few items are left, a round begins: `accord generate` runs as a child process, with the
real engine, and what it wrote becomes items. With ``choice``, these are the pairs that `accord
preferences choose` takes, in a second child process, which loads the reward model. A round that
fails is told and tried again later; the pages go on. Each round looks for the newest policy, so the
completions follow a run in progress.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.contracts.chat import is_text
from cluster.contracts.config.choice import ChoiceConfig
from cluster.contracts.config.file import read_toml
from cluster.contracts.config.label import LabelConfig, LabelLiveConfig
from cluster.contracts.errors import AccordError, UserError
from cluster.contracts.rows.messages import Messages
from cluster.contracts.rows.reader import read_rows
from cluster.contracts.rows.shapes import prompt_shape
from cluster.pages.labelling.items import read_items
from cluster.runs.policies import policy_directory, version_of
from reward_service.preferences.labelling import Labelling
from reward_service.preferences.records import Item, prompt_hash, utc_now
from reward_service.preferences.store import PreferenceStore

LOOK_EVERY_S = 2.0
AFTER_FAILURE_S = 30.0
STOP_S = 20.0
CHOSEN_FROM = 4  # completions per prompt, where pairs of them are chosen
LAST_WORDS = 300  # characters of what a failed child said

Accord = Callable[[Sequence[str]], None]
"""Runs `accord` with these words to its end. Raises AccordError where it fails."""


class LiveSampling:
    """A thread that keeps ``live.ahead`` items waiting. Raises UserError for a policy or prompts
    that cannot be used."""

    def __init__(
        self,
        config: LabelConfig,
        labelling: Labelling,
        say: Callable[[str], None],
        accord: Accord | None = None,
    ) -> None:
        assert config.live.policy is not None
        self._live = config.live
        self._run = config.live.policy
        self._completions = config.data.completions
        self._choice = config.choice
        self._samples = config.live.samples or (CHOSEN_FROM if config.choice else self._completions)
        self._license = config.data.license
        self._labelling = labelling
        self._say = say
        self._child = _Child()
        self._accord = accord or self._child.run
        policy_directory(self._run)
        self._prompts = _prompts(config.live)
        self._stopping = threading.Event()
        self._asked = threading.Event()
        self._told = "Live sampling has not begun."
        self._added = 0
        self._thread = threading.Thread(target=self._work, name="accord-live", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the child and the thread."""
        self._stopping.set()
        self._child.stop()
        self._thread.join(STOP_S)

    def status(self) -> str:
        """One sentence for the pages."""
        return self._told

    def ask(self) -> None:
        """Somebody has nothing left, however many items are free for others."""
        self._asked.set()

    def _work(self) -> None:
        while not self._stopping.is_set():
            wait = LOOK_EVERY_S
            try:
                if self._asked.is_set() or self._free() < self._live.ahead:
                    self._asked.clear()
                    self.round()
            except Exception as problem:  # the pages go on without new items
                wait = AFTER_FAILURE_S
                if not self._stopping.is_set():
                    self._tell(f"Live sampling failed and is tried again: {problem}")
            self._stopping.wait(wait)

    def _free(self) -> int:
        progress = self._labelling.progress()
        return progress.items - progress.done - progress.leased

    def round(self) -> int:
        """One round, whatever is waiting; how many items it added."""
        policy = policy_directory(self._run)
        version = version_of(policy)
        self._told = f"Live sampling: {version} of {self._run} is writing new completions."
        store = self._labelling.store
        known = Counter(prompt_hash(item.messages) for item in store.items())
        chosen = next_prompts(self._prompts, known, self._live.prompts_per_round, self._live.seed)
        seed = self._live.seed + sum(known.values())  # another one in each round
        with tempfile.TemporaryDirectory() as folder:
            prompts, out = Path(folder) / "prompts.jsonl", Path(folder) / "completions.jsonl"
            prompts.write_text("".join(_prompt_row(one) for one in chosen), encoding="utf-8")
            self._accord(generate_words(policy, prompts, out, self._samples, seed, self._live))
            if self._choice is not None:
                every, out = out, Path(folder) / "items.jsonl"
                self._accord(choose_words(every, out, seed, self._choice))
            read = read_items(
                str(out),
                completions=self._completions,
                license=self._license,
                created_at=utc_now(),
            )
        sampling = {
            "temperature": self._live.temperature,
            "max_tokens": self._live.max_tokens,
            "seed": seed,
        }
        items = [_with_provenance(item, self._run, version, sampling) for item in read.items]
        added = add_new(store, items)
        self._labelling.prioritise({item.id: float(seed) for item in items})  # the newest first
        self._added += added
        self._tell(f"Live sampling: {self._added} items so far, the last {added} from {version}.")
        if not added:
            raise UserError(
                "the policy wrote the same completion each time, or one that is known already",
                where=self._run,
                fix="raise live.temperature",
            )
        return added

    def _tell(self, text: str) -> None:
        if text != self._told:
            self._say(text)
        self._told = text


class _Child:
    """`accord` as a process of its own, one at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, words: Sequence[str]) -> None:
        with self._lock:
            if self._stopped:
                raise AccordError("the page is being stopped")
            self._process = subprocess.Popen(
                [sys.executable, "-m", "launch", *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
        _, said = self._process.communicate()
        if self._process.returncode != 0:
            raise AccordError(said.strip()[-LAST_WORDS:] or f"code {self._process.returncode}")

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            if self._process is not None and self._process.poll() is None:
                self._process.terminate()


def generate_words(
    policy: str, prompts: Path, out: Path, samples: int, seed: int, live: LabelLiveConfig
) -> list[str]:
    """The command line of a round."""
    return [
        *("generate", policy, str(prompts), "--out", str(out), "--quiet"),
        *("--samples", str(samples), "--seed", str(seed)),
        *("--max-tokens", str(live.max_tokens), "--temperature", str(live.temperature)),
    ]


def choose_words(completions: Path, out: Path, seed: int, choice: ChoiceConfig) -> list[str]:
    """The command line that chooses pairs of a round's completions."""
    keys = choice.model_dump(exclude_defaults=True)
    return [
        *("preferences", "choose", str(completions), "--out", str(out), "--seed", str(seed)),
        *(f"{key}={value}" for key, value in keys.items()),
    ]


def next_prompts(
    prompts: Sequence[Messages], known: Mapping[str, int], count: int, seed: int
) -> list[Messages]:
    """Those with the fewest items, in an order that follows from ``seed``."""
    order = list(range(len(prompts)))
    random.Random(seed).shuffle(order)
    place = {at: n for n, at in enumerate(order)}
    least = sorted(order, key=lambda at: (known.get(prompt_hash(prompts[at]), 0), place[at]))
    return [prompts[at] for at in least[:count]]


def add_new(store: PreferenceStore, items: Iterable[Item]) -> int:
    """Adds the items that are not there yet, however long ago the others came; how many."""
    known = {item.id for item in store.items()}
    new = {item.id: item for item in items if item.id not in known}
    return store.add_items(new.values())


def _prompts(live: LabelLiveConfig) -> list[Messages]:
    path = live.prompts or _prompts_of_run(Path(live.policy or ""))
    read = read_rows(path, "train", lambda _, columns: prompt_shape(columns).messages)
    return list({prompt_hash(messages): messages for messages in read.items}.values())


def _prompts_of_run(run: Path) -> str:
    config = run / "config.toml"
    data = read_toml(str(config)).get("data") if config.is_file() else None
    path = data.get("prompts") if isinstance(data, dict) else None
    if not isinstance(path, str):
        raise UserError(
            "it is not known which prompts the policy is to answer",
            where=str(run),
            fix="name a file of prompts: live.prompts=prompts.jsonl",
        )
    return path


def _prompt_row(messages: Messages) -> str:
    prompt: Any = messages[0]["content"] if is_text(messages) else list(messages)
    return json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n"


def _with_provenance(item: Item, run: str, version: str, sampling: Mapping[str, Any]) -> Item:
    candidates = tuple(
        replace(one, run=run, policy_version=version, sampling=sampling) for one in item.completions
    )
    return replace(item, completions=candidates, source=run)
