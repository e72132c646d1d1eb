"""The trainer's exit codes under `torchrun`, whose agent turns every code but 0 into 1 and a page of text.

Where this project is installed, torchrun loads `rendezvous` below as a plugin (entry point group
`torchrun.handlers`) in its own process. Only if the program that torchrun starts is this project's trainer,
the agent exits with the trainer's code and prints nothing itself. Other programs are not affected.
"""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from common.interrupt import INTERRUPTED, leave_at_once, say
from system.launch import TELLING, death, telling

TRAINER = Path(__file__).resolve().parent.parent / "train_gpt.py"
TALKATIVE = ("torch.distributed.run", "__main__",  # the same module: as a command and by `python -m`
             "torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api")


def rendezvous() -> Callable:
    """torchrun's plugin: the rendezvous backend `speedrun`, which is torch's c10d."""
    if starts_trainer(sys.argv[1:]):
        take_over()
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

    def create(params):
        backend, store = create_backend(params)
        return create_handler(store, backend, params)
    return create


def starts_trainer(words: Sequence[str]) -> bool:
    """Whether torchrun's command line names this project's trainer."""
    return any(word.endswith(TRAINER.name) and Path(word).resolve() == TRAINER for word in words)


def take_over() -> None:
    """Make this process exit with the trainer's code, without the agent's log unless LOGLEVEL is set."""
    if "LOGLEVEL" not in os.environ:
        for name in TALKATIVE:
            logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.CRITICAL)
    leave_at_once("interrupted before the run")  # until the agent installs its own handlers
    before = sys.excepthook

    def end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        code = exit_code(error)
        if code is None:
            before(kind, error, trace)
        else:
            # os._exit: threads of the agent's store may still run, and a normal exit would abort on them
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(code)
    sys.excepthook = end


def exit_code(error: BaseException) -> int | None:
    """The code behind what torchrun's agent raises when a run ends; None for any other error."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    if isinstance(error, SignalException):
        return INTERRUPTED
    if not isinstance(error, ChildFailedError):
        return None
    codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    told = [code for code in codes.values() if code in TELLING]
    if told:  # the agent has ended the others by signals
        return telling(told)
    for rank, code in codes.items():
        if code < 0 and code != -signal.SIGTERM:
            say(death(rank, -code))
    return telling(codes.values())
