"""The table of impossible pairs of tokens for canonical masking (record 91), made while the run trains."""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data import seams
from data.shards import Corpus
from runlog import ROOT
from settings import Settings
from settings.model import padded_vocab
from system.world import World


def shape(s: Settings) -> tuple[int, int]:
    """(V, V / 8): of the table, in bytes."""
    return padded_vocab(s), padded_vocab(s) // 8


class Seams:
    """Bits (V, V / 8) of the tokens that cannot follow a token, on the device.

    A process of its own makes them from the start of the clock on, because pure Python in a thread would slow
    the launches of the training. `collect` waits for it, on the clock. Until then the table is empty.
    """

    def __init__(self, s: Settings, corpus: Corpus, world: World) -> None:
        self.world, self.tokenizer, self.rows = world, corpus.tokenizer, padded_vocab(s)
        self.process = self.folder = None
        self.table = torch.zeros(shape(s), dtype=torch.uint8, device=world.device)

    def start(self) -> None:
        """Begin to make the table, on the main process."""
        if not self.world.main:
            return
        self.folder = tempfile.TemporaryDirectory(prefix="speedrun-seams-")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "data.seams", self.tokenizer, str(self.rows), self.path()], cwd=ROOT,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def path(self) -> str:
        return str(Path(self.folder.name, "table.npy"))

    def collect(self) -> None:
        """Fill the table on all processes. Collective."""
        if self.world.main:
            made = self.process.wait() == 0
            bits = np.load(self.path()) if made else seams.of_tokenizer(self.tokenizer, self.rows)
            self.table.copy_(torch.from_numpy(np.array(bits)))
        if self.world.size > 1:
            dist.broadcast(self.table, 0)

    def close(self) -> None:
        """End the process, if it still runs, and remove its file."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.folder is not None:
            self.folder.cleanup()
