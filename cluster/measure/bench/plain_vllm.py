"""vLLM by itself, as the yardstick of a rollout worker: outputs thrown away.

`plain_engine` runs vLLM's own loop, `worker_engine` the one that Accord's worker puts in its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from actors.settings import EngineSettings

Request = tuple[Sequence[int], int]
"""(prompt's token ids, tokens of the answer)"""


def plain_engine(settings: EngineSettings) -> Any:
    """An ``LLMEngine`` with the arguments of Accord's worker, but its own loop.

    Call ``actors.environment.prepare_environment`` before.
    """
    return _made(replace(settings, decode_steps=0))


def worker_engine(settings: EngineSettings) -> Any:
    """The same as Accord's worker runs it: with several decode steps in a turn, where it can."""
    from actors.engines.vllm_args import why_single_steps

    engine = _made(settings)
    engine.accord_records = False
    if not why_single_steps(settings):
        reason, _ = engine.collective_rpc("accord_multistep")[0]
        engine.accord_records = not reason
    return engine


def _made(settings: EngineSettings) -> Any:
    from vllm.v1.engine.llm_engine import LLMEngine

    from actors.engines.vllm_args import engine_args

    return LLMEngine.from_engine_args(engine_args(settings))


def generate(engine: Any, requests: Iterable[Request], tag: str) -> int:
    """Answer all requests, each with exactly its number of tokens; returns the tokens made."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    # The worker's loop computes them itself.
    logprobs = None if getattr(engine, "accord_records", False) else 0
    for number, (prompt, length) in enumerate(requests):
        sampling = SamplingParams(
            temperature=1.0,
            max_tokens=length,
            logprobs=logprobs,
            flat_logprobs=True,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        engine.add_request(f"{tag}/{number}", {"prompt_token_ids": list(prompt)}, sampling)
    tokens = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens += sum(len(choice.token_ids) for choice in output.outputs)
    return tokens
