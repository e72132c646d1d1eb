"""--check-sync: a training step must never wait for what the device has computed.

A program that reads a number back (.item(), float(loss), nonzero, a boolean index) stops until the GPU has
caught up, and the GPU is idle until it gets work again. On CUDA torch itself tells. On a CPU we look at the
operations for those that would: there copies between host and device do not exist, nor are those inside
operators of our own seen, so a GPU has the last word.
"""

import contextlib
import traceback
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import UserError

ROOT = Path(__file__).parent.parent
# results whose value or shape the host must know before it goes on
READS = {
    f"aten::{name}"
    for name in (
        "_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim",
        "unique_consecutive", "repeat_interleave", "bincount"
    )
}
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class HostRead(Exception):
    """Raised where a timed step reads a value from the device."""


class Watch(TorchDispatchMode):
    """Raises HostRead, with the operation's name, at one that would make the host wait for a GPU."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name
        # of repeat_interleave: then it need not be found out
        told = (kwargs or {}).get("output_size") is not None
        masks = name in INDEXED and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if (name in READS and not told) or masks:
            raise HostRead(name)
        return operation(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_host_reads(cuda, what):
    """UserError at the first read of a device's result inside. what: of the message's beginning, like `step
    3`."""
    try:
        if cuda:
            torch.cuda.set_sync_debug_mode("error")
            yield
        else:
            with Watch():
                yield
    except HostRead as read:
        raise UserError(complaint(read, what, str(read))) from None
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        raise UserError(complaint(error, what, "a synchronising CUDA operation")) from None
    finally:
        if cuda:
            torch.cuda.set_sync_debug_mode("default")


def complaint(error, what, operation):
    """One line that names the operation that waits for the device."""
    own = [f for f in traceback.extract_tb(error.__traceback__) if is_own(Path(f.filename))]
    where = f"{Path(own[-1].filename).relative_to(ROOT)}:{own[-1].lineno}" if own else "an operation of torch"
    return (f"{what} waits for the device: {operation} in {where}; keep the number on the device, or know it "
            "beforehand, or leave --check-sync away")


def is_own(path: Path) -> bool:
    """Is the file one of the project's modules or packages, other than this one?"""
    package = path.parent.parent == ROOT and (path.parent / "__init__.py").exists()
    return (path.parent == ROOT or package) and path != Path(__file__)
