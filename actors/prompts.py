"""Prompts in a fixed, seekable order.

``cluster.contracts.rows`` reads the files and knows their shapes. All rows are read, checked and
tokenised before training starts, so that row 90 000 cannot end a run in its second hour.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from typing import Any

from cluster.contracts.chat import TemplateRefusal, is_text, render_prompt, require_template
from cluster.contracts.config.rollout import DataConfig
from cluster.contracts.errors import UserError
from cluster.contracts.records import Prompt
from cluster.contracts.rows.files import BadRow, Columns, Place
from cluster.contracts.rows.reader import NOTHING, LeftOut, read_rows
from cluster.contracts.rows.shapes import prompt_shape


class FilePromptSource:
    """``PromptSource`` over a list. ``prompt(n)`` depends on n, the seed and the file alone.

    Each epoch is a permutation of its own, so the position in the data is just a number and
    resuming needs no other state. ``skipped`` counts the rows left out as too long, ``left_out``
    those left out as bad.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        seed: int,
        shuffle: bool = True,
        skipped: int = 0,
        left_out: LeftOut = NOTHING,
    ) -> None:
        if not prompts:
            raise ValueError("no prompts")
        self._prompts = tuple(prompts)
        self._seed = seed
        self._shuffle = shuffle
        self.skipped = skipped
        self.left_out = left_out
        self._epoch = -1
        self._order: list[int] = []

    def __len__(self) -> int:
        return len(self._prompts)

    def left_out_lines(self) -> list[str]:
        """For people: what was left out, if anything."""
        lines = []
        if self.skipped:
            lines.append(f"left out {self.skipped} prompts longer than allowed")
        if self.left_out.count:
            lines.append(str(self.left_out))
        return lines

    def all(self) -> tuple[Prompt, ...]:
        """Every prompt once, in the order of the file."""
        return self._prompts

    def prompt(self, ordinal: int) -> Prompt:
        """The ordinal-th prompt ever admitted, from 0; without end."""
        if ordinal < 0:
            raise IndexError(f"prompt {ordinal}")
        epoch, place = divmod(ordinal, len(self._prompts))
        if not self._shuffle:
            return self._prompts[place]
        if epoch != self._epoch:
            order = list(range(len(self._prompts)))
            random.Random(f"prompts/{self._seed}/{epoch}").shuffle(order)
            self._epoch, self._order = epoch, order
        return self._prompts[self._order[place]]


def load_prompts(
    cfg: DataConfig, tokenizer: Any, seed: int, room: int | None = None
) -> FilePromptSource:
    """Read, check and tokenise everything ``cfg.prompts`` names. ``room``: tokens that the model's
    context leaves for a prompt.

    Raises UserError naming file and row for what ``read_rows`` raises, a row without a prompt
    (unless ``skip_bad_rows``), a prompt over ``max_prompt_tokens`` or ``room`` (unless
    ``skip_long_prompts``), and chat messages with a tokenizer that has no template.
    """
    limit = min(cfg.max_prompt_tokens, room or cfg.max_prompt_tokens)
    skipped = 0

    def make(place: Place, columns: Columns) -> Prompt | None:
        nonlocal skipped
        prompt = _prompt(columns, cfg.prompt_key, tokenizer, place)
        tokens = len(prompt.token_ids)
        if tokens <= limit:
            return prompt
        if not cfg.skip_long_prompts:
            raise _too_long(tokens, cfg.max_prompt_tokens, room, place.where)
        skipped += 1
        return None

    read = read_rows(cfg.prompts, cfg.split, make, skip_bad=cfg.skip_bad_rows)
    prompts = [prompt for prompt in read.items if prompt is not None]
    if not prompts:
        raise UserError(
            f"all {skipped} prompts are too long",
            where=cfg.prompts,
            fix=f"raise data.max_prompt_tokens (now {cfg.max_prompt_tokens}), or give shorter ones",
        )
    return FilePromptSource(prompts, seed, cfg.shuffle, skipped, read.left_out)


def _too_long(tokens: int, most: int, room: int | None, where: str) -> UserError:
    if room is not None and room < most:
        limit = f"the model's context leaves {room} beside rollout.max_tokens"
        fix = "shorten the prompt, lower rollout.max_tokens"
    else:
        limit, fix = f"data.max_prompt_tokens is {most}", "raise data.max_prompt_tokens"
    return UserError(
        f"the prompt has {tokens} tokens, {limit}",
        where=where,
        fix=f"{fix}, or set data.skip_long_prompts = true",
    )


def _prompt(columns: Columns, key: str, tokenizer: Any, place: Place) -> Prompt:
    shape = prompt_shape(columns, key)
    if not is_text(shape.messages):
        require_template(tokenizer, place.where)
    try:
        token_ids = tuple(render_prompt(tokenizer, shape.messages))
    except TemplateRefusal as problem:
        raise BadRow(problem.what, problem.fix) from problem
    if not token_ids:
        raise BadRow("the tokenizer makes no token of the prompt")
    content = json.dumps(shape.messages, ensure_ascii=False, sort_keys=True).encode()
    return Prompt(
        id=f"{place.number:07d}-{hashlib.sha256(content).hexdigest()[:16]}",
        messages=shape.messages,
        token_ids=token_ids,
        metadata=shape.metadata,
        where=place.where,
    )
