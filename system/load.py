"""How busy the machine is with other programs while the clock of a run goes. No torch here.

On Linux /proc/stat says what all processors did, and this process what it used of that: the rest is other
programs (and, in a virtual machine, other guests). Elsewhere the load average of the last minute stands in,
once the clock went that long.
"""

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")
BUSY_SHARE = 0.1  # of the cores: what other programs may use before a run counts as not alone
# in the first and the last event of a log
FIELDS = ("load_start", "load_end", "own_cores", "other_cores", "alone")
LOAD_WINDOW_S = 60  # what the first load average covers


def load_average() -> float | None:
    """Processes that ran or waited for a core, over the last minute; None where the system does not tell."""
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):  # Windows has none
        return None


def busy_seconds() -> float | None:
    """Seconds that all cores together have worked since the machine started; None without /proc/stat."""
    try:
        fields = STAT.read_text(encoding="utf-8").split("\n", 1)[0].split()
        user, nice, system, _, _, irq, softirq, steal = map(int, fields[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Meter:
    """Sums CPU seconds of this process and of the machine between `start` and `stop`."""

    def __init__(self) -> None:
        self.own_s, self.wall_s = 0.0, 0.0
        self.machine_s: float | None = 0.0
        self.began: tuple[float, float, float | None] | None = None

    def start(self) -> None:
        self.began = time.process_time(), time.perf_counter(), busy_seconds()

    def stop(self) -> None:
        own, wall, machine = self.began
        self.began, now = None, busy_seconds()
        self.own_s += time.process_time() - own
        self.wall_s += time.perf_counter() - wall
        known = self.machine_s is not None and machine is not None and now is not None
        self.machine_s = self.machine_s + now - machine if known else None


def account(meter: Meter, own_s: float, cores: int) -> dict:
    """Fields of a log's last event: load_end, own_cores, other_cores (means over the timed part), alone.

    A field is None where the system does not tell.

    Args:
        own_s: CPU seconds of all processes of the run on this machine while its clock went
        cores: of the machine
    """
    load, wall = load_average(), meter.wall_s
    if not wall:
        return {"load_end": load, "own_cores": None, "other_cores": None, "alone": None}
    own = own_s / wall
    if meter.machine_s is not None:
        other = max(0.0, meter.machine_s / wall - own)
    elif load is not None and wall >= LOAD_WINDOW_S:
        other = max(0.0, load - own)
    else:
        return {"load_end": load, "own_cores": round(own, 2), "other_cores": None, "alone": None}
    return {"load_end": load, "own_cores": round(own, 2), "other_cores": round(other, 2),
            "alone": other <= BUSY_SHARE * cores}


def remark(found: dict, cores: int) -> list[str]:
    """A list with the line that says that other programs were busy; [] if none were, or if unknown."""
    if found["alone"] is not False:
        return []
    load = "" if found["load_end"] is None else f", load {found['load_end']:.1f}"
    return [f"the machine was busy: other programs used {found['other_cores']:.1f} of {cores} cores{load}; "
            "times are not comparable"]
