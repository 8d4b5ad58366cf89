"""vLLM inside a worker's own process: the one door to vllm.

``LLMEngine`` is driven step by step by one thread: a weight swap falls exactly between two tokens.
Call ``actors.environment.prepare_environment`` before this module is imported.

Run on every change on a CPU, tensor parallelism included. On CUDA vLLM 0.26 ran once, with one GPU
(``docs/results.md``); divided engines never did.

Weights are loaded as they come and packed into a second set beside the one that decodes
(``actors.engines.vllm_weights``, for a divided engine ``vllm_parts``); the swap only exchanges the
two.
"""

from __future__ import annotations

import math
import threading
import time
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import vllm
from vllm import SamplingParams
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from actors.engines.host_tensors import check_prompt, checked, parameter_shapes, to_tensor
from actors.engines.lora_kernels import use_grouped_kernels
from actors.engines.proof import require_none_wrong
from actors.engines.token_limits import Drawn, Kept, TokenLimits
from actors.engines.vllm_adapters import ServedAdapters
from actors.engines.vllm_args import engine_args, why_single_steps
from actors.engines.vllm_limits import request_args
from actors.engines.vllm_parts import CALL_S, Parts
from actors.settings import EngineSettings
from cluster.contracts.errors import (
    AccordError,
    EngineFailure,
    Retryable,
    UserError,
    WeightMismatch,
)
from cluster.contracts.records import Completion, VersionSpan

PROBE_TIMEOUT_S = 120.0  # a failed step can leave vLLM's request unfinished for ever


@dataclass(frozen=True, slots=True)
class _Request:
    prompt: tuple[int, ...]
    seed: int | None
    temperature: float
    adapter: str = ""


