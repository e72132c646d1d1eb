"""The processes of a run, their device and their small collectives (World)."""

import os
import socket
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from common.errors import UserError
from settings import Settings, check_processes
from system.place import Place, local_ranks


class World:
    """Processes and device of this run. One process serves 8 / size logical ranks."""

    def __init__(self, s: Settings) -> None:
        self.place = Place.read()
        self.rank, self.size = self.place.rank, self.place.size
        self.ranks = local_ranks(self.rank, self.size)
        check_processes(s, self.size)
        self.cuda = uses_gpus(s, self.place.local_size)
        self.device = torch.device("cuda", self.place.local_rank) if self.cuda else torch.device("cpu")
        if self.cuda:
            torch.cuda.set_device(self.device)
        elif s.system.reduction == "ordered":
            # sums inside an operation depend on the number of threads; `ordered` promises equal bits
            torch.set_num_threads(1)
        if self.size > 1 and not dist.is_initialized():
            try:
                dist.init_process_group("nccl" if self.cuda else "gloo", **meeting(os.environ))
            except (RuntimeError, ValueError) as error:  # the port is taken, or not all processes came
                raise UserError(
                    f"the {self.size} processes do not find each other at {os.environ['MASTER_ADDR']} port "
                    f"{os.environ['MASTER_PORT']}: {str(error).splitlines()[0]}"
                ) from None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def say(self, *lines: str) -> None:
        """Print lines, on process 0 only."""
        if self.main and lines:
            print(*lines, sep="\n", flush=True)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """One tensor per process -> their concatenation in rank order, on every process."""
        return torch.cat(self.parts(values))

    def parts(self, values: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all processes (equal shapes), in rank order, on every process."""
        if self.size == 1:
            return [values]
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous())
        return parts

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of a float64 tensor over the processes, summed in rank order: equal bits everywhere."""
        return sum(self.parts(values)) / self.size

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the processes, on every process."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather_objects(self, value: Any) -> list:
        """One picklable object per process -> their list in rank order, on every process."""
        if self.size == 1:
            return [value]
        parts = [None] * self.size
        dist.all_gather_object(parts, value)
        return parts

    def neighbours(self) -> tuple[list[int], int | None]:
        """(ids of the run's processes on this machine, id of process 0 if it is on this machine, or None)."""
        here = socket.gethostname()
        found = self.gather_objects((here, os.getpid()))
        return [i for host, i in found if host == here], found[0][1] if found[0][0] == here else None

    def describe(self) -> str:
        if self.cuda:
            return f"{self.size} x {torch.cuda.get_device_name()}"
        return f"CPU, {self.size} process{'es' if self.size > 1 else ''}, {torch.get_num_threads()} threads"


def meeting(environment: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of init_process_group with which processes that torchrun has started again find each other.

    torch 2.13 keeps one store for all restarts, so that the addresses of processes that are gone are still in
    it, and a restart fails or waits for them. Here each restart has keys of its own. {} for a first start.
    """
    restarts = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    place = Place.read(environment)
    store = dist.TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), place.size,
                          is_master=False)
    return {"store": dist.PrefixStore(f"restart{restarts}", store), "rank": place.rank,
            "world_size": place.size}


def uses_gpus(s: Settings, processes: int) -> bool:
    """Whether the run uses GPUs.

    UserError if system.device=cuda and torch finds none, or if this machine has fewer GPUs than processes.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if s.system.device == "cuda" and not found:
        raise UserError(
            "system.device=cuda, but torch finds no GPU: --set system.device=cpu, or install a CUDA torch"
        )
    if not found or s.system.device == "cpu":
        return False
    if processes > found:
        raise UserError(f"{processes} processes on this machine, and torch sees {found} "
                        f"GPU{'s' if found > 1 else ''}: start fewer, or look at CUDA_VISIBLE_DEVICES")
    return True


def lost_peer(error: RuntimeError) -> bool:
    """Whether a collective raised this error because another process is gone."""
    said = str(error)
    return dist.is_initialized() and any(
        x in said for x in ("closed by peer", "reset by peer", "Broken pipe", "Socket closed",
                            "Connection was likely closed", "failed to recv", "Failed to recv")
    )
