"""A model that answers in this process, token by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from cluster.contracts.errors import UserError
from cluster.runs.policies import policy_directory

Show = Callable[[str], None]
Score = Callable[[Sequence[Mapping[str, str]], "Reply"], float]


@dataclass(slots=True)
class ChatSettings:
    """``temperature`` 0: always the most likely token. ``max_tokens``: longest answer."""

    max_tokens: int = 256
    temperature: float = 0.7


@dataclass(frozen=True, slots=True)
class Reply:
    """``ended``: "stop" (the model ended its answer), "length" (cut at max_tokens or at the end of
    the model's positions) or "interrupted"."""

    text: str
    ended: Literal["stop", "length", "interrupted"]
    tokens: int


class Voice(Protocol):
    """One model of a chat."""

    name: str
    plain: bool  # it continues text and knows no roles

    def tokens(self, messages: Sequence[Mapping[str, str]]) -> int: ...

    @property
    def positions(self) -> int | None: ...

    def reply(
        self, messages: Sequence[Mapping[str, str]], settings: ChatSettings, show: Show
    ) -> Reply: ...


class LocalVoice:
    """A policy loaded with transformers."""

    def __init__(self, name: str, path: str) -> None:
        from cluster.assembly.adapted import AdaptedModel, adapted
        from cluster.contracts.config.base import ModelConfig
        from learner.models.load import load_policy, load_tokenizer
        from learner.models.lora import attach_saved

        config = adapted(ModelConfig(path=policy_directory(path)))
        self.name = name
        self._tokenizer = load_tokenizer(config)
        self._policy = load_policy(config).eval()
        if isinstance(config, AdaptedModel):
            attach_saved(self._policy, config.adapter)
        self.plain = not getattr(self._tokenizer, "chat_template", None)

    @property
    def positions(self) -> int | None:
        limit = getattr(self._policy.config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit else None

    def tokens(self, messages: Sequence[Mapping[str, str]]) -> int:
        return len(self._encode(messages))

    def reply(
        self, messages: Sequence[Mapping[str, str]], settings: ChatSettings, show: Show
    ) -> Reply:
        """``show`` gets each piece of text as soon as it is there. Ctrl-C (KeyboardInterrupt) ends
        the answer, which is then what was shown. Raises UserError where no answer has room."""
        import torch

        ids = self._encode(messages)
        most = settings.max_tokens
        if self.positions is not None:
            most = min(most, self.positions - len(ids))
        if most < 1:
            raise UserError(
                f"the question has {len(ids)} tokens, the model has positions for "
                f"{self.positions}, so there is no room for an answer",
                where=self.name,
                fix="ask a shorter question",
            )
        inputs = torch.tensor([ids])
        pieces = _Pieces(self._tokenizer, show)
        sampling: dict[str, Any] = {"do_sample": settings.temperature > 0}
        if settings.temperature > 0:
            sampling["temperature"] = settings.temperature
        try:
            with torch.inference_mode():
                self._policy.generate(
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    max_new_tokens=most,
                    streamer=pieces,
                    **sampling,
                )
        except KeyboardInterrupt:
            return Reply(pieces.text, "interrupted", len(pieces.ids))
        return Reply(pieces.text, "length" if len(pieces.ids) >= most else "stop", len(pieces.ids))

    def _encode(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        from cluster.contracts.chat import render_prompt

        return render_prompt(self._tokenizer, messages)


class _Pieces:
    """What transformers calls a streamer. Text is held back while its last letter is incomplete:
    a token may be only some of the bytes of a letter."""

    def __init__(self, tokenizer: Any, show: Show) -> None:
        self._tokenizer = tokenizer
        self._show = show
        self._prompt = True
        self.ids: list[int] = []
        self.text = ""

    def put(self, value: Any) -> None:
        if self._prompt:  # the first call brings the prompt
            self._prompt = False
            return
        self.ids += value.flatten().tolist()
        self._emit(whole_letters=True)

    def end(self) -> None:
        self._emit(whole_letters=False)

    def _emit(self, *, whole_letters: bool) -> None:
        text = str(self._tokenizer.decode(self.ids, skip_special_tokens=True))
        if whole_letters and text.endswith("\N{REPLACEMENT CHARACTER}"):
            return
        new = text[len(self.text) :]
        self.text = text
        if new:
            self._show(new)


def reward_scorer(path: str) -> Score:
    """Scores by a reward model: its directory, or the run that made it."""
    from cluster.contracts.config.reward import RewardModelSource
    from reward_service.source import ScoreItem
    from reward_service.sources.model import ModelScorer

    inside = Path(path) / "reward_model"
    source = RewardModelSource(path=str(inside) if inside.is_dir() else path)
    scorer = ModelScorer(source)

    def score(messages: Sequence[Mapping[str, str]], reply: Reply) -> float:
        item = ScoreItem(
            id="chat",
            messages=tuple(dict(message) for message in messages),
            response=reply.text,
            finish_reason="stop" if reply.ended == "stop" else "length",
        )
        return scorer.score([item])[0].value

    return score
