"""Several processes that find each other as under torchrun: copies of a process that has torch, or
programs."""

import functools
import multiprocessing
import os
import subprocess
import threading
from collections.abc import Callable

import torch

from system.launch import free_port, telling


def places(world: int) -> list[dict[str, str]]:
    """Environment variables of each of `world` processes on this machine."""
    common = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": free_port()}
    return [
        {name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
        for rank in range(world)
    ]


@functools.cache
def forkserver() -> multiprocessing.context.BaseContext:
    """Context of a process that has loaded torch and nothing else, and of which others are copies."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    return context


def call(world: int, target: Callable, *args: object) -> None:
    """Run target(*args) in `world` processes; each must end with exit code 0."""
    members = [forkserver().Process(target=member, args=(place, target, args)) for place in places(world)]
    for process in members:
        process.start()
    for process in members:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in members] == [0] * world


def member(place: dict[str, str], target: Callable, args: tuple) -> None:
    os.environ |= place
    torch.set_num_threads(1)
    target(*args)


def run(command: list[str], world: int = 1, *, env: dict[str, str] | None = None,
        **kwargs) -> subprocess.CompletedProcess:
    """subprocess.run of a program in `world` processes, without torchrun: that is tested in test_launch.py.

    Its exit code is the most informative one; stdout and stderr are those of all processes, one after the
    other.
    """
    if world == 1:
        return subprocess.run(command, capture_output=True, text=True, env=env, **kwargs)
    done = [None] * world

    def one(rank, place):
        try:
            done[rank] = subprocess.run(command, capture_output=True, text=True,
                                        env={**(os.environ if env is None else env), **place}, **kwargs)
        except subprocess.TimeoutExpired as late:
            done[rank] = subprocess.CompletedProcess(command, 1, "", f"{late}\n")

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(places(world))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return subprocess.CompletedProcess(
        command, telling([one.returncode for one in done]), "".join(one.stdout for one in done),
        "".join(one.stderr for one in done)
    )
