"""Ctrl-C while a run is under way: the log gets its end, and nothing is left half done.

Python raises KeyboardInterrupt at whatever instruction is next: in the middle of a log line, of a thread's start, of an
optimizer's update. So the first Ctrl-C is only noted, and the run stops at the next step or validation chunk; a second one
stops it at once.
"""

import contextlib
import os
import signal


class Interrupt:
    """A context within which SIGINT is noted, unless it is ignored (as by what a script starts with `&`). To be entered by
    the main thread. says: what is told of the first one."""

    def __init__(self, main):
        """main: whether this process speaks for all."""
        self.main, self.asked, self.says = main, False, "stopping where nothing is left half done"

    def __enter__(self):
        self.before = signal.getsignal(signal.SIGINT)
        if self.before not in (signal.SIG_IGN, None):
            signal.signal(signal.SIGINT, self.note)
        return self

    def __exit__(self, *_):
        if self.before not in (signal.SIG_IGN, None):
            signal.signal(signal.SIGINT, self.before)

    def note(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if self.main:  # not print: the interrupted instruction may hold the stream's lock
            with contextlib.suppress(OSError):  # `2>&1 | tee log`: the same Ctrl-C has ended tee
                os.write(2, f"\n{self.says}; Ctrl-C again stops at once\n".encode())

    def check(self):
        """KeyboardInterrupt if one was asked for: called where stopping leaves nothing half done."""
        if self.asked:
            raise KeyboardInterrupt
