"""The candidates of a sampled softmax, drawn for each logical rank of this process (record 92)."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from data.batch import Documents
from data.candidates import Sweep, require_room
from settings import Settings
from settings.model import padded_vocab
from system.stateful import Stateful
from system.world import World


class Sampler(Stateful):
    """Draws candidates of every step; its state is where each rank's sweep of the classes stands."""
    per_rank = ("offsets",)

    def __init__(self, s: Settings, world: World) -> None:
        self.settings, self.classes, self.world = s.model.head.candidates, padded_vocab(s), world
        self.sweeps = [Sweep(self.classes, rank) for rank in world.ranks]
        self.offsets = torch.tensor(self.places(), device=world.device)

    def places(self) -> list[int]:
        return [sweep.offset for sweep in self.sweeps]

    def draw(self, size: int, documents: Sequence[Documents]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(candidates (ranks, P) int64, corrections (ranks, P) or None) of a step on the device.

        UserError if a rank has more distinct targets than P.
        """
        found, targets = [], []
        for rank, sweep, of_rank in zip(self.world.ranks, self.sweeps, documents):
            drawn = sweep.candidates(of_rank.targets, size)
            require_room(rank, len(drawn), size)
            found.append(drawn)
            targets.append(np.isin(drawn, of_rank.targets))
        self.offsets.copy_(torch.tensor(self.places()), non_blocking=True)
        candidates = self.on_device(torch.from_numpy(np.stack(found)))
        if not self.settings.log_q:
            return candidates, None
        # A class that is no target has the same chance as any other; a target is sure to be a candidate.
        corrections = [np.where(held, 0.0, self.correction(size, int(held.sum()))) for held in targets]
        return candidates, self.on_device(torch.from_numpy(np.stack(corrections)))

    def correction(self, size: int, targets: int) -> float:
        """What is added to the logit of a class that was drawn: minus the log of its chance, times log_q."""
        chance = (size - targets) / max(1, self.classes - targets)
        return -self.settings.log_q * math.log(chance) if chance > 0 else 0.0

    def on_device(self, x: torch.Tensor) -> torch.Tensor:
        return x.pin_memory().to(self.world.device, non_blocking=True) if self.world.cuda else x

    def restored(self) -> None:
        for sweep, offset in zip(self.sweeps, self.offsets.tolist()):
            sweep.offset = offset

    def reset(self) -> None:
        for rank, sweep in zip(self.world.ranks, self.sweeps):
            sweep.offset = Sweep(self.classes, rank).offset
        self.offsets.copy_(torch.tensor(self.places()))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"offsets": self.offsets}
