"""Averages over the last steps that replace or pull the weights after the last one (record 92)."""

import torch

from model import GPT
from schedule import StepPlan
from settings.optim import TailAverage
from system.stateful import Stateful

# Labels of what is averaged together; the embedding may be the head's weight until the end.
HEAD, MATRICES, VALUES = ("lm_head", "embed"), ("v", "o", "c_fc", "c_proj"), ("value_embed",)
BANKS = (("embed",), ("lm_head",), ("c_fc", "c_proj"), ("qk",), ("v", "o"))  # which keep their norms


class Average:
    """A moving average of some parameters: W_avg <- W_avg + rate (W - W_avg), from W at the first tick."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.values = {name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
                       for name, p in parameters.items()}
        self.started = torch.zeros(1, dtype=torch.int64)  # on the host, so that nothing waits for a GPU

    def tick(self, rate: float) -> None:
        """Move the average; the first time, take the weights."""
        first = not self.started.item()
        self.started.fill_(1)
        for name, value in self.values.items():
            value.lerp_(self.parameters[name].to(value.dtype), 1.0 if first else rate)

    def pull(self, name: str, share: float) -> None:
        """Move a parameter towards its average by this share."""
        p, value = self.parameters[name], self.values[name]
        p.copy_(p.to(value.dtype).lerp(value, share))


class TailAverages(Stateful):
    """The averages of record 92: ticked after updates, applied after the last one.

    A head and an embedding are averaged over the last `long` steps, at the steps that update them, and pulled
    towards it. v, o and the MLPs are averaged over the last `short` steps, every fourth step, and replaced;
    the value tables likewise, at their own updates. Then q, k, v, o and the MLPs are pulled towards a second
    average, over the last `long` steps. Each kind gets back the Frobenius norm that it had. As long as the
    embedding is the head's weight, its average is the head's.
    """

    def __init__(self, model: GPT, settings: TailAverage, steps: int) -> None:
        self.settings, self.steps = settings, steps
        kinds = {}
        for name, p in model.named_parameters():
            kind = name.rpartition(".")[2] if p.label == "qkvo" else p.label
            kinds.setdefault(kind, {})[name] = p

        def of(*names: str) -> dict[str, torch.nn.Parameter]:
            return {name: p for kind in names for name, p in kinds.get(kind, {}).items()}

        self.banks = [of(*names) for names in BANKS]
        self.q_and_k = set(of("qk"))
        self.head, self.matrices, self.values = (Average(of(*names)) for names in (HEAD, MATRICES, VALUES))
        self.blend = Average(of("qk", *MATRICES))

    def after_update(self, plan: StepPlan) -> None:
        with torch.no_grad():
            self.tick(plan)
            if "untie" in plan.events:
                self.untie()
            if plan.step == self.steps - 1:
                self.apply()

    def untie(self) -> None:
        """The embedding takes over the head's average; its own weight was out of use until this step."""
        names = {p.label: name for name, p in self.head.parameters.items()}
        if "embed" in names and "lm_head" in names:
            self.head.values[names["embed"]].copy_(self.head.values[names["lm_head"]])

    def tick(self, plan: StepPlan) -> None:
        """The averages that this step ticks."""
        step, last, settings = plan.step, self.steps - 1, self.settings
        rate = 2 / (settings.long + 1)  # of one step
        if step >= self.steps - settings.long:
            begins = step == self.steps - settings.long
            if begins or plan.due is None or "lm_head" in plan.due:
                self.head.tick(rate if step == last or plan.due is None else 1 - (1 - rate) ** 2)
            if step % 4 == 1 or step >= last - 1:
                self.blend.tick(2 / (settings.long // 4 + 1))
        if step >= self.steps - settings.short:
            if (last - step) % 4 == 0:
                self.matrices.tick(settings.short_rate)
            if plan.due is None or "value_embed" in plan.due:
                self.values.tick(settings.short_rate)

    def apply(self) -> None:
        """Give the averages to the weights."""
        settings, norms = self.settings, [self.norm(bank) for bank in self.banks]
        for name in self.head.parameters:
            self.head.pull(name, settings.head)
        for average in (self.matrices, self.values):
            for name in average.parameters:
                average.pull(name, 1.0)
        for name in self.blend.parameters:
            self.blend.pull(name, settings.qk if name in self.q_and_k else settings.matrices)
        for bank, before in zip(self.banks, norms):
            factor = before / self.norm(bank) if bank else 1.0
            for p in bank.values():
                p.mul_(factor)

    def norm(self, bank: dict[str, torch.nn.Parameter]) -> torch.Tensor | float:
        """The Frobenius norm of several parameters together; of the MLPs with what the originals store
        unread."""
        if not bank:
            return 1.0
        wide = [p.to(torch.promote_types(p.dtype, torch.float32)) for p in bank.values()]
        total = torch.stack([x.square().sum() for x in wide]).sum()
        of_mlps = any(p.label == "c_fc" for p in bank.values())
        return (total + self.settings.unread_mlp_square if of_mlps else total).sqrt()

    def all(self) -> dict[str, Average]:
        return {"head": self.head, "matrices": self.matrices, "values": self.values, "blend": self.blend}

    def reset(self) -> None:
        for average in self.all().values():
            average.started.zero_()
            for value in average.values.values():
                value.zero_()

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {}
        for kind, average in self.all().items():
            found |= {f"{kind}.{name}": value for name, value in average.values.items()}
            found[f"{kind}.started"] = average.started
        return found
