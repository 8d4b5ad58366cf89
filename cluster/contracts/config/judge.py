"""An AI judge: a model that compares or rates completions."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cluster.contracts.config.base import Section

HELPFUL = (
    "Prefer the completion that is more helpful, correct and harmless. Length alone is no merit."
)


class JudgeConfig(Section):
    """The endpoint or the local model, and what may be spent on it."""

    engine: Literal["openai", "vllm"] = Field(
        "openai",
        description="openai: an endpoint that speaks OpenAI's chat completions. vllm: a local "
        "model, which Accord's own workers sample.",
    )
    base_url: str | None = Field(
        None,
        description="URL of the endpoint, up to `/v1`, such as `http://127.0.0.1:8000/v1`. Only "
        "with the engine openai.",
    )
    model: str = Field(
        description="Name of the model at the endpoint. With the engine vllm: a model directory or "
        "a hub id."
    )
    key_env: str | None = Field(
        None,
        description="Environment variable that holds the key of the endpoint. The key is never "
        "written to a file or a log. none: no key is sent.",
    )
    structured_output: bool = Field(
        True,
        description="Have the endpoint enforce the JSON schema of the answer (`response_format`). "
        "false: for an endpoint that cannot. The answer is checked as strictly either way.",
    )
    temperature: float = Field(0.0, ge=0, description="Sampling temperature of the judge.")
    max_tokens: int = Field(512, ge=1, description="Most tokens of one answer of the judge.")
    concurrency: int = Field(8, ge=1, description="Requests in progress at once.")
    requests_per_minute: int | None = Field(
        None, ge=1, description="Most requests sent in any 60 seconds. none: no limit."
    )
    tokens_per_minute: int | None = Field(
        None,
        ge=1,
        description="Most tokens, of requests and answers, in any 60 seconds. The tokens of an "
        "answer that has not arrived count as `max_tokens`. none: no limit.",
    )
    timeout_s: float = Field(60, gt=0, description="Most seconds for one request.")
    deadline_s: float = Field(
        600,
        gt=0,
        description="A judgement fails that has no answer after this many seconds, repeated "
        "requests and waits between them included.",
    )
    attempts: int = Field(
        3, ge=1, description="How often the judge is asked when its answer cannot be read."
    )
    prompt_price: float = Field(
        0.0, ge=0, description="Price of a million prompt tokens, in any currency."
    )
    completion_price: float = Field(
        0.0, ge=0, description="Price of a million completion tokens, in the same currency."
    )
    max_cost: float | None = Field(
        None,
        gt=0,
        description="Send no request whose cost could exceed this sum, by the prices above. "
        "Answers from the cache cost nothing. none: no limit.",
    )
    max_requests: int | None = Field(
        None, ge=1, description="Send at most so many requests, repeated ones included. none: all."
    )
    cache: str | None = Field(
        "runs/judge_cache.db",
        description="SQLite file that keeps the judge's answers, so that no request is paid for "
        "twice. It holds prompts' hashes and answers, no keys. none: off.",
    )

    @model_validator(mode="after")
    def _check(self) -> JudgeConfig:
        if self.engine == "openai" and not self.base_url:
            raise ValueError("engine = 'openai' needs base_url, such as http://127.0.0.1:8000/v1")
        if self.engine == "vllm" and (self.base_url or self.key_env):
            raise ValueError("engine = 'vllm' takes a local model: leave base_url and key_env out")
        if self.base_url and not self.base_url.startswith(("http://", "https://")):
            raise ValueError("base_url must begin with http:// or https://")
        if self.base_url and "@" in self.base_url:
            raise ValueError("base_url holds a password: put it into the variable of key_env")
        if self.max_cost is not None and not (self.prompt_price or self.completion_price):
            raise ValueError("max_cost needs prompt_price and completion_price")
        return self
