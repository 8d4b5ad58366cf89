"""Twenty annotators at once over HTTP, and `kill -9` of the server in the middle: every label that
was acknowledged is in the store once, and no other. Prints requests per second and their times."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from reward_service.preferences.people import People
from reward_service.preferences.store import PreferenceStore

pytestmark = [pytest.mark.slow, pytest.mark.long]

ANNOTATORS = 20
ITEMS = 400
KILLED_AFTER = 120  # acknowledged labels
DEADLINE_S = 240.0
CHOICES = ("first-3", "first-1", "tie", "second-2", "all-bad")


@dataclass
class Load:
    """What the annotators did and were told."""

    address: str
    acknowledged: list[tuple[str, str, str]] = field(default_factory=list)  # who, item, choice
    seconds: list[float] = field(default_factory=list)  # of each answered request
    joined: int = 0
    lost: int = 0  # requests without an answer, sent again
    lock: threading.Lock = field(default_factory=threading.Lock)
    until: float = 0.0

    def request(self, client: httpx.Client, method: str, path: str, **kw: Any) -> httpx.Response:
        """Sends until it is answered, as the page's script does."""
        while time.monotonic() < self.until:
            began = time.monotonic()
            try:
                answer = client.request(method, self.address + path, **kw)
            except httpx.TransportError:
                answer = None
            if answer is not None and answer.status_code < 500:
                with self.lock:
                    self.seconds.append(time.monotonic() - began)
                return answer
            with self.lock:
                self.lost += 1
            time.sleep(0.2)
        raise AssertionError(f"{method} {path} was not answered in time")

    def label_all(self, number: int, invitation: str) -> None:
        """One annotator, from the invitation to "nothing is left for you"."""
        with httpx.Client(timeout=30.0) as client:
            self.request(client, "POST", f"join/{invitation}")
            page = self.request(client, "GET", "welcome").text
            csrf = re.findall(r'name="csrf" value="(\w+)"', page)[0]
            who = re.findall(r'class="who">([\w-]+)<', page)[0]
            self.request(client, "POST", "welcome", data={"csrf": csrf, "agree": "yes"})
            with self.lock:
                self.joined += 1
            for turn in range(ITEMS):
                page = self.request(client, "GET", "", follow_redirects=True).text
                found = re.findall(r'data-task="(\w+)"', page)
                if not found:
                    assert "Nothing is left for you" in page
                    return
                choice = CHOICES[(number + turn) % len(CHOICES)]
                form = {"csrf": csrf, "action": "submit", "choice": choice, "rationale": who}
                answer = self.request(
                    client, "POST", f"task/{found[0]}", data=form, headers={"x-accord": "script"}
                )
                assert answer.status_code == 200, answer.text
                with self.lock:
                    self.acknowledged.append((who, found[0], choice))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(root: Path, store: Path, rows: Path, port: int) -> tuple[subprocess.Popen[str], str]:
    words = [str(store), f"data.files={json.dumps([str(rows)])}", f"server.port={port}"]
    process = subprocess.Popen(
        [sys.executable, "launch.py", "label", *words],
        cwd=root,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "/join/" in line, line
    return process, line[: line.index("join/")]


def said(judgement: Any) -> str:
    """The choice that a judgement stands for, as the form names it."""
    if judgement.answer == "all_bad":
        return "all-bad"
    if judgement.choice == "tie":
        return "tie"
    side = "first" if judgement.choice == judgement.shown_order[0] else "second"
    return f"{side}-{judgement.strength:.0f}"


def test_no_acknowledged_label_is_lost_or_doubled(tmp_path: Path, repo_root: Path) -> None:
    rows = tmp_path / "completions.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"question {n}", "completions": [f"one {n}", f"two {n}"]}) + "\n"
            for n in range(ITEMS)
        )
    )
    path, port = tmp_path / "preferences.db", free_port()
    server, address = start(repo_root, path, rows, port)
    people = People(PreferenceStore(path))
    invitations = [people.invite() for _ in range(ANNOTATORS)]
    load = Load(address, until=time.monotonic() + DEADLINE_S)
    began = time.monotonic()
    with ThreadPoolExecutor(ANNOTATORS) as pool:
        futures = [pool.submit(load.label_all, n, one) for n, one in enumerate(invitations)]
        # An invitation works once: who is cut off while joining needs a new one.
        while (load.joined < ANNOTATORS or len(load.acknowledged) < KILLED_AFTER) and not any(
            future.done() for future in futures
        ):
            time.sleep(0.05)
        steady = (len(load.seconds), time.monotonic() - began)
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
        server, _ = start(repo_root, path, rows, port)
        for future in futures:
            future.result()
    server.send_signal(signal.SIGINT)
    assert server.wait(60) == 130

    judgements = PreferenceStore(path).judgements(history=True)
    stored = Counter((one.annotator_id, one.item_id, said(one)) for one in judgements)
    assert stored == Counter(load.acknowledged)
    assert max(stored.values()) == 1
    assert len({item for _, item, _ in stored}) == len(stored) == ITEMS
    assert all(one.rationale == one.annotator_id for one in judgements)
    times = sorted(load.seconds)
    sys.stdout.write(
        f"\n{ANNOTATORS} annotators, {ITEMS} labels, {len(times)} requests answered, {load.lost} "
        f"sent again; before the kill {steady[0] / steady[1]:.0f} requests per second; "
        f"median {times[len(times) // 2]:.3f} s, p95 {times[int(0.95 * len(times))]:.3f} s, "
        f"max {times[-1]:.3f} s\n"
    )
