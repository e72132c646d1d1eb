"""How far a run is, in a file: a run that is resumed reads it, and who watches one that is under way.

No torch here.
"""

import math
import mmap
import struct
from pathlib import Path

from common import files
from common.errors import UserError
from system.resume import CHECKPOINTS


class Heartbeat:
    """(steps done, milliseconds on the clock) in a mapped file: a killed process has left them there.

    They cost a copy of 16 bytes a step. Without such a file (a read-only folder) nothing is kept.
    """
    FORM = struct.Struct("<qd")

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
            self.FORM.pack_into(self.map, 0, steps, clock_ms)

    @classmethod
    def read(cls, path: Path) -> tuple[int, float]:
        """What was kept last; (0, 0.0) if there is nothing to read."""
        try:
            steps, clock_ms = cls.FORM.unpack(path.read_bytes())
        except (OSError, struct.error):
            return 0, 0.0
        return (steps, clock_ms) if steps >= 0 and math.isfinite(clock_ms) else (0, 0.0)


def beaten(folder: Path) -> Path:
    """The file of the heartbeat."""
    return folder / CHECKPOINTS / "clock"
