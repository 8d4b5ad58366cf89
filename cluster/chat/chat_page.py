"""`accord chat --page`: two models on a page, and a vote after each question."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.chat.chat import load_voices, names_of
from cluster.chat.voice import ChatSettings, Voice
from cluster.chat.voting import CONSENT, Vote, Voting, open_voting
from cluster.contracts.errors import UserError
from cluster.pages.access import LOOPBACK, Access
from cluster.pages.chat_room import ChatRoom, Messages, Round
from cluster.pages.chat_site import chat_app, invitation_address
from cluster.pages.server import PageServer
from cluster.runs.console import Reporter, result


@dataclass(frozen=True, slots=True)
class ChatPage:
    """``invitation``: an address that lets one visitor in, once."""

    server: PageServer
    voting: Voting
    invitation: str

    def stop(self) -> str:
        """Ends the server; returns how often each model was preferred."""
        self.server.stop()
        return self.voting.summary()


def serve_until_stopped(
    model: str,
    before: str,
    store: str,
    *,
    settings: ChatSettings,
    seed: int,
    safety: str | None,
    remember: bool,
    port: int,
) -> None:
    """Prints the invitation; ends by Ctrl-C. Raises UserError for what cannot be used."""
    named = names_of(model, before)
    voting = open_voting(store, named, settings, seed)
    page = serve(voting, load_voices(named, seed, safety), remember=remember, port=port)
    reporter = Reporter()
    reporter.say("Open this address in a browser. It works once. Ctrl-C ends the page.")
    result(page.invitation)
    try:
        threading.Event().wait()
    finally:
        reporter.tell(page.stop())


def serve(voting: Voting, voices: Sequence[Voice], *, remember: bool, port: int) -> ChatPage:
    def answer(messages: Messages) -> Mapping[str, str]:
        return {voice.name: _answer(voice, messages, voting.settings) for voice in voices}

    def cast(who: str, shown: Round) -> None:
        assert shown.choice
        vote = Vote(
            number=shown.number,
            messages=shown.messages,
            answers=shown.answers,
            shown=shown.shown,
            choice=shown.choice,
        )
        voting.cast(who, vote)

    plain = any(voice.plain for voice in voices)
    room = ChatRoom(answer, cast, voting.order, remember=remember, plain=plain)
    app = chat_app(room, voting.people, CONSENT, voting.admit)
    access = Access(hosts=LOOPBACK, asks_token=False)  # there are sessions
    server = PageServer(app, access, "127.0.0.1", port)
    return ChatPage(server, voting, invitation_address(server.url, voting.people))


def _answer(voice: Voice, messages: Messages, settings: ChatSettings) -> str:
    positions = voice.positions
    if positions is not None and voice.tokens(messages) + 1 > positions:
        raise UserError(
            "the conversation is too long for one of the models",
            fix="Begin a new conversation.",
        )
    return voice.reply(messages, settings, lambda piece: None).text
