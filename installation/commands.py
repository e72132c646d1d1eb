"""The commands that `pip install -e .` adds: each starts a program of the checkout,
from whatever folder it is called in."""

import runpy
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)


def program(name):
    """Run a file of the checkout as `python NAME` does."""
    sys.path.insert(0, ROOT)
    sys.argv[0] = str(Path(ROOT, name))
    runpy.run_path(sys.argv[0], run_name="__main__")


def module(name):
    """Run a module of the checkout as `python -m NAME` does."""
    sys.path.insert(0, ROOT)
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def train():
    """speedrun-train."""
    program("train_gpt.py")


def sample():
    """speedrun-sample."""
    program("sample.py")


def sweep():
    """speedrun-sweep."""
    program("sweep.py")


def records():
    """speedrun-records."""
    module("records")


def tokenize():
    """speedrun-tokenize."""
    module("data.tokenize")


def fineweb():
    """speedrun-fineweb."""
    module("data.fineweb")
