"""Laws of tuned tiles: a run reads what was found on its own card, and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from kernels import tiles
from common.errors import UserError


ROOT = Path(__file__).parent.parent


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
    monkeypatch.setattr(tiles, "triton_version", lambda: names.get("triton", "3.6.0"))
    monkeypatch.setattr(tiles, "card", tiles.card.__wrapped__)  # names change here
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
    assert tiles.best("gram", GPU, torch.bfloat16, SIZES, (1, 2, 3)) == (1, 2, 3)  # another form of tile
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
    assert (
        best() == Tile(16, 4) and best(operation="quadratic") == Tile(32, 4)
        and not list(file.parent.glob("*.tmp"))
    )


def test_what_is_tried_out_takes_the_place_of_all_else(card):
    tiles.save(tiles.path(GPU), found(64))
    with tiles.trying("gram", Tile(16, 2)):
        assert (
            best() == best(device=torch.device("cpu")) == Tile(16, 2)
            and best(operation="quadratic") == DEFAULT
        )
    assert best() == Tile(64, 4)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"tiles": {"gram": {}}}', '{"tiles": {"gram": {"tile": [0, 4]}}}',
        json.dumps({"tiles": {"gram": {"tile": ["a"]}}})
    ],
)
def test_a_broken_file_is_one_line(card, text):
    tiles.path(GPU).write_text(text)
    with pytest.raises(
        UserError, match=r"cannot read the tuned tiles .*tiles-nvidia-h200-triton-3.6.0.json .*: delete it"
    ):
        best()


def test_the_fastest_tile_is_kept_if_it_gains_and_one_that_does_not_fit_is_passed_over(capsys):
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import tune
    finally:
        sys.path.pop(0)
    seconds = {DEFAULT: 1.0, Tile(64, 4): 0.99, Tile(32, 4): 0.5, Tile(16, 4): None}

    def time(step):
        tile = step()
        if seconds[tile] is None:
            raise RuntimeError("out of resource: shared memory")
        return seconds[tile]

    def fastest(*candidates):
        return tune.fastest("gram", best, candidates, DEFAULT, time)

    assert fastest(Tile(64, 4)) == (DEFAULT, 1000.0, 1000.0, 1)  # one percent is noise
    assert fastest(Tile(64, 4), Tile(32, 4), Tile(16, 4)) == (Tile(32, 4), 500.0, 1000.0, 3)
    assert "(16, 4): RuntimeError: out of resource: shared memory" in capsys.readouterr().out


def test_every_operation_that_is_tuned_runs_with_another_tile():
    """In Triton's interpreter, on the shapes of a small record."""
    pytest.importorskip("triton")
    script = (
        "import sys, torch; sys.path.insert(0, 'bench')\n"
        "import tune; from settings import deltas\n"
        "from kernels import tiles\n"
        "tune.DEVICE, tune.TOKENS = torch.device('cpu'), 40\n"
        "tune.capability = lambda device: 90\n"
        "tune.tensor = lambda *shape: torch.randn(*shape)\n"
        "s = deltas.resolve('short/33', scale='micro', sets=['system.precision=record']).settings\n"
        "for operation, (cases, candidates) in tune.OPERATIONS.items():\n"
        "    seen = 0\n"
        "    for dtype, sizes, default, step in cases(s):\n"
        "        tile = next(t for t in candidates if t != default)\n"
        "        def time(step): step(); return float(tiles.trial[operation] != tile)\n"
        "        found = tune.fastest(operation, step, [tile], default, time)\n"
        "        assert found == (tile, 0.0, 1000.0, 1), (operation, found)\n"
        "        seen += 1\n"
        "    print(operation, seen)\n")
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=280,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.split()[0] for line in done.stdout.splitlines() if line.split()[1] != "0"] == [
        "symmetric", "linear_relu_sq", "fp8_linear_relu_sq", "qk_rotary", "cross_entropy"]
