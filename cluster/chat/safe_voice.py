"""A voice whose answers pass the safety layer before anybody reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cluster.chat.voice import ChatSettings, Reply, Show, Voice
from cluster.contracts.config.file import load_config
from cluster.contracts.config.safety import SafetyConfig
from reward_service.safety.layer import SafetyLayer


def load_safety(path: str) -> SafetyLayer:
    """Raises UserError for a file, a rule or a classifier that cannot be used."""
    return SafetyLayer(load_config(SafetyConfig, path), "chat")


class SafeVoice:
    """The whole answer is written before any of it is shown: half of a word that is to be
    rewritten could not be taken back. A vetoed answer becomes the refusal, also in what the model
    sees of the conversation later."""

    def __init__(self, voice: Voice, layer: SafetyLayer) -> None:
        self._voice = voice
        self._layer = layer
        self.name, self.plain = voice.name, voice.plain

    @property
    def positions(self) -> int | None:
        return self._voice.positions

    def tokens(self, messages: Sequence[Mapping[str, str]]) -> int:
        return self._voice.tokens(messages)

    def reply(
        self, messages: Sequence[Mapping[str, str]], settings: ChatSettings, show: Show
    ) -> Reply:
        reply = self._voice.reply(messages, settings, lambda piece: None)
        [finding] = self._layer.check([(messages, reply.text)])
        text = self._layer.config.refusal if finding.vetoed else finding.text
        show(text)
        return replace(reply, text=text)