class VllmEngine:
    """``cluster.contracts.protocols.Engine`` on vLLM. One thread makes every call but ``stage``.

    A request that has begun keeps its tokens, log-probabilities and versions across a swap. With
    ``kv_on_swap = "recompute"`` its cache is computed again under the new weights; with "keep" it
    goes on with what it has. In both, no request that begins after a swap is served from a prefix
    cached before it.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.name = f"vllm {vllm.__version__}"
        self.version = -1  # the model directory's weights; an update has a version of 0 or more
        self._settings = settings
        if settings.adapters is not None:
            use_grouped_kernels()
        self._shapes = parameter_shapes(settings)
        self._llm = LLMEngine.from_engine_args(engine_args(settings))
        self._adapters: ServedAdapters | None = None
        if settings.adapters is not None:
            self._adapters = ServedAdapters(settings.adapters, self._in_worker)
        self._parts = Parts(self._ask_parts) if settings.tensor_parallel > 1 else None
        self._stepping = threading.Lock()  # the second set of weights is built between two steps
        self._prepared = False
        self._staged: int | None = None
        self._vocab = self._llm.model_config.get_vocab_size()
        self._limits = TokenLimits(settings, self._vocab)
        # Older releases do not say which weights sampled a token: then we count ourselves.
        self._native_versions = hasattr(self._llm, "set_weight_version") and (
            "weight_versions" in CompletionOutput.__dataclass_fields__
        )
        self._own_starts: dict[str, list[tuple[int, int]]] = {}
        self._own_counts: dict[str, int] = {}
        self._waiting: deque[tuple[str, _Request]] = deque()
        self._running: dict[str, _Request] = {}
        self._early: list[tuple[str, Completion]] = []  # finished while a canary ran
        self._cached_tokens = 0
        self._probes = 0
        self._probe_output: RequestOutput | None = None
        self._drawn = self._prepare_multistep()
        self._label()
        self._warm_up()

    def _prepare_multistep(self) -> dict[str, Drawn] | None:
        """What the runner samples, by request; None: vLLM's own loop is used."""
        reason = why_single_steps(self._settings)
        if not reason:
            drawn: dict[str, Drawn]
            reason, drawn = self._llm.collective_rpc("accord_multistep")[0]
            if not reason:
                return drawn
            self._llm.engine_core.engine_core.scheduler.num_lookahead_tokens = 0
        self.name += f" (its own loop: {reason})"
        return None

    def _warm_up(self) -> None:
        """A first forward pass, so that a model vLLM cannot run fails here, at the start."""
        try:
            self.sequence_logprobs([0, 0])
        except Exception as problem:
            raise UserError(
                f"{self.name} cannot run this model: {problem}",
                where=self._settings.model_path,
                fix="use rollout.engine = 'transformers', or a model vLLM supports on this machine",
            ) from problem

    # -- requests ---------------------------------------------------------------------------------

    def submit(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        seed: int | None,
        temperature: float | None = None,
        adapter: str = "",
    ) -> None:
        """Queue one sample. Raises UserError when the prompt cannot be answered."""
        prompt = tuple(prompt_ids)
        check_prompt(prompt, self._settings, self._vocab)
        self._check_adapter(adapter)
        warmth = self._settings.temperature if temperature is None else temperature
        self._waiting.append((request_id, _Request(prompt, seed, warmth, adapter)))

    def _check_adapter(self, name: str) -> None:
        if self._adapters is not None:
            self._adapters.check(name)
        elif name:
            raise UserError(f"this engine has no adapters, so none called {name!r}")

    def step(self) -> list[tuple[str, Completion]]:
        # Requests wait here, not in vLLM: one that has not begun takes no mark of a version yet.
        while self._waiting and len(self._running) < self._settings.max_running:
            self._begin(*self._waiting.popleft())
        done, self._early = self._early, []
        if self._running:
            done += self._advance()
        return done

    def abort(self, request_ids: Sequence[str]) -> None:
        gone = set(request_ids)
        self._waiting = deque(item for item in self._waiting if item[0] not in gone)
        running = [i for i in request_ids if i in self._running]
        for request_id in running:
            self._forget(request_id)
        self._llm.abort_request(running)

    @property
    def unfinished(self) -> int:
        return len(self._waiting) + len(self._running) + len(self._early)

    def _begin(self, request_id: str, request: _Request) -> None:
        self._llm.add_request(
            request_id,
            self._prompt(request.prompt),
            self._sampling(request_id, request),
            lora_request=self._lora(request.adapter),
        )
        self._running[request_id] = request

    def _prompt(self, token_ids: Sequence[int]) -> Any:
        """vLLM's `TokensInput`: it takes this as it is, where a prompt would be parsed first."""
        # The salt is part of a cached block's key: blocks of other weights are never found.
        return {
            "type": "token",
            "prompt_token_ids": list(token_ids),
            "cache_salt": str(self.version),
        }

    def _lora(self, adapter: str) -> Any:
        return None if self._adapters is None else self._adapters.request(adapter, self.version)

    def _sampling(self, request_id: str, request: _Request) -> SamplingParams:
        settings = self._settings
        kind = RequestOutputKind.FINAL_ONLY
        if not self._native_versions:
            kind = RequestOutputKind.CUMULATIVE
        return SamplingParams(
            temperature=request.temperature,
            max_tokens=settings.max_tokens,
            min_tokens=settings.min_tokens,
            stop_token_ids=list(settings.stop_token_ids),
            ignore_eos=True,  # the stop ids above are all there are
            seed=request.seed,
            logprobs=0 if self._drawn is None else None,
            flat_logprobs=True,
            stop=list(settings.stop),
            detokenize=bool(settings.stop),
            output_kind=kind,
            extra_args=request_args(request_id),
            skip_clone=True,  # made for this request alone; a deep copy costs as much as a token
        )

    def _advance(self, probe: str | None = None) -> list[tuple[str, Completion]]:
        """One step of vLLM; what finished, the probe left out."""
        done = []
        with self._stepping:
            outputs = self._llm.step()
        for output in outputs:
            request_id = output.request_id
            if request_id == probe:
                if output.finished:
                    self._probe_output = output
                continue
            if not self._native_versions:
                self._count(request_id, len(output.outputs[0].token_ids))
            if output.finished:
                self._cached_tokens += output.num_cached_tokens or 0
                done.append((request_id, self._completion(request_id, output)))
                self._forget(request_id)
        return done

    def _forget(self, request_id: str) -> None:
        del self._running[request_id]
        if self._drawn is not None:
            self._drawn.pop(request_id, None)
        else:
            self._kept(request_id)
        self._own_starts.pop(request_id, None)
        self._own_counts.pop(request_id, None)

    def _completion(self, request_id: str, output: RequestOutput) -> Completion:
        sampled = output.outputs[0]
        if sampled.finish_reason not in ("stop", "length"):
            raise EngineFailure(f"{self.name} ended request {request_id}: {sampled.finish_reason}")
        drawn = self._taken(request_id, sampled)
        if not math.isfinite(sum(drawn.logprobs)):
            raise EngineFailure(
                f"{self.name} sampled with a log-probability that is not finite "
                f"(weights of version {self.version})"
            )
        return Completion(
            token_ids=drawn.ids,
            logprobs=drawn.logprobs,
            versions=self._versions(request_id, sampled),
            finish_reason=sampled.finish_reason,
            sampled_from=self._limits.sets(len(drawn.ids), drawn.kept),
        )

    def _taken(self, request_id: str, sampled: CompletionOutput) -> Drawn:
        """Ids and log-probabilities of a finished request, and what its tokens were drawn from."""
        if self._drawn is None:
            return Drawn(
                ids=array("i", sampled.token_ids),
                logprobs=array("f", sampled.logprobs.logprobs),
                kept=self._kept(request_id),
            )
        drawn = self._drawn.pop(request_id)
        if len(drawn.ids) != len(sampled.token_ids):
            raise EngineFailure(
                f"{self.name} delivered {len(sampled.token_ids)} tokens for request {request_id}, "
                f"{len(drawn.ids)} were sampled"
            )
        return drawn

    def _kept(self, request_id: str) -> list[Kept]:
        """The ids each token of the request was sampled from, where these vary; forgotten then."""
        if not self._limits.records_each_token:
            return []
        kept: list[Kept] = self._llm.collective_rpc("accord_kept", args=(request_id,))[0]
        return kept

    def _versions(self, request_id: str, sampled: CompletionOutput) -> tuple[VersionSpan, ...]:
        if self._native_versions:
            return tuple(
                VersionSpan(version=int(span.version), start=span.start, end=span.end)
                for span in sampled.weight_versions
            )
        starts = self._own_starts[request_id]
        ends = [start for _, start in starts[1:]] + [len(sampled.token_ids)]
        return tuple(
            VersionSpan(version=version, start=start, end=end)
            for (version, start), end in zip(starts, ends, strict=True)
        )

    def _count(self, request_id: str, tokens: int) -> None:
        """Note under which version the tokens since the last call were sampled."""
        before = self._own_counts.get(request_id, 0)
        starts = self._own_starts.setdefault(request_id, [])
        if tokens > before and (not starts or starts[-1][0] != self.version):
            starts.append((self.version, before))
        self._own_counts[request_id] = tokens

    # -- weights ----------------------------------------------------------------------------------

    def stage(self, tensors: Iterable[tuple[str, Any]], version: int) -> None:
        """Load and pack an update beside the weights in force; any thread, while others step.

        The engine goes on with what it has, whatever happens here. Raises WeightMismatch when names
        or shapes do not fit, Retryable when vLLM fails.
        """
        self._staged = None
        if self._adapters is not None:
            self._stage_adapters(self._adapters, tensors, version)
            return
        try:
            if not self._prepared:
                with self._stepping:
                    self._llm.collective_rpc("accord_prepare")
                self._prepared = True
            if self._parts is not None:
                self._parts.stage(self._shapes, tensors)
            else:
                self._llm.collective_rpc("accord_stage", args=(checked(self._shapes, tensors),))
        except (WeightMismatch, Retryable):
            raise
        except Exception as problem:
            raise self._not_staged(version, problem) from problem
        self._staged = version

    def _not_staged(self, version: int, problem: Exception) -> Retryable:
        return Retryable(
            f"{self.name} failed staging version {version}, version {self.version} stays in "
            f"force: {problem}"
        )

    def _stage_adapters(
        self, adapters: ServedAdapters, tensors: Iterable[tuple[str, Any]], version: int
    ) -> None:
        try:
            # Copied: an adapter is small, and its tensors may be gone when the next ones come.
            adapters.stage({name: to_tensor(array).clone() for name, array in tensors})
        except AccordError:
            raise
        except Exception as problem:
            raise Retryable(
                f"{self.name} failed staging the adapters of version {version}: {problem}"
            ) from problem
        self._staged = version

    def _ask_parts(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        """vLLM's other processes take one call at a time: this one waits for its turn."""
        with self._stepping:
            return self._llm.collective_rpc(method, timeout=CALL_S, args=args)

    def _in_worker(self, method: str, args: tuple[Any, ...]) -> Any:
        """vLLM's worker is in this process, as an engine with adapters is not divided."""
        return self._llm.collective_rpc(method, args=args)[0]

    def swap(self, version: int) -> None:
        """Put what was staged in force between two steps. Raises EngineFailure half-way."""
        if self._staged != version:
            raise EngineFailure(
                f"{self.name} was to swap in version {version}, staged is {self._staged}"
            )
        self._staged = None
        try:
            if self._adapters is not None:
                self._adapters.install()
            else:
                self._llm.collective_rpc("accord_swap")
        except Exception as problem:
            raise EngineFailure(
                f"{self.name} failed swapping in version {version}: {problem}"
            ) from problem
        self.version = version
        self._label()
        if self._settings.kv_on_swap == "recompute":
            # Puts running requests back in vLLM's queue: their tokens stay, their cache is dropped.
            self._llm.reset_prefix_cache(reset_running_requests=True)
        else:
            self._restart_unbegun()
            self._llm.reset_prefix_cache()  # frees the memory where nothing runs; else salts do it

    def prove(self) -> None:
        """Raise WeightMismatch unless the next step computes with exactly what was staged last.

        Any thread, while others step.
        """
        if self._adapters is not None:
            self._adapters.prove(self.name, self.version)
            return
        if self._parts is not None:
            wrong = self._parts.wrong()
        else:
            wrong = self._llm.collective_rpc("accord_wrong")[0]
        require_none_wrong(wrong, self.name, self.version)

    def _label(self) -> None:
        if self._native_versions:
            self._llm.set_weight_version(str(self.version))

    def _restart_unbegun(self) -> None:
        """Requests without a token yet carry the old salt: submit them anew."""
        scheduler = self._llm.engine_core.engine_core.scheduler
        begun = {
            self._external_id(request.request_id)
            for request in scheduler.requests.values()
            if request.num_output_tokens
        }
        unbegun = [(i, request) for i, request in self._running.items() if i not in begun]
        self.abort([item[0] for item in unbegun])
        self._waiting.extendleft(reversed(unbegun))

    def _external_id(self, internal: str) -> str:
        state = self._llm.output_processor.request_states.get(internal)
        return getattr(state, "external_req_id", internal)

    # -- canary -----------------------------------------------------------------------------------

    def sequence_logprobs(self, token_ids: Sequence[int], adapter: str = "") -> list[float]:
        """Log-probabilities of ``token_ids[1:]`` at temperature 1; others are served meanwhile."""
        self._probes += 1
        probe = f"canary-{self._probes}"
        self._probe_output = None
        params = SamplingParams(
            temperature=1.0, max_tokens=1, prompt_logprobs=0, detokenize=False, ignore_eos=True
        )
        prompt = self._prompt(token_ids)
        self._llm.add_request(probe, prompt, params, lora_request=self._lora(adapter))
        deadline = time.monotonic() + PROBE_TIMEOUT_S
        while self._probe_output is None:
            self._early += self._advance(probe)
            if time.monotonic() > deadline:
                self._llm.abort_request([probe])
                raise EngineFailure(
                    f"{self.name} did not answer a canary within {PROBE_TIMEOUT_S:.0f} s"
                )
        answered = self._probe_output.prompt_logprobs
        return [
            float(answered[place][token].logprob)
            for place, token in enumerate(token_ids)
            if place > 0
        ]

    def counters(self) -> dict[str, float]:
        """Gauges for the worker's statistics."""
        scheduler = self._llm.engine_core.engine_core.scheduler
        return {
            "running": len(self._running),
            "unfinished_tokens": sum(r.num_output_tokens for r in scheduler.requests.values()),
            "kv_cache_used": scheduler.kv_cache_manager.usage,
            "prefix_cached_tokens": self._cached_tokens,
        }

    def close(self) -> None:
        self._llm.engine_core.shutdown()
