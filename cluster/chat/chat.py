"""`accord chat`: loads the models, and opens the terminal or the page."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import nullcontext

from cluster.chat.ballot import Ballot
from cluster.chat.line_editing import line_editing
from cluster.chat.safe_voice import SafeVoice, load_safety
from cluster.chat.session import HELP, ChatSession
from cluster.chat.voice import ChatSettings, LocalVoice, Voice, reward_scorer
from cluster.chat.voting import open_voting, own_pseudonym
from cluster.machine.signals import signals_given_up


def chat_loop(
    model: str,
    before: str | None,
    *,
    settings: ChatSettings,
    seed: int,
    reward: str | None = None,
    safety: str | None = None,
    remember: bool = True,
    store: str | None = None,
) -> None:
    """Talk to ``model``, or to it and ``before`` side by side, at the terminal or from a pipe.
    ``safety``: a file with the keys of the safety layer. ``store``: the preference store that the
    votes go into; None: no votes."""
    # Beside a vote no score is shown: it would sway the vote.
    score = reward_scorer(reward) if reward is not None and store is None else None
    named = names_of(model, before)
    voting = open_voting(store, named, settings, seed) if store is not None else None
    voices = load_voices(named, seed, safety)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    session = ChatSession(
        voices,
        settings,
        input if interactive else _read_piped,
        _write,
        score=score,
        remember=remember,
        interactive=interactive,
        ballot=None if voting is None else Ballot(voting, own_pseudonym()),
    )
    words = [name.partition(" ")[0] for name in HELP]
    with signals_given_up(), line_editing(words) if interactive else nullcontext():
        session.run()
    if voting is not None:
        _write(voting.summary() + "\n")


def names_of(model: str, before: str | None) -> dict[str, str]:
    return {"model": model} if before is None else {"before": before, "after": model}


def load_voices(named: Mapping[str, str], seed: int, safety: str | None) -> list[Voice]:
    import torch

    from cluster.machine.torch_state import prepare_torch

    prepare_torch()
    layer = load_safety(safety) if safety is not None else None
    voices: list[Voice] = [LocalVoice(name, path) for name, path in named.items()]
    torch.manual_seed(seed)
    return voices if layer is None else [SafeVoice(voice, layer) for voice in voices]


def _read_piped(prompt: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
