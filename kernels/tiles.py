"""Tile sizes of the Triton kernels: tuned ones from a file of this card, or the table in a kernel's file.

bench/tune.py writes the file. Tuning is never part of a training: a run reads the file before the clock
starts, if there is one.
"""

import contextlib
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch

from common import files
from common.errors import UserError
from kernels.device import triton_version

Tile = TypeVar("Tile", bound=tuple)  # each kernel has a NamedTuple of its own

trial = {}  # {operation: tile} that is tried out just now


def best(
    operation: str, device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...], default: Tile
) -> Tile:
    """The tile of an operation for tensors of these sizes.

    default: the kernel's own tile, a NamedTuple; the result has the same type.
    """
    if operation in trial:
        return trial[operation]
    if device.type != "cuda":
        return default
    found = table(path(device)).get(key(operation, dtype, sizes))
    if found is None or len(found["tile"]) != len(default):  # of another form of the kernel
        return default
    return type(default)(*found["tile"])


@contextlib.contextmanager
def trying(operation: str, tile: tuple) -> Iterator[None]:
    """Inside, the operation uses this tile."""
    trial[operation] = tile
    try:
        yield
    finally:
        del trial[operation]


def key(operation: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> str:
    """The key of the table: operation, dtype and sizes."""
    return f"{operation} {str(dtype).removeprefix('torch.')} {' x '.join(map(str, sizes))}"


@functools.cache
def card(device: torch.device) -> str:
    """The name of a card and of the Triton that compiles for it: another one of either has its own file."""
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower())
    return f"{name}-triton-{triton_version()}"


def path(device: torch.device) -> Path:
    """The file of the tuned tiles for this GPU."""
    return Path(files.default_cache()) / f"tiles-{card(device)}.json"


@functools.cache
def table(file: Path) -> dict[str, dict]:
    """{key: {"tile": [numbers], "ms": .., "default_ms": ..}}. UserError if the file is broken."""
    if not file.exists():
        return {}
    try:
        tiles = json.loads(file.read_text(encoding="utf-8"))["tiles"]
        if not all(isinstance(n, int) and n > 0 for row in tiles.values() for n in row["tile"]):
            raise ValueError("tiles are lists of positive integers")
        return tiles
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"cannot read the tuned tiles {file} ({error}): delete it, or make it anew with bench/tune.py"
        ) from None


def save(file: Path, tiles: dict[str, dict]) -> None:
    """Write tiles next to those of other operations that the file holds already."""
    files.write(file, files.json_text({"tiles": {**table(file), **tiles}}, indent=1) + "\n", parents=True)
    table.cache_clear()
