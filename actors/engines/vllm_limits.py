"""`TokenLimits` inside vLLM's sampler, and what each token was sampled from.

vLLM calls a logits processor that does not change the most probable token after it has divided by
the temperature; top-k, top-p and min-p of its own are left off.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

from actors.engines.token_limits import Kept, TokenLimits
from actors.settings import EngineSettings

_SETTINGS = "accord_settings"
_REQUEST = "accord_request"


def limit_args(settings: EngineSettings) -> dict[str, Any]:
    """Engine arguments that bring `settings` into vLLM's worker, and the limits into its sampler
    where there are any."""
    processors = {"logits_processors": [LimitsProcessor]} if settings.limits_tokens else {}
    return {**processors, "additional_config": {_SETTINGS: asdict(settings)}}


def settings_of(vllm_config: VllmConfig) -> EngineSettings:
    """What `limit_args` put there."""
    return EngineSettings(**vllm_config.additional_config[_SETTINGS])


def request_args(request_id: str) -> dict[str, Any]:
    """Marks a request as one to be limited and recorded: the canary is not."""
    return {_REQUEST: request_id}


def request_of(params: SamplingParams) -> str | None:
    """The id that `request_args` put there; None: a canary's."""
    name: str | None = (params.extra_args or {}).get(_REQUEST)
    return name


class LimitsProcessor(LogitsProcessor):
    """Limits the marked requests of the batch. `kept`: request -> ids each token was sampled from,
    where these vary from token to token."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._limits = TokenLimits(
            settings_of(vllm_config), vllm_config.model_config.get_vocab_size()
        )
        self._rows: dict[int, tuple[str, list[int]]] = {}  # row -> request, its tokens so far
        self.kept: dict[str, list[Kept]] = {}

    def is_argmax_invariant(self) -> bool:
        """So that vLLM applies it after the temperature. (It asks only to spare greedy requests the
        work, and ours are never greedy: `rollout.temperature` has a lower limit.)"""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, _row)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        rows = sorted(self._rows)
        if not rows:
            return logits
        places = [len(self._rows[row][1]) for row in rows]
        if len(rows) == len(logits):
            kept = self._limits.apply(logits, places)
        else:
            index = torch.tensor(rows, device=logits.device)
            ours = logits[index]
            kept = self._limits.apply(ours, places)
            logits[index] = ours
        for row, place, ids in zip(rows, places, kept or (), strict=kept is not None):
            known = self.kept.setdefault(self._rows[row][0], [])
            # A row that is still reading its prompt is sampled as well, and its token dropped.
            known[place:] = [ids]
        return logits


def _row(
    params: SamplingParams, prompt: list[int] | None, output: list[int]
) -> tuple[str, list[int]] | None:
    """vLLM goes on extending `output`, the list itself, as it samples."""
    request = request_of(params)
    return None if request is None else (request, output)
