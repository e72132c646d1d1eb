"""Watches that a run goes on: a process without progress for too long ends, with a report of all processes.

    watchdog = Watchdog(world, limit=600.0, last_step=lambda: 16, stop=stop)
    watchdog.beat("training")       # what the process does from now on

A rank that hangs (in a collective whose peer is gone, on a dead file system, in a GPU that does not answer)
blocks its main thread, so a thread of its own looks at the time. Each process tells the others how far it is,
in the store with which they found each other. The step that the log names is the last one that the device has
done.
"""

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from common.interrupt import say
from system.world import World

STALLED = 1  # exit code: a run that stalled can be resumed, unlike one that diverged
LOOKS = 10  # within the limit
LONGEST_LOOK_S = 5.0
CONNECT_S = 10.0


class Watchdog:
    """A thread that calls `stop` and ends the process if no `beat` comes for `limit` seconds.

    last_step: function () -> the last step that is done, -1 before the first.
    stop: function (list of what each process did last, text), called in the thread on process 0; it logs.
    """

    def __init__(self, world: World, limit: float, last_step: Callable[[], int],
                 stop: Callable[[list[int], str], None]) -> None:
        self.world, self.limit, self.last_step, self.stop = world, limit, last_step, stop
        self.every = min(LONGEST_LOOK_S, limit / LOOKS)
        # process 0 has the log: the others end only if it does not
        self.patience = limit if world.main else limit + 3 * self.every
        self.doing, self.since = "the first step", time.monotonic()
        # rank -> (last step, what it does, when this was new here, the post as it came)
        self.posts: dict[int, tuple[int, str, float, str]] = {}
        self.keys = f"stall/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"  # torchrun's store stays
        self.store, self.alone = None, world.size == 1
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self.run, name="stall", daemon=True)
        self.thread.start()

    def beat(self, doing: str) -> None:
        """Say what this process does from now on, a few words for the report."""
        self.doing, self.since = doing, time.monotonic()

    def close(self) -> None:
        """End the thread."""
        self.closed.set()
        self.thread.join()

    # ----- in the thread

    def run(self) -> None:
        """Post, look at the others and at the time, until closed."""
        while True:
            began = time.monotonic()
            if self.closed.wait(self.every):
                return
            late = time.monotonic() - began - self.every
            if late > self.every:  # the whole process stood still (Ctrl-Z): that is no stall
                self.since += late
            self.exchange()
            idle = time.monotonic() - self.since
            if idle > self.patience:
                self.end(idle)

    def exchange(self) -> None:
        """Tell the other processes where this one is, and read where they are."""
        self.posts[self.world.rank] = self.last_step(), self.doing, time.monotonic(), ""
        if self.alone:
            return
        try:
            if self.store is None:  # a connection of its own: the main thread may wait inside the other one
                self.store = dist.TCPStore(
                    os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                    wait_for_workers=False, timeout=timedelta(seconds=CONNECT_S)
                )
            post = f"{self.last_step()} {time.time_ns()} {self.doing}"
            self.store.set(f"{self.keys}/{self.world.rank}", post)
            for rank in range(self.world.size):
                key = f"{self.keys}/{rank}"
                if rank != self.world.rank and self.store.check([key]):
                    self.see(rank, self.store.get(key).decode())
        except RuntimeError:  # the process that holds the store is gone
            self.alone = True

    def see(self, rank: int, post: str) -> None:
        """Keep what another process has posted, with the time on this machine at which it was new."""
        step, _, doing = post.split(" ", 2)
        if rank not in self.posts or self.posts[rank][3] != post:
            self.posts[rank] = int(step), doing, time.monotonic(), post

    def report(self, idle: float) -> tuple[list[int], str]:
        """(last step done of each process, -1 if not known; the line about all of them)."""
        now, steps, parts = time.monotonic(), [], []
        for rank in range(self.world.size):
            step, doing, at, _ = self.posts.get(rank, (-1, "not heard of", now, ""))
            silent = f", silent for {now - at:.0f} s" if now - at > 3 * self.every + 1 else ""
            steps.append(step)
            parts.append(f"process {rank} has done {step + 1} steps ({doing}{silent})")
        return steps, f"no progress for {idle:.0f} s: {', '.join(parts)}"

    def end(self, idle: float) -> None:
        """Log on process 0, say it, and end this process. Does not return."""
        steps, text = self.report(idle)
        try:
            if self.world.main:
                self.stop(steps, text)
        finally:
            say(f"error: {text}")
            os._exit(STALLED)
