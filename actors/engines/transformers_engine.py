"""A small engine on transformers, where vLLM has no build. Same protocol, same numbers, slower."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.initialization import no_init_weights

from actors.decoding import StopStrings, make_text
from actors.engines.host_tensors import check_prompt, checked, published_tensors
from actors.engines.proof import differing, fingerprint, require_none_wrong
from actors.engines.token_limits import Kept, TokenLimits
from actors.settings import EngineSettings
from cluster.contracts.errors import AccordError, EngineFailure, Retryable, UserError
from cluster.contracts.records import Completion, FinishReason, VersionSpan
from cluster.machine.torch_state import prepare_torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _no_text(ids: Sequence[int]) -> str:
    """Without stop strings nobody asks for a text, and no tokenizer is needed."""
    return ""


def _model(settings: EngineSettings) -> Any:
    source = {
        "revision": settings.revision,
        "trust_remote_code": settings.trust_remote_code,
    }
    kind: dict[str, Any] = {"dtype": DTYPES[settings.dtype], "attn_implementation": "eager"}
    if settings.weights == "disk":
        return AutoModelForCausalLM.from_pretrained(settings.model_path, **source, **kind)
    config = AutoConfig.from_pretrained(settings.model_path, **source)
    with no_init_weights():  # drawing random numbers takes minutes for a large model
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=settings.trust_remote_code, **kind
        )
    model.tie_weights()
    return model


@dataclass(slots=True)
class _Row:
    request_id: str
    prompt: tuple[int, ...]
    generator: torch.Generator
    temperature: float
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    starts: list[tuple[int, int]] = field(default_factory=list)  # (version, first token)
    kept: list[Kept] = field(default_factory=list)  # ids each token was sampled from


class TransformersEngine:
    """``cluster.contracts.protocols.Engine`` as one left-padded batch that decodes together.

    Waiting requests join when half the batch is free (joining recomputes the whole batch's cache).
    After a swap the cache is recomputed, or kept with ``kv_on_swap = "keep"``.
    """

    def __init__(self, settings: EngineSettings) -> None:
        if settings.adapters is not None:
            raise UserError(
                "several adapters beside each other are served by vLLM alone",
                where="rollout.engine",
                fix="use rollout.engine = 'vllm' on a machine that has it",
            )
        if settings.quantization != "none":
            raise UserError(
                "an engine in 8 bits is vLLM",
                where="rollout.quantization",
                fix="leave it out, or use rollout.engine = 'vllm' on a machine that has it",
            )
        self.name = f"transformers {transformers.__version__}"
        self.version = -1
        self._settings = settings
        prepare_torch()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = _model(settings)
        self._model.to(self._device).eval()
        self._parameters = published_tensors(self._model)
        self._shapes = {name: tuple(p.shape) for name, p in self._parameters.items()}
        self._second: dict[str, torch.Tensor] = {}  # the other set of weights
        self._staged: int | None = None
        self._expected: dict[str, str] = {}  # digests of the update that was staged last
        self._vocab = int(self._model.get_input_embeddings().weight.shape[0])
        self._limits = TokenLimits(settings, self._vocab)
        self._stops = StopStrings(settings.stop, make_text(settings) if settings.stop else _no_text)
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []
        self._cache: DynamicCache | None = None
        self._mask = torch.zeros(0, 0, dtype=torch.long)

    def submit(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        seed: int | None,
        temperature: float | None = None,
        adapter: str = "",
    ) -> None:
        """Queue one sample. Raises UserError when the prompt cannot be answered."""
        if adapter:
            raise UserError(f"this engine has no adapters, so none called {adapter!r}")
        prompt = tuple(prompt_ids)
        check_prompt(prompt, self._settings, self._vocab)
        own = self._generator if seed is None else torch.Generator().manual_seed(seed)
        warmth = self._settings.temperature if temperature is None else temperature
        self._waiting.append(_Row(request_id, prompt, own, warmth))

    def abort(self, request_ids: Sequence[str]) -> None:
        gone = set(request_ids)
        self._waiting = deque(row for row in self._waiting if row.request_id not in gone)
        self._keep([i for i, row in enumerate(self._rows) if row.request_id not in gone])

    @property
    def unfinished(self) -> int:
        return len(self._waiting) + len(self._rows)

    def counters(self) -> dict[str, float]:
        return {
            "running": len(self._rows),
            "unfinished_tokens": sum(len(row.tokens) for row in self._rows),
        }

    def close(self) -> None:
        self._rows, self._cache = [], None
        self._waiting.clear()

    @torch.inference_mode()
    def step(self) -> list[tuple[str, Completion]]:
        free = self._settings.max_running - len(self._rows)
        # Joining recomputes the cache of all, so it waits until it pays for many at once.
        if self._waiting and 2 * free >= self._settings.max_running:
            while self._waiting and len(self._rows) < self._settings.max_running:
                self._rows.append(self._waiting.popleft())
            self._cache = None
        if not self._rows:
            return []
        logits = self._forward() / torch.tensor([[row.temperature] for row in self._rows])
        kept = None
        if self._limits.any:
            kept = self._limits.apply(logits, [len(row.tokens) for row in self._rows])
        logprobs = torch.log_softmax(logits, dim=-1)
        if not bool(torch.isfinite(logprobs.amax(dim=-1)).all()):
            raise EngineFailure(f"{self.name} computed a probability that is not finite")
        done = []
        for place, (row, distribution) in enumerate(zip(self._rows, logprobs, strict=True)):
            self._sample(row, distribution)
            if kept is not None:
                row.kept.append(kept[place])
            if reason := self._finish_reason(row):
                done.append((row, self._completion(row, reason)))
        if done:
            ended = {id(row) for row, _ in done}
            self._keep([i for i, row in enumerate(self._rows) if id(row) not in ended])
        return [(row.request_id, completion) for row, completion in done]

    def _forward(self) -> torch.Tensor:
        """Next-token logits [rows, vocabulary] in float32."""
        if self._cache is None:
            self._cache = DynamicCache(config=self._model.config)
            ids, self._mask = self._left_padded()
        else:
            ids = torch.tensor([[row.tokens[-1]] for row in self._rows], device=self._device)
            self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float().cpu()

    def _left_padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, mask) [rows, longest] of prompts and what was generated so far."""
        sequences = [[*row.prompt, *row.tokens] for row in self._rows]
        longest = max(len(sequence) for sequence in sequences)
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, sequence in enumerate(sequences):
            ids[i, longest - len(sequence) :] = torch.tensor(sequence)
            mask[i, longest - len(sequence) :] = 1
        return ids.to(self._device), mask.to(self._device)

    def _sample(self, row: _Row, logprobs: torch.Tensor) -> None:
        token = int(torch.multinomial(logprobs.exp(), 1, generator=row.generator))
        if not row.starts or row.starts[-1][0] != self.version:
            row.starts.append((self.version, len(row.tokens)))
        row.tokens.append(token)
        row.logprobs.append(float(logprobs[token]))

    def _completion(self, row: _Row, reason: FinishReason) -> Completion:
        ends = [start for _, start in row.starts[1:]] + [len(row.tokens)]
        return Completion(
            token_ids=array("i", row.tokens),
            logprobs=array("f", row.logprobs),
            versions=tuple(
                VersionSpan(version=version, start=start, end=end)
                for (version, start), end in zip(row.starts, ends, strict=True)
            ),
            finish_reason=reason,
            sampled_from=self._limits.sets(len(row.tokens), row.kept),
        )

    def _finish_reason(self, row: _Row) -> FinishReason | None:
        if row.tokens[-1] in self._settings.stop_token_ids:
            return "stop"
        if len(row.tokens) > self._settings.min_tokens and self._stops.ends(row.tokens):
            return "stop"
        return "length" if len(row.tokens) >= self._settings.max_tokens else None

    def _keep(self, places: list[int]) -> None:
        if len(places) == len(self._rows):
            return
        self._rows = [self._rows[i] for i in places]
        if not places:
            self._cache = None
        elif self._cache is not None:
            index = torch.tensor(places, device=self._device)
            self._cache.batch_select_indices(index)
            self._mask = self._mask[index]

    @torch.no_grad()
    def stage(self, tensors: Iterable[tuple[str, Any]], version: int) -> None:
        """Copy an update beside the weights in force; any thread, while another steps.

        The engine goes on with what it has, whatever happens here. Raises WeightMismatch when names
        or shapes do not fit, Retryable when copying fails (out of memory).
        """
        self._staged, self._expected = None, {}
        try:
            for name, tensor in checked(self._shapes, tensors):
                parameter = self._parameters[name]
                if name not in self._second:
                    self._second[name] = torch.empty_like(parameter)
                self._second[name].copy_(tensor)
                # Of what was published, not of the copy made of it.
                self._expected |= self._digest(name, tensor)
        except AccordError:
            raise
        except Exception as problem:
            raise Retryable(
                f"{self.name} failed staging version {version}, version {self.version} stays in "
                f"force: {problem}"
            ) from problem
        self._staged = version

    def _digest(self, name: str, tensor: torch.Tensor) -> dict[str, str]:
        """Of one tensor as the model holds it: its device, its type."""
        held = self._parameters[name]
        return fingerprint({name: tensor.to(held.device, held.dtype)})

    def swap(self, version: int) -> None:
        """Exchange the two sets of weights between two steps."""
        if self._staged != version:
            raise EngineFailure(
                f"{self.name} was to swap in version {version}, staged is {self._staged}"
            )
        self._staged = None
        for name, parameter in self._parameters.items():
            staged = self._second[name]
            parameter.data, staged.data = staged.data, parameter.data
        self.version = version
        if self._settings.kv_on_swap == "recompute":
            self._cache = None

    @torch.no_grad()
    def prove(self) -> None:
        """Raise WeightMismatch unless the next step computes with exactly what was published.

        Any thread, while another steps: the model's own tensors are compared with digests of the
        published arrays, not of the copy made of them.
        """
        found: dict[str, str] = {}
        for name, tensor in published_tensors(self._model).items():  # one by one: memory
            found |= self._digest(name, tensor)
        wrong = differing(self._expected, found)
        require_none_wrong(wrong, self.name, self.version)

    @torch.inference_mode()
    def sequence_logprobs(self, token_ids: Sequence[int], adapter: str = "") -> list[float]:
        ids = torch.tensor([list(token_ids)], device=self._device)
        logprobs = torch.log_softmax(self._model(input_ids=ids).logits[0, :-1].float(), dim=-1)
        return logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()
