"""SIGINT and SIGTERM for the length of a command: heard once, whatever a library does to them.

The first one interrupts: KeyboardInterrupt in the main thread or, where something listens, a call
of it. A library may lose that exception (one raised in a destructor is only printed), replace our
handler for a while, or wait for a process that the same Ctrl-C has ended. So a thread of its own
watches: it raises the interrupt again until it is under way, and ends a command by force that does
not end. The second signal ends the command at once.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
NUDGE = signal.SIGURG  # nothing else uses it, and a process without a handler ignores it
AGAIN_S = 2.0  # until an interrupt that did not arrive is raised again
FORCE_S = 9.0  # until a command that does not end is ended by force
LOOK_S = 0.1
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: schedulers know it as "start it again later"
END, CATCH_UP = 0, 255  # bytes for the watching thread that are no signal's number
CATCH_UP_S = 5.0


def exit_code(number: int) -> int:
    """What a shell expects of a command that a signal has ended."""
    return 128 + number


class CommandSignals:
    """Made by ``command_signals``. ``first``: the signal that came first, None before."""

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self._raised = False  # in the main thread, for the first signal
        self._over = False  # the command has ended, and is about to say how
        self._listener: Callable[[], None] | None = None
        self._patient = False  # whoever listens may take as long as it needs
        self._last_words: list[Callable[[], None]] = []
        self._since = 0.0  # when the command was told to end
        self._nudged = 0.0
        self._told_lost = sys.unraisablehook
        self._gate = threading.RLock()
        self._caught_up = threading.Event()
        # Python writes each signal's number into it at once, also while the main thread is
        # somewhere in a library and runs no handler.
        self._inbox, self._outbox = os.pipe()
        os.set_blocking(self._outbox, False)
        self._main = threading.main_thread().ident or 0
        self._watcher = threading.Thread(target=self._watch, name="accord-signals", daemon=True)

    # -- the main thread --------------------------------------------------------------------------

    def open(self) -> None:
        for number in WORDS:
            signal.signal(number, self._interrupt)
        signal.signal(NUDGE, self._nudge)
        signal.set_wakeup_fd(self._outbox, warn_on_full_buffer=False)
        self._told_lost, sys.unraisablehook = sys.unraisablehook, self._lost
        self._watcher.start()

    def close(self) -> None:
        sys.unraisablehook = self._told_lost
        signal.set_wakeup_fd(-1)
        os.write(self._outbox, bytes([END]))
        self._watcher.join()
        os.close(self._inbox)
        os.close(self._outbox)

    def heard(self) -> signal.Signals | None:
        """The signal that came first, None before, also where the watching thread, on a busy
        machine, has not read it yet."""
        if self._watcher.is_alive():
            self._caught_up.clear()
            os.write(self._outbox, bytes([CATCH_UP]))
            self._caught_up.wait(CATCH_UP_S)
        return self.first

    def over(self) -> None:
        """The command has ended: from now on nothing is interrupted. What is left (a line that says
        how it ended) may still be ended by force."""
        self._over = True

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has come and the interrupt is not under way."""
        expected = self.first is not None and self._listener is None and not self._over
        if expected and not _interrupt_under_way():
            raise KeyboardInterrupt

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        first, self._raised = not self._raised, True
        if first and self._listener is None and not self._over:
            raise KeyboardInterrupt

    def _lost(self, told: sys.UnraisableHookArgs) -> None:
        """What Python calls for an exception that cannot go on (in a destructor, in a fork)."""
        if issubclass(told.exc_type, KeyboardInterrupt):
            self._nudged = 0.0  # raise it again at once, and show nobody that it was lost
        else:
            self._told_lost(told)

    def _nudge(self, number: int, frame: FrameType | None) -> None:
        self.check()

    # -- any thread -------------------------------------------------------------------------------

    @contextmanager
    def listening(self, act: Callable[[], None], patient: bool) -> Iterator[None]:
        with self._gate:
            before = self._listener, self._patient
            self._listener, self._patient = act, patient
            if self.first is not None:
                act()
        try:
            yield
        finally:
            with self._gate:
                self._listener, self._patient = before
                if patient:
                    self._since = self._nudged = time.monotonic()

    @contextmanager
    def last_words(self, say: Callable[[], None]) -> Iterator[None]:
        self._last_words.append(say)
        try:
            yield
        finally:
            self._last_words.remove(say)

    # -- the watching thread ----------------------------------------------------------------------

    def _watch(self) -> None:
        while True:
            wait_s = None if self.first is None else LOOK_S
            if select.select([self._inbox], [], [], wait_s)[0]:
                for number in os.read(self._inbox, 64):
                    if number == END:
                        return
                    if number == CATCH_UP:
                        self._caught_up.set()
                    if number in WORDS:
                        self._heard(signal.Signals(number))
            if self.first is not None:
                self._look()

    def _heard(self, number: signal.Signals) -> None:
        if self.first is not None:
            self._end_by_force()
        with self._gate:
            self.first = number
            self._since = self._nudged = time.monotonic()
            if self._listener is not None:
                self._listener()

    def _look(self) -> None:
        now = time.monotonic()
        if self._listener is not None and self._patient:
            return
        if now - self._since >= FORCE_S:
            self._end_by_force()
        if now - self._nudged >= AGAIN_S:
            self._nudged = now
            signal.pthread_kill(self._main, NUDGE)

    def _end_by_force(self) -> None:
        assert self.first is not None
        self.end_now(WORDS[self.first], exit_code(self.first))

    def end_now(self, text: str, code: int) -> None:
        for say in reversed(self._last_words):
            with contextlib.suppress(Exception):  # the end must come, whatever cannot be written
                say()
        end_children()
        # Not through sys.stderr: the main thread may hold its lock.
        os.write(2, f"accord: {text}\n".encode())
        os._exit(code)


