"""The commands that `pip install -e .` adds: each starts a program of the checkout,
from whatever folder it is called in."""

import runpy
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)


def program(name: str) -> None:
    """Run a file of the checkout as `python NAME` does."""
    sys.path.insert(0, ROOT)
    sys.argv[0] = str(Path(ROOT, name))
    runpy.run_path(sys.argv[0], run_name="__main__")


def module(name: str) -> None:
    """Run a module of the checkout as `python -m NAME` does."""
    sys.path.insert(0, ROOT)
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def train() -> None:
    """speedrun-train."""
    program("train_gpt.py")


def sample() -> None:
    """speedrun-sample."""
    program("sample.py")


def sweep() -> None:
    """speedrun-sweep."""
    program("sweep.py")


def records() -> None:
    """speedrun-records."""
    module("records")


def tokenize() -> None:
    """speedrun-tokenize."""
    module("data.tokenize")


def fineweb() -> None:
    """speedrun-fineweb."""
    module("data.fineweb")
