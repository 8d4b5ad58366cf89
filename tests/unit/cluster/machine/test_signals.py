"""What a signal does to a command whose libraries lose it, replace the handler, hang or never
return. Each command is a process of its own."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

COMMAND = """
import ctypes, signal, subprocess, sys, threading, time
import launch
from cluster.machine import signals
from cluster.machine.event_loop import StopSwitch, run_coroutine
from cluster.machine.signals import listening, signal_handlers_kept, signals_given_up

signals.AGAIN_S = {again}
signals.FORCE_S = {force}

@launch.app.command("library")
def library() -> None:
    quiet = subprocess.DEVNULL
    child = subprocess.Popen(
        ["sleep", "1000"], stdout=quiet, stderr=quiet, start_new_session=True
    )
    print(child.pid, flush=True)
    work()

def wait(seconds=60.0):
    print("waits", flush=True)
    time.sleep(seconds)

def stuck():
    # Returns only when it is done, and no handler of Python's runs meanwhile. Once more, if the
    # signal came before the call.
    import hashlib
    words = ["waits"]
    while True:
        try:
            print(*words, end="\\n" if words else "", flush=True)
            words.clear()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
        except KeyboardInterrupt:
            pass

{work}

sys.argv = ["accord", "library"]
launch.main()
"""
SWALLOWS = """
def work():
    try:
        wait()
    except KeyboardInterrupt:
        pass  # as one raised in a destructor
    time.sleep(60)
"""
DESTROYS = """
class Lock:
    def __del__(self):
        wait()

def work():
    Lock()
    time.sleep(60)
"""
REPLACES = """
def work():
    with signal_handlers_kept():
        signal.signal(signal.SIGTERM, lambda *_: None)
        wait(1.0)
    time.sleep(60)
"""
LEAVES = """
def work():
    with signal_handlers_kept():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))  # as Ray's
        wait()
"""
BREAKS = """
def work():
    try:
        wait()
    except KeyboardInterrupt:
        raise RuntimeError("a process that the same Ctrl-C has ended does not answer") from None
"""
HANGS = """
def work():
    try:
        wait()
    finally:
        time.sleep(60)  # a shutdown that waits for what never comes
"""
STUCK = """
def work():
    stuck()
"""
ASYNC_SWALLOWS = """
import asyncio

async def serve():
    try:
        print("waits", flush=True)
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep(0.1)
        print("tidied up", flush=True)

def work():
    run_coroutine(serve())
"""
TELLS_SLOWLY = """
import asyncio
tell = launch._tell

def tell_slowly(text):
    time.sleep(0.5)
    tell(text)

launch._tell = tell_slowly

async def serve():
    print("waits", flush=True)
    await asyncio.sleep(60)

def work():
    run_coroutine(serve())
"""


class Library:
    """The command, until it waits; ``child``: a process that it has started."""

    def __init__(self, work: str, again: float = 0.3, force: float = 20.0) -> None:
        root = Path(__file__).parents[4]
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND.format(work=work, again=again, force=force)],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.child = psutil.Process(int(self.process.stdout.readline()))
        assert self.process.stdout.readline() == "waits\n"

    def signalled(self, *numbers: int) -> tuple[int, str, str]:
        for number in numbers:
            self.process.send_signal(number)
            time.sleep(0.3)  # two at once would be one
        try:
            out, err = self.process.communicate(timeout=30)
        finally:
            self.process.kill()
            self.child_lives = self._child_lives()
            if self.child_lives:
                self.child.kill()
        return self.process.returncode, out, err

    def _child_lives(self) -> bool:
        with contextlib.suppress(psutil.TimeoutExpired):
            self.child.wait(1.0)  # one that was killed takes a moment to be gone
        with contextlib.suppress(psutil.NoSuchProcess):
            return self.child.is_running() and self.child.status() != psutil.STATUS_ZOMBIE
        return False


@pytest.mark.parametrize(
    ("work", "number", "code", "line"),
    [
        (SWALLOWS, signal.SIGINT, 130, "accord: interrupted\n"),
        (DESTROYS, signal.SIGINT, 130, "accord: interrupted\n"),
        (REPLACES, signal.SIGTERM, 143, "accord: terminated\n"),
        (LEAVES, signal.SIGTERM, 143, "accord: terminated (SystemExit: 7)\n"),
        (BREAKS, signal.SIGINT, 130, "accord: interrupted (RuntimeError: a process"),
    ],
    ids=["swallows", "destroys", "replaces", "leaves", "breaks"],
)
def test_an_interrupt_that_a_library_loses_still_ends_the_command(
    work: str, number: int, code: int, line: str
) -> None:
    found, _, err = Library(work).signalled(number)
    assert found == code, err
    assert line in err
    assert "Traceback" not in err


def test_work_in_an_event_loop_is_cancelled_and_tidies_up() -> None:
    assert Library(ASYNC_SWALLOWS).signalled(signal.SIGTERM) == (
        143,
        "tidied up\n",
        "accord: terminated\n",
    )


def test_the_interrupt_is_not_raised_again_while_the_command_says_how_it_ended() -> None:
    found, _, err = Library(TELLS_SLOWLY, again=0.0).signalled(signal.SIGTERM)
    assert (found, err) == (143, "accord: terminated\n")


@pytest.mark.parametrize("work", [HANGS, STUCK], ids=["hangs", "stuck"])
def test_a_command_that_does_not_end_is_ended_by_force_with_its_children(work: str) -> None:
    library = Library(work, force=1.0)
    code, _, err = library.signalled(signal.SIGINT)
    assert (code, err) == (130, "accord: interrupted\n")
    assert not library.child_lives


@pytest.mark.parametrize("work", [HANGS, STUCK], ids=["hangs", "stuck"])
def test_the_second_signal_ends_it_at_once(work: str) -> None:
    library = Library(work, force=1000.0)
    code, _, err = library.signalled(signal.SIGTERM, signal.SIGINT)
    assert (code, err) == (143, "accord: terminated\n")
    assert not library.child_lives


def test_who_is_patient_is_not_ended_by_force() -> None:
    work = """
def work():
    asked = threading.Event()
    with listening(asked.set, patient=True):
        print("waits", flush=True)
        asked.wait(60)
        time.sleep(1.5)
        print("saved", flush=True)
    raise KeyboardInterrupt
"""
    assert Library(work, force=0.5).signalled(signal.SIGINT) == (
        130,
        "saved\n",
        "accord: interrupted\n",
    )


def test_what_handles_interrupts_itself_gets_each_of_them() -> None:
    work = """
def work():
    with signals_given_up():
        for text in ("waits", "again", "done"):
            try:
                print(text, flush=True)
                time.sleep(60 if text != "done" else 0)
            except KeyboardInterrupt:
                pass
"""
    assert Library(work, force=0.5).signalled(signal.SIGINT, signal.SIGINT) == (
        0,
        "again\ndone\n",
        "",
    )


def test_a_command_whose_end_may_hang_is_ended_with_its_code() -> None:
    work = """
def work():
    signals.end_command_after(2.0, "stopped: the head is lost", 75)
    stuck()
"""
    library = Library(work, force=1000.0)
    assert library.signalled() == (75, "", "accord: stopped: the head is lost\n")
    assert not library.child_lives


def test_ctrl_c_while_python_unloads_libraries_changes_nothing(
    repo_root: Path,
) -> None:
    code = """
import atexit, sys, time
import launch

def unload():
    print("unloading", flush=True)
    time.sleep(1.0)

atexit.register(unload)  # before the command's own, so it runs after it
sys.argv = ["accord", "--version"]
launch.main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=repo_root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while "unloading" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (0, "")