def end_children() -> None:
    """Kill every process that this one has started, and theirs."""
    import psutil  # here: it would make every `accord --help` slower

    for _ in range(2):  # again: one may have been starting another
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _interrupt_under_way() -> bool:
    """Whether the main thread is in an ``except`` or ``finally`` on behalf of an interrupt."""
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


_command: CommandSignals | None = None  # of this process; None in a program that imports Accord


@contextmanager
def command_signals() -> Iterator[CommandSignals]:
    """For the length of a command, which runs in the main thread."""
    global _command
    signals = CommandSignals()
    if threading.current_thread() is not threading.main_thread():
        yield signals  # only the main thread may set handlers
        return
    with signal_handlers_kept():
        _command = signals
        signals.open()
        try:
            yield signals
        finally:
            _command = None
            signals.close()


def in_command() -> bool:
    """Whether this is the main thread of a command; else signals belong to somebody else."""
    return _command is not None and threading.current_thread() is threading.main_thread()


def end_command_after(seconds: float, text: str, code: int) -> None:
    """In the process of a command, from any thread: end it by force if it has not ended by then.
    For when something that it has to call may never return."""
    if _command is not None:
        timer = threading.Timer(seconds, _command.end_now, (text, code))
        timer.daemon = True
        timer.start()


@contextmanager
def listening(act: Callable[[], None], *, patient: bool = False) -> Iterator[None]:
    """Within, the first SIGINT or SIGTERM calls ``act`` instead of interrupting; if it has come
    already, at once. Any thread may be the one that calls.

    ``patient``: a command may take as long as it needs to leave this block (it is saving), and is
    not ended by force meanwhile, except by a second signal. In a program that imports Accord the
    second signal raises KeyboardInterrupt.
    """
    if in_command() and _command is not None:
        with _command.listening(act, patient):
            yield
        return
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    handle = first_acts_second_interrupts(act)
    with signal_handlers_kept():
        for number in WORDS:
            signal.signal(number, handle)
        yield


def first_acts_second_interrupts(act: Callable[[], None]) -> Callable[..., None]:
    """A handler for signals in a program that imports Accord."""
    heard = False

    def handle(*_: object) -> None:
        nonlocal heard
        if heard:
            raise KeyboardInterrupt
        heard = True
        act()

    return handle


@contextmanager
def last_words(say: Callable[[], None]) -> Iterator[None]:
    """``say`` is called if the command is ended by force within."""
    if _command is None:
        yield
        return
    with _command.last_words(say):
        yield


@contextmanager
def signals_given_up() -> Iterator[None]:
    """Within, each Ctrl-C is an ordinary KeyboardInterrupt: for what lives on after one (a chat),
    or handles signals by itself (a web server)."""
    global _command
    if _command is None:
        yield
        return
    command, _command = _command, None
    with signal_handlers_kept():
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            yield
        finally:
            signal.set_wakeup_fd(command._outbox, warn_on_full_buffer=False)
            _command = command


@contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """SIGINT and SIGTERM do afterwards what they did before, whatever is called within. A signal
    that came meanwhile and was lost interrupts then."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers, so none can be changed here
        return
    before = {name: signal.getsignal(name) for name in (*WORDS, NUDGE)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    if _command is not None:
        _command.check()
