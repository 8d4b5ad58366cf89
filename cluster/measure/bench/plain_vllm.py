"""vLLM by itself, as the yardstick of a rollout worker: its own loop, outputs thrown away."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from actors.settings import EngineSettings

Request = tuple[Sequence[int], int]
"""(prompt's token ids, tokens of the answer)"""


def plain_engine(settings: EngineSettings) -> Any:
    """An ``LLMEngine`` with exactly the arguments of Accord's worker.

    Call ``actors.environment.prepare_environment`` before.
    """
    from vllm.v1.engine.llm_engine import LLMEngine

    from actors.engines.vllm_args import engine_args

    return LLMEngine.from_engine_args(engine_args(settings))


def generate(engine: Any, requests: Iterable[Request], tag: str) -> int:
    """Answer all requests, each with exactly its number of tokens; returns the tokens made."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    for number, (prompt, length) in enumerate(requests):
        sampling = SamplingParams(
            temperature=1.0,
            max_tokens=length,
            logprobs=0,
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
