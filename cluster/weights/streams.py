"""Work on a GPU beside what it computes: streams of their own. On a CPU nothing changes.

Read against torch 2.13 (`torch/cuda/streams.py`, `torch/cuda/__init__.py`); not run on CUDA.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@functools.cache
def _side(device: torch.device) -> Any:
    # One for all, kept for good: the allocator keeps freed blocks by the stream that asked for
    # them, so a new stream at every update would strand memory. Priority 0 is the lowest.
    return torch.cuda.Stream(device=device, priority=0)


@contextmanager
def beside(device: torch.device, after: Any = None) -> Iterator[None]:
    """Queue what is done within on a stream beside the computation's, behind the event ``after``
    (`mark`). At the end the host waits for it, and nobody else does."""
    if device.type != "cuda":
        yield
        return
    stream = _side(indexed(device))
    if after is not None:
        stream.wait_event(after)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def mark(device: torch.device) -> Any:
    """An event behind all that is queued on the current stream; None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def indexed(device: torch.device) -> torch.device:
    """The device by its number: "cuda" is the one that this process works on."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
