"""Ctrl-C, SIGTERM and SIGHUP while a program is under way: the log gets its end,
and nothing is left half done.

Python raises KeyboardInterrupt at whatever instruction is next: in the middle of a log line, of a thread's
start, of an optimizer's update. So a training notes the first signal and stops at the next step or validation
chunk; a second one stops it at once. What must not be torn, a log line or the log's end, runs under `hold`. A
signal that is ignored, as SIGHUP after `nohup` or SIGINT in what a script starts with `&`, stays ignored. No
torch here.
"""

import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

INTERRUPTED = 130  # as a shell has it for Ctrl-C: 128 + SIGINT; of SIGTERM and SIGHUP too
NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))  # Windows has no SIGHUP
TOLD = getattr(signal, "SIGUSR1", None)  # from another process of the same run: it was asked to stop
# within this time it is the same request: `timeout`, terminals and launchers signal a process twice
AGAIN_S = 1.0


def listen(handler: Callable, signals: Sequence[int] = SIGNALS) -> dict[int, Any]:
    """Install a handler for the signals that are not ignored. Returns the handlers before, for `restore`.

    Only the main thread may do so; elsewhere nothing is installed.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    before = {number: signal.getsignal(number) for number in signals}
    before = {number: was for number, was in before.items() if was not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    return before


def restore(before: dict[int, Any]) -> None:
    """Put earlier signal handlers back."""
    for number, handler in before.items():
        signal.signal(number, handler)


def say(line: str) -> None:
    """A line on stderr from within a handler: not print, because the interrupted instruction
    may hold the stream's lock."""
    with contextlib.suppress(OSError):  # `2>&1 | tee log`: the same Ctrl-C has ended tee
        os.write(2, (line + "\n").encode())


_ending = {"code": INTERRUPTED, "line": ""}


def leave_at_once(line: str) -> None:
    """From now on a signal ends the process without delay, with this line and exit code 130.

    For the time before a run, while modules are imported and there is nothing to close: KeyboardInterrupt
    would be a traceback there.
    """
    def leave(*_):
        if _ending["line"]:
            say(_ending["line"])
        os._exit(_ending["code"])
    _ending["line"] = line
    listen(leave)


def decided(code: int) -> None:
    """The program's exit code is known: a signal after `leave_at_once` that comes now changes
    nothing about it."""
    _ending.update(code=code, line="")


@contextlib.contextmanager
def like_ctrl_c() -> Iterator[None]:
    """Within the context SIGTERM and SIGHUP raise KeyboardInterrupt as SIGINT does; none does in `hold`."""
    before = listen(raise_or_keep)
    try:
        yield
    finally:
        restore(before)


def raise_or_keep(*_) -> None:
    """KeyboardInterrupt now, or at the end of the outermost `hold`."""
    global _due
    if not _held:
        raise KeyboardInterrupt
    _due = True


# ----- what is not interrupted ------------------------------------------------------------------------------

_held = 0  # contexts of `hold` that are open
_due = False  # a KeyboardInterrupt waits for their end


@contextlib.contextmanager
def hold() -> Iterator[None]:
    """Within the context no Interrupt raises; what came due is raised at its end. Contexts may be nested."""
    global _held, _due
    _held += 1
    try:
        yield
    finally:
        _held -= 1
        if not _held and _due:
            _due = False
            raise KeyboardInterrupt


def is_due() -> bool:
    """Did a signal come within the `hold` that is open?"""
    return _due


def held(function: Callable) -> Callable:
    """Decorator: the function runs under `hold`."""
    @functools.wraps(function)
    def wrapped(*args, **named):
        with hold():
            return function(*args, **named)
    return wrapped


class Interrupt:
    """A context within which signals end a run in order. To be entered by the main thread.

    patient False (start and warm-up, where nothing can be left half done): the first signal raises
    KeyboardInterrupt. patient True: it is noted, and `check` raises; a second one, at least AGAIN_S later,
    raises at once.
    says: what is told of the first one while patient.

    Of several processes the first one decides, because it writes the log and may not be left alone in a
    collective: the others pass the request on to it and train on until it has stopped.
    """

    def __init__(self, main: bool, patient: bool = True) -> None:
        """main: whether this process speaks for all."""
        self.main, self.patient = main, patient
        self.asked = False
        self.asked_at = 0.0
        self.says = "stopping where nothing is left half done"
        self.peers: list[int] = []  # ids of the other processes of this run on this machine
        self.follows = False  # the first process is among them
        self.between_steps = False  # `asked` is looked at by others, and `check` does nothing

    def __enter__(self) -> "Interrupt":
        self.before = listen(self.note)
        return self

    def __exit__(self, *_) -> None:
        restore(self.before)
        if self.peers:
            signal.signal(TOLD, signal.SIG_IGN)  # a process that is still under way may pass its request on

    def join(self, ids: Sequence[int], leader: int | None) -> None:
        """Name the run's processes on this machine. Each calls it before the first may tell the others.

        ids: process ids. leader: that of the first process, None if it is on another machine.
        """
        self.peers = [i for i in ids if i != os.getpid()] if TOLD is not None else []
        if self.peers:
            signal.signal(TOLD, self.told)
        self.follows = not self.main and leader in self.peers

    def note(self, *_) -> None:
        first = not self.asked
        if first:
            self.asked, self.asked_at = True, time.monotonic()
            for i in self.peers:
                with contextlib.suppress(OSError):
                    os.kill(i, TOLD)
            if self.main and self.patient:
                say(f"\n{self.says}; Ctrl-C again stops at once")
        elif time.monotonic() - self.asked_at < AGAIN_S:
            return
        self.act(again=not first)

    def told(self, *_) -> None:
        if not self.asked:
            self.asked, self.asked_at = True, time.monotonic()
            self.act(again=False)

    def act(self, again: bool) -> None:
        if again or not (self.patient or self.follows):
            raise_or_keep()

    def check(self) -> None:
        """KeyboardInterrupt if one was asked for: called where stopping leaves nothing half done."""
        if self.asked and not self.follows and not self.between_steps:
            raise KeyboardInterrupt
