"""Start a program as several processes on this machine, and exit with the most informative exit code.

    python train_gpt.py short/33 --nproc 8          # the trainer starts itself this way
    python system/launch.py 8 program.py arguments  # any program that reads RANK, WORLD_SIZE, MASTER_ADDR ...

`torchrun` turns every code but 0 into 1 and a page of text, so that a missed target looks like a crash. Only
the standard library here: it is run by its path, for programs of other checkouts too.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence

PROGRAM_MAX = 64  # processes of one machine
POLL_S = 0.05
ENDING_S = 5.0  # for the others to end by themselves when one has failed: they meet the same error
GRACE_S = 10.0  # to end after SIGTERM
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
KILL = getattr(signal, "SIGKILL", 9)  # Windows has none
# Of the codes that processes ended with the first one of these is taken. A process that loses a peer ends
# with 1, one that is told to end with 130: neither says why.
TELLING = (2, 4, 3, 130)
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def launch(command: Sequence[str], processes: int, environment: Mapping[str, str] | None = None) -> int:
    """Run a command as `processes` processes and return one exit code.

    All stand in this program's process group. SIGINT, SIGTERM and SIGHUP are passed on (one that is ignored
    stays so); they may get the same signal from the terminal too. When one process fails, the others get
    ENDING_S to end by themselves, then SIGTERM, then SIGKILL. A process that dies by a signal that did not
    come from here is told in one line.
    """
    return Launch(processes, os.environ if environment is None else environment).run(command)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def tie(parent: int) -> None:
    """Called in a child process: it gets SIGTERM when `parent` dies, for whatever reason (Linux)."""
    if LIBC is not None:
        LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died in between
            os._exit(1)


class Launch:
    """The processes of one launch and what became of them."""

    def __init__(self, processes: int, environment: Mapping[str, str]) -> None:
        threads = max(1, (os.cpu_count() or 1) // processes)  # they share the cores
        common = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": free_port()}
        self.environments = [
            {
                "OMP_NUM_THREADS": str(threads), **environment,
                **{name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
            }
            for rank in range(processes)
        ]
        self.running: dict[int, subprocess.Popen] = {}  # by rank
        self.codes: dict[int, int] = {}  # of those that ended, negative: by this signal
        self.asked: int | None = None  # the first signal that was passed on
        self.failed_at: float | None = None
        self.sent: set[int] = set()  # signals of ours to processes that did not end by themselves

    def run(self, command: Sequence[str]) -> int:
        before = {
            s: signal.signal(s, self.pass_on) for s in SIGNALS
            if signal.getsignal(s) not in (signal.SIG_IGN, None)
        }
        try:
            for rank, environment in enumerate(self.environments):
                if self.asked is None:
                    self.start(rank, command, environment)
            if self.asked is not None:  # it may have missed the process that was just being started
                self.send(self.asked)
            while self.running:
                time.sleep(POLL_S)
                self.collect()
                self.hurry()
        finally:
            self.end_all()
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.code()

    def start(self, rank: int, command: Sequence[str], environment: dict[str, str]) -> None:
        parent = os.getpid()
        tied = {"preexec_fn": lambda: tie(parent)} if LIBC is not None else {}
        self.running[rank] = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, **tied)

    def pass_on(self, number: int, frame: object) -> None:
        self.asked = self.asked or number
        self.send(number)

    def send(self, number: int) -> None:
        for process in list(self.running.values()):
            with contextlib.suppress(OSError):
                process.send_signal(number)

    def collect(self) -> None:
        """Book the processes that have ended."""
        for rank, process in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[rank]
            self.codes[rank] = code
            if code and self.failed_at is None:
                self.failed_at = time.monotonic()
            if code < 0 and self.asked is None and -code not in self.sent:
                say(death(rank, -code))

    def hurry(self) -> None:
        """End what is left when one has failed: its collectives would wait for the failed one."""
        if self.failed_at is None:
            return
        past = time.monotonic() - self.failed_at
        if past > ENDING_S and signal.SIGTERM not in self.sent:
            self.sent.add(signal.SIGTERM)
            self.send(signal.SIGTERM)
        if past > ENDING_S + GRACE_S:
            self.kill()

    def kill(self) -> None:
        for process in self.running.values():
            self.sent.add(KILL)
            process.kill()

    def end_all(self) -> None:
        """Leave no process behind, whatever ended the loop."""
        self.kill()
        for process in self.running.values():
            process.wait()

    def code(self) -> int:
        codes = set(self.codes.values())
        if self.asked is not None and (not codes or min(codes) < 0):
            return 130
        return telling(c for c in codes if -c not in self.sent)


def telling(codes: Iterable[int]) -> int:
    """One exit code for several processes.

    In this order: that of a death by a signal, the first code in TELLING, the largest code.
    codes: exit codes, negative for a death by a signal.
    """
    codes = set(codes)
    if codes and min(codes) < 0:
        return 128 - min(codes)
    return next((c for c in TELLING if c in codes), max(codes, default=1))


def death(rank: int, number: int) -> str:
    """The line about a process that was ended by a signal."""
    reason = ", by the system for want of memory or by somebody" if number == KILL else ""
    return f"error: process {rank} was ended by {name_of(number)}{reason}"


def name_of(number: int) -> str:
    """The name of a signal."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def say(line: str) -> None:
    """Write a line to stderr, whatever becomes of it."""
    with contextlib.suppress(OSError):  # nobody reads it any more
        os.write(2, (line + "\n").encode())


def main(argv: Sequence[str]) -> int:
    """launch.py N PROGRAM: run a program as N processes. Returns the exit code."""
    if (
        len(argv) < 2 or not argv[0].isascii() or not argv[0].isdigit()
        or not 1 <= int(argv[0]) <= PROGRAM_MAX
    ):
        say(f"error: expected a number of processes from 1 to {PROGRAM_MAX} and a program, like launch.py 8 "
            "train_gpt.py")
        return 2
    return launch([sys.executable, *argv[1:]], int(argv[0]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
