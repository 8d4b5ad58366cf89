"""Many questions to an endpoint: side by side, within limits, and from the cache where it can."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any

from cluster.contracts.config.judge import JudgeConfig
from cluster.contracts.errors import RewardFailure, Unrated
from reward_service.judge.cache import ReplyCache
from reward_service.judge.endpoint import BrokenAnswer, Endpoint
from reward_service.judge.limits import Budget, RateLimit
from reward_service.judge.records import (
    Question,
    Reply,
    Spent,
    Unreadable,
    read_reply,
    request_key,
)

CHARACTERS_PER_TOKEN = 4  # roughly, of English; only an estimate before a request is sent


class Halted(RewardFailure):
    """Not asked, or not asked again, because another question of the same call has failed."""


class EndpointAsker:
    """``Asker`` of an endpoint; one call of ``ask`` at a time. ``key``: of the endpoint, as
    ``key_from_environment`` found it. ``sleep``: for tests."""

    def __init__(
        self,
        config: JudgeConfig,
        key: str | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self.model = config.model
        self._config = config
        self._halt = threading.Event()
        sleep = sleep or self._pause
        self._endpoint = Endpoint(config, key, sleep)
        self._cache = ReplyCache(config.cache) if config.cache else None
        self._budget = Budget(config)
        self._rate = RateLimit(config.requests_per_minute, config.tokens_per_minute, clock, sleep)

    @property
    def spent(self) -> Spent:
        return self._budget.spent

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Any]]:
        """As ``Asker.ask``. After a failure no further request begins; those in progress end, and
        their answers are kept."""
        self._halt.clear()
        with ThreadPoolExecutor(self._config.concurrency, thread_name_prefix="judge") as threads:
            asked = {
                threads.submit(self._or_halt, question): n for n, question in enumerate(questions)
            }
            try:
                for done in as_completed(asked):
                    if not isinstance(done.exception(), Halted):  # what halted it comes as well
                        yield asked[done], done.result()
            finally:
                self._halt.set()
                threads.shutdown(wait=False, cancel_futures=True)

    def _or_halt(self, question: Question) -> Any:
        try:
            return self._one(question)
        except BaseException:
            self._halt.set()
            raise

    def _one(self, question: Question) -> Any:
        body = self._endpoint.body(question)
        key = request_key({"url": self._endpoint.url, "body": body})
        kept = self._cache.get(key) if self._cache is not None else None
        if kept is not None:
            self._budget.from_cache()
            return read_reply(question, kept)
        reply, said = self._readable(question, body)
        if self._cache is not None:
            self._cache.put(key, reply)
        return said

    def _readable(self, question: Question, body: Mapping[str, Any]) -> tuple[Reply, Any]:
        """The first answer that can be read, in ``attempts``. Raises Unrated."""
        for attempt in range(1, self._config.attempts + 1):
            try:
                reply = self._endpoint.ask(body, lambda: self._admitted(body))
                return reply, read_reply(question, reply)
            except (Unreadable, BrokenAnswer) as problem:
                if attempt == self._config.attempts:
                    raise Unrated(
                        f"the judge {self.model} gave no usable answer about "
                        f"{question.label or 'a question'} in {attempt} attempts: {problem}"
                    ) from None
        raise AssertionError("attempts is at least 1")

    @contextmanager
    def _admitted(self, body: Mapping[str, Any]) -> Iterator[Callable[[Reply], None]]:
        if self._halt.is_set():
            raise Halted("another question failed")
        tokens = len(json.dumps(body["messages"])) // CHARACTERS_PER_TOKEN
        reserved = self._budget.reserve(tokens)
        replies: list[Reply] = []
        try:
            entry = self._rate.acquire(tokens + self._config.max_tokens)
            yield replies.append
        finally:
            reply = replies[0] if replies else None
            self._budget.settle(reserved, reply)
            if reply is not None:
                self._rate.correct(entry, reply.prompt_tokens + reply.completion_tokens)

    def _pause(self, seconds: float) -> None:
        if self._halt.wait(seconds):
            raise Halted("another question failed")

    def close(self) -> None:
        self._endpoint.close()
