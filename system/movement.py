"""The size of an update: how far it moves a sample of the parameters."""

import torch

from optim import Optimizer

PART = 64  # the first rows of each parameter, one in so many


class Movement:
    """Norm of the movement of the first rows of each parameter, one row in PART and at least one.

    A sample, because a copy of all parameters would cost their memory and two passes over them in every step.
    """

    @torch.no_grad()
    def __init__(self, optimizer: Optimizer) -> None:
        parameters = [p.detach() for bank in optimizer.banks for _, p in bank.members]
        self.now = [p[:max(1, len(p) // PART)] if p.dim() else p for p in parameters]
        self.kept = [torch.empty_like(x) for x in self.now]

    @torch.no_grad()
    def begin(self) -> None:
        """Before the update."""
        torch._foreach_copy_(self.kept, self.now)

    @torch.no_grad()
    def end(self) -> torch.Tensor:
        """After the update: its size, 0-d float32 on the device; nothing waits for it."""
        norms = torch._foreach_norm(torch._foreach_sub(self.now, self.kept))
        return torch.stack([x.float() for x in norms]).norm()
