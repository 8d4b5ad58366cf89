"""Token ids -> text for people and reward functions, and the strings that end a completion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from actors.settings import EngineSettings
from cluster.contracts.errors import UserError

Text = Callable[[Sequence[int]], str]
"""Token ids of one completion -> its text, special tokens left out."""

_TOKENS_OF_A_CHARACTER = 4  # at most: a token can be a single byte


class StopStrings:
    """A completion ends with the token that completes one of `stops`.

    The tokens of the string stay in the completion: they were sampled, and are trained like the end
    token of any other. Its text ends before the string.
    """

    def __init__(self, stops: Sequence[str], text: Text) -> None:
        self._stops = stops
        self._text = text
        self._tail = _TOKENS_OF_A_CHARACTER * (max(map(len, stops), default=0) + 1)

    def ends(self, ids: Sequence[int]) -> bool:
        """Whether the last of `ids` completes a stop string."""
        tail = ids[-self._tail :]
        return bool(self._stops) and self._start(tail, self._text(tail)) is not None

    def cut(self, ids: Sequence[int], text: str) -> str:
        """`text` of `ids` without the stop string that ended it, if one did."""
        if not any(stop in text for stop in self._stops):
            return text
        return text[: self._start(ids, text)]

    def _start(self, ids: Sequence[int], text: str) -> int | None:
        """Where the stop string begins that the last token completed. One that was there before it
        did not end the completion, as it came before `min_tokens`."""
        before = len(self._text(ids[:-1]))
        # The first that ends behind `before`.
        places = [text.find(stop, max(0, before - len(stop) + 1)) for stop in self._stops]
        return min((place for place in places if place >= 0), default=None)


def make_text(settings: EngineSettings) -> Text:
    """By the model's own tokenizer. Raises UserError when it cannot be loaded."""
    return _text_by(_tokenizer(settings))


def make_decoder(settings: EngineSettings) -> Callable[[Sequence[Sequence[int]]], list[str]]:
    """Token ids of many completions -> their texts, special tokens and stop strings left out.

    Raises UserError when the model's tokenizer cannot be loaded.
    """
    tokenizer = _tokenizer(settings)
    stops = StopStrings(settings.stop, _text_by(tokenizer))

    def decode(completions: Sequence[Sequence[int]]) -> list[str]:
        rows = [list(ids) for ids in completions]
        texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [stops.cut(ids, str(text)) for ids, text in zip(rows, texts, strict=True)]

    return decode


def _text_by(tokenizer: Any) -> Text:
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True))


def _tokenizer(settings: EngineSettings) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            settings.model_path,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
        )
    except (OSError, ValueError) as problem:
        raise UserError(
            f"cannot load the tokenizer: {problem}",
            where=settings.model_path,
            fix="keep the tokenizer's files beside the model's",
        ) from None
