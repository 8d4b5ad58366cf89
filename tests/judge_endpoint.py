"""An endpoint on this machine that speaks OpenAI's chat completions; a test gives its answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cluster.contracts.config.judge import JudgeConfig


@dataclass(frozen=True)
class Raw:
    """Bytes in place of a chat completion. ``hang``: they never come."""

    content: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    hang: bool = False


Answer = Callable[[dict[str, Any]], str | Raw]
"""The request's body -> the text of the judge."""


@dataclass
class JudgeEndpoint:
    answer: Answer
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def config(self, **settings: Any) -> JudgeConfig:
        tree = {"base_url": self.url, "model": "m", "cache": None, "timeout_s": 20.0, **settings}
        return JudgeConfig(**tree)


def shown(body: Mapping[str, Any], name: str) -> str:
    """What stands between the marks ``name`` of a request."""
    lines = str(body["messages"][-1]["content"])
    _, _, rest = lines.partition(f"[[{name} ")
    return rest.partition("]]\n")[2].partition(f"\n[[END {name} ")[0]


def longer(body: Mapping[str, Any]) -> str:
    """A judge that prefers the longer completion, whatever its place."""
    a, b = len(shown(body, "COMPLETION A")), len(shown(body, "COMPLETION B"))
    return verdict("tie" if a == b else "A" if a > b else "B")


def verdict(said: str) -> str:
    return json.dumps({"reason": "because", "verdict": said})


def completion(text: str, reason: str = "stop") -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    return json.dumps({"choices": [{**choice, "finish_reason": reason}], "usage": usage}).encode()


@contextmanager
def judge_endpoint(answer: Answer) -> Iterator[JudgeEndpoint]:
    endpoint = JudgeEndpoint(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            endpoint.bodies.append(body)
            endpoint.keys.append(self.headers.get("Authorization"))
            said = endpoint.answer(body)
            raw = said if isinstance(said, Raw) else Raw(completion(said))
            if raw.hang:
                endpoint.over.wait(60)
                self.close_connection = True
                return
            self.send_response(raw.status)
            for name, value in raw.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(raw.content)))
            self.end_headers()
            self.wfile.write(raw.content)

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02), daemon=True)
    thread.start()
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield endpoint
    finally:
        endpoint.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
