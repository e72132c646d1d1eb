"""The rank of this process in a run, from the environment variables of its launcher; read only here.

No torch here, so that a wrong environment is refused before torch is imported, which takes seconds.
"""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from common.errors import UserError
from settings.data import LOGICAL_RANKS

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
REMEDY = (
    "unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT for one process; `--nproc N` and torchrun set "
    "all of them"
)
PROCESSES = tuple(n for n in range(1, LOGICAL_RANKS + 1) if LOGICAL_RANKS % n == 0)


def local_ranks(rank: int, world: int) -> range:
    """The logical ranks of a process. UserError if the number of processes does not divide eight."""
    if LOGICAL_RANKS % world:
        raise UserError(
            f"{world} processes do not divide the {LOGICAL_RANKS} logical ranks: use 1, 2, 4 or 8"
        )
    each = LOGICAL_RANKS // world
    return range(rank * each, (rank + 1) * each)


class Misplaced(UserError):
    """The environment of this process is wrong; the process prints it itself, whatever its rank."""
    own = True


@dataclass(frozen=True)
class Place:
    """rank of size processes; local_rank of local_size on this machine, which is the number of its GPU."""
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launched: bool = False  # by a launcher, rather than alone

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> "Place":
        """The place in the environment. Misplaced if its variables are wrong, UserError for a wrong size."""
        found = [name for name in VARIABLES if name in environment]
        if not found:
            return cls()
        missing = [name for name in VARIABLES if name not in environment]
        if missing:
            verb = "is" if len(found) == 1 else "are"
            raise Misplaced(f"{', '.join(found)} {verb} set without {', '.join(missing)}: {REMEDY}")
        size = whole("WORLD_SIZE", environment, 1)
        if size not in PROCESSES:
            raise UserError(
                f"WORLD_SIZE={size}: {size} processes do not divide the {LOGICAL_RANKS} logical ranks: use "
                f"{', '.join(map(str, PROCESSES[:-1]))} or {PROCESSES[-1]}"
            )
        rank = whole("RANK", environment, 0, size - 1, f"WORLD_SIZE={size}")
        local = environment.get("LOCAL_WORLD_SIZE")
        local_size = (
            size if local is None else whole("LOCAL_WORLD_SIZE", environment, 1, size, f"WORLD_SIZE={size}")
        )
        local_rank = whole(
            "LOCAL_RANK", environment, 0, local_size - 1, f"{local_size} processes on this machine"
        )
        whole("MASTER_PORT", environment, 1, 65535)
        if size > 1:
            check_address(environment["MASTER_ADDR"], environment["MASTER_PORT"])
        return cls(rank, size, local_rank, local_size, launched=True)


def whole(name: str, environment: Mapping[str, str], low: int, high: int | None = None, why: str = "") -> int:
    """A variable that must hold a whole number in low..high. why: what limits it."""
    text = environment[name]
    value = int(text) if re.fullmatch("[0-9]{1,9}", text) else None
    if value is None or value < low or (high is not None and value > high):
        limits = f"a whole number {f'from {low} to {high}' if high is not None else f'of at least {low}'}"
        raise Misplaced(f"{name}={text[:40]!r}: expected {limits}{f' ({why})' if why else ''}; {REMEDY}")
    return value


def check_address(address: str, port: str) -> None:
    """Misplaced if no machine can have this address: torch would try it for minutes."""
    try:
        if not address.strip():
            raise OSError("it is empty")
        socket.getaddrinfo(address, int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = str(getattr(error, "strerror", None) or error)[:60]
        raise Misplaced(f"MASTER_ADDR={address[:40]!r}: no such machine ({reason}); {REMEDY}") from None
