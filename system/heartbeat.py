"""How far a run is, in a file: a run that is resumed reads it, and who watches one that is under way.

No torch here.
"""

import math
import mmap
import struct
import time
from pathlib import Path

from common import files
from common.errors import UserError
from system.resume import CHECKPOINTS


class Heartbeat:
    """(steps done, milliseconds on the clock, time of day) in a mapped file: a killed process has left them.

    They cost a copy of 24 bytes a step. Without such a file (a read-only folder) nothing is kept.
    """
    FORM = struct.Struct("<qdd")
    FORMER = struct.Struct("<qd")  # without the time of day

    def __init__(self, path: Path) -> None:
        self.map = None
        try:
            path.parent.mkdir(exist_ok=True)
            files.write(path, bytes(self.FORM.size))
            with open(path, "r+b") as file:
                self.map = mmap.mmap(file.fileno(), self.FORM.size)
        except (OSError, ValueError, UserError):
            pass

    def beat(self, steps: int, clock_ms: float) -> None:
        if self.map is not None:
            self.FORM.pack_into(self.map, 0, steps, clock_ms, time.time())

    @classmethod
    def read(cls, path: Path) -> tuple[int, float]:
        """What was kept last; (0, 0.0) if there is nothing to read."""
        steps, clock_ms, _ = cls.whole(path)
        return steps, clock_ms

    @classmethod
    def time(cls, path: Path) -> float:
        """Time of day of the last beat, in seconds since 1970; 0.0 if there is nothing to read."""
        return cls.whole(path)[2]

    @classmethod
    def whole(cls, path: Path) -> tuple[int, float, float]:
        try:
            data = path.read_bytes()
            steps, clock_ms, at = (
                (*cls.FORMER.unpack(data), 0.0) if len(data) == cls.FORMER.size else cls.FORM.unpack(data)
            )
        except (OSError, struct.error):
            return 0, 0.0, 0.0
        sound = steps >= 0 and math.isfinite(clock_ms) and math.isfinite(at)
        return (steps, clock_ms, at) if sound else (0, 0.0, 0.0)


def beaten(folder: Path) -> Path:
    """The file of the heartbeat."""
    return folder / CHECKPOINTS / "clock"
