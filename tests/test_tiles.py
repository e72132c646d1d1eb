"""Laws of tuned tiles: a run reads what was found on its own card, and nothing else."""

import json
from typing import NamedTuple

import pytest
import torch

from kernels import tiles
from settings import UserError


class Tile(NamedTuple):
    side: int
    warps: int


DEFAULT, GPU, SIZES = Tile(128, 8), torch.device("cuda"), (768, 3072)


@pytest.fixture
def card(tmp_path, monkeypatch):
    """A GPU of some name; returns what sets the name."""
    names = {"now": "NVIDIA H200"}
    monkeypatch.setenv("SPEEDRUN_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names["now"])
    monkeypatch.setattr(tiles.importlib.metadata, "version", lambda package: names.get("triton", "3.6.0"))
    tiles.table.cache_clear()
    yield names
    tiles.table.cache_clear()


def best(device=GPU, dtype=torch.bfloat16, sizes=SIZES, operation="gram"):
    return tiles.best(operation, device, dtype, sizes, DEFAULT)


def found(side, operation="gram"):
    return {tiles.key(operation, torch.bfloat16, SIZES): {"tile": [side, 4], "ms": 1.0, "default_ms": 2.0}}


def test_what_was_found_is_used_for_this_operation_type_size_and_card_only(card):
    assert best() == DEFAULT
    tiles.save(tiles.path(GPU), found(64))
    assert best() == Tile(64, 4) and isinstance(best(), Tile)
    assert best(dtype=torch.float16) == best(sizes=(768, 768)) == best(operation="quadratic") == DEFAULT
    assert best(device=torch.device("cpu")) == DEFAULT
    for other in ({"now": "NVIDIA A100"}, {"triton": "3.9.0"}):
        saved = dict(card)
        card.update(other)
        assert best() == DEFAULT
        card.clear()
        card.update(saved)
    assert best() == Tile(64, 4)


def test_saving_keeps_other_operations_and_replaces_the_same(card):
    file = tiles.path(GPU)
    for more in (found(64), found(32, "quadratic"), found(16)):
        tiles.save(file, more)
    assert best() == Tile(16, 4) and best(operation="quadratic") == Tile(32, 4) and not list(file.parent.glob("*.tmp"))


def test_what_is_tried_out_takes_the_place_of_all_else(card):
    tiles.save(tiles.path(GPU), found(64))
    with tiles.trying("gram", Tile(16, 2)):
        assert best() == best(device=torch.device("cpu")) == Tile(16, 2) and best(operation="quadratic") == DEFAULT
    assert best() == Tile(64, 4)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tiles": {"gram": {}}}', '{"tiles": {"gram": {"tile": [0, 4]}}}',
                                  json.dumps({"tiles": {"gram": {"tile": ["a"]}}})])
def test_a_broken_file_is_one_line(card, text):
    tiles.path(GPU).write_text(text)
    with pytest.raises(UserError, match=r"cannot read the tuned tiles .*tiles-nvidia-h200-triton-3.6.0.json .*: delete it"):
        best()
