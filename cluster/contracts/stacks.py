"""What every thread of this process does at this moment, as text."""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback


def thread_stacks() -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}\n" + "".join(traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
    )


def task_stacks() -> str:
    """Where each task of the running asyncio loop waits."""
    parts = []
    for task in asyncio.all_tasks():
        frames = [
            f'  File "{frame.f_code.co_filename}", line {frame.f_lineno}, in {frame.f_code.co_name}'
            for frame in task.get_stack()
        ]
        parts.append("\n".join([f"task {task.get_name()}", *frames]))
    return "\n".join(parts)
