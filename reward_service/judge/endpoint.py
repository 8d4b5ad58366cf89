"""One request to an endpoint that speaks OpenAI's chat completions (HTTP, JSON)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import httpx
import tenacity

from cluster.contracts.config.judge import JudgeConfig
from cluster.contracts.errors import BadReward, RewardFailure, UserError
from reward_service.judge.records import Question, Reply

TRY_AGAIN = {408, 409, 425, 429}  # and every status from 500
LARGEST = 4 << 20  # bytes of an answer; an endpoint that sends more is broken
QUOTED = 200  # characters of a refusal shown to the user

Gate = Callable[[], AbstractContextManager[Callable[[Reply], None]]]
"""Entered for each request, when it may be sent; what it yields is told the reply."""


class NoAnswer(RewardFailure):
    """The endpoint did not answer a request. ``after_s``: how long it asks to be left alone."""

    def __init__(self, what: str, after_s: float = 0.0) -> None:
        super().__init__(what)
        self.after_s = after_s


class BrokenAnswer(BadReward):
    """An answer with status 200 that is not of the API's form."""


class Endpoint:
    """Sends one question at a time; safe to use from several threads."""

    def __init__(
        self,
        config: JudgeConfig,
        key: str | None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._config = config
        self._sleep = sleep
        self.url = str(config.base_url).rstrip("/") + "/chat/completions"
        self._key = key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(
            headers=headers,
            timeout=config.timeout_s,
            limits=httpx.Limits(max_connections=config.concurrency),
        )

    def body(self, question: Question) -> dict[str, Any]:
        """The whole request, and with the URL all that decides the answer."""
        body: dict[str, Any] = {
            "model": self._config.model,
            "messages": [dict(message) for message in question.messages],
            "temperature": self._config.temperature,
            "max_tokens": self._config.max_tokens,
        }
        if question.schema is not None and self._config.structured_output:
            schema = {"name": "answer", "strict": True, "schema": question.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    def ask(self, body: Mapping[str, Any], gate: Gate) -> Reply:
        """Repeated with growing waits while the endpoint gives no answer, until the deadline.

        Raises RewardFailure after the deadline, BrokenAnswer for an answer that is none, UserError
        for a refusal that will not change.
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(NoAnswer),
            stop=tenacity.stop_before_delay(self._config.deadline_s),
            wait=_wait,
            sleep=self._sleep,
            reraise=True,
        )
        return retrying(self._once, body, gate)

    def _once(self, body: Mapping[str, Any], gate: Gate) -> Reply:
        with gate() as settle:
            reply = self._request(body)
            settle(reply)
        return reply

    def _request(self, body: Mapping[str, Any]) -> Reply:
        try:
            status, headers, content = self._post(body)
        except httpx.TimeoutException:
            raise NoAnswer(f"{self.url}: no answer in {self._config.timeout_s:g} s") from None
        except httpx.HTTPError as problem:
            raise NoAnswer(f"{self.url}: {type(problem).__name__}: {problem}") from None
        if status == 200:
            return _reply(content, self.url)
        if status in TRY_AGAIN or status >= 500:
            raise NoAnswer(
                f"{self.url}: status {status}: {self._quoted(content)}",
                _retry_after(headers.get("retry-after")),
            )
        raise self._refused(status, content)

    def _post(self, body: Mapping[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        """httpx limits each read; the limit here is on all of them, for an endpoint that drips."""
        until = time.monotonic() + self._config.timeout_s
        content = bytearray()
        with self._client.stream("POST", self.url, json=body) as response:
            for chunk in response.iter_bytes():
                content += chunk
                if time.monotonic() > until:
                    raise httpx.ReadTimeout("the answer took too long")
                if len(content) > LARGEST:
                    raise BrokenAnswer(f"{self.url}: the answer is larger than {LARGEST} bytes")
            return response.status_code, response.headers, bytes(content)

    def _refused(self, status: int, content: bytes) -> UserError:
        fix = "check judge.base_url and judge.model"
        if status in (401, 403):
            fix = "put a valid key into the variable that judge.key_env names"
        elif status == 400:
            fix = (
                "if it does not know response_format, set judge.structured_output = false; if the "
                "request is too long for the model, shorten the completions or judge.max_tokens"
            )
        return UserError(
            f"refuses the request (status {status}): {self._quoted(content)}",
            where=self.url,
            fix=fix,
        )

    def _quoted(self, content: bytes) -> str:
        """The start of an error's text, without the key, which some endpoints repeat."""
        text = content.decode("utf-8", errors="replace")
        text = text.replace(self._key, "[key]") if self._key else text
        return " ".join(text.split())[:QUOTED]

    def close(self) -> None:
        self._client.close()


_backoff = tenacity.wait_random_exponential(multiplier=0.5, max=30)


def _wait(state: tenacity.RetryCallState) -> float:
    problem = state.outcome.exception() if state.outcome else None
    asked = problem.after_s if isinstance(problem, NoAnswer) else 0.0
    return max(asked, float(_backoff(state)))


def _retry_after(text: str | None) -> float:
    """Seconds; a date in this header, which no judge's endpoint sends, counts as none."""
    try:
        return max(0.0, float(text or 0))
    except ValueError:
        return 0.0


def _reply(content: bytes, url: str) -> Reply:
    try:
        tree = json.loads(content)
        choice = tree["choices"][0]
        text, reason = choice["message"]["content"], choice["finish_reason"]
        usage = tree.get("usage") or {}
        counts = [int(usage.get(name, 0)) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as problem:
        start = content[:60].decode("utf-8", errors="replace")
        raise BrokenAnswer(
            f"{url}: the answer is not a chat completion ({type(problem).__name__}); it begins "
            f"{start!r}"
        ) from None
    if not isinstance(text, str):  # null: a refusal, or a call of a tool
        raise BrokenAnswer(f"{url}: the answer holds no text")
    return Reply(
        text=text,
        finish_reason=str(reason),
        prompt_tokens=counts[0],
        completion_tokens=counts[1],
    )
