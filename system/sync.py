"""--check-sync: a training step must never wait for what the device has computed.

A program that reads a number back (.item(), float(loss), nonzero, a boolean index) waits for the GPU, and
then the GPU is idle until it gets new work. CUDA: torch's sync debug mode. CPU: an approximation that
intercepts the operations that would wait. It misses copies between host and device, and operations inside
custom operators.
"""

import contextlib
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
    """Raises HostRead with the name of an operation that would make the host wait for a GPU."""

    def __torch_dispatch__(
        self, operation: torch._ops.OpOverload, types: Sequence[type], args: tuple = (),
        kwargs: dict | None = None
    ) -> Any:
        name = operation._schema.name
        # repeat_interleave with output_size does not read the size back
        told = (kwargs or {}).get("output_size") is not None
        masks = name in INDEXED and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if (name in READS and not told) or masks:
            raise HostRead(name)
        return operation(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_host_reads(cuda: bool, what: str) -> Iterator[None]:
    """Context that raises UserError at the first read of a result from the device.

    what: beginning of the message, like `step 3`.
    """
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


def complaint(error: BaseException, what: str, operation: str) -> str:
    """One line that names the operation that waits for the device."""
    own = [f for f in traceback.extract_tb(error.__traceback__) if is_own(Path(f.filename))]
    where = f"{Path(own[-1].filename).relative_to(ROOT)}:{own[-1].lineno}" if own else "an operation of torch"
    return (f"{what} waits for the device: {operation} in {where}; keep the number on the device, or know it "
            "beforehand, or leave --check-sync out")


def is_own(path: Path) -> bool:
    """Whether the file belongs to the project's modules or packages, this file excepted."""
    package = path.parent.parent == ROOT and (path.parent / "__init__.py").exists()
    return (path.parent == ROOT or package) and path != Path(__file__)
