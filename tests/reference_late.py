"""An independent optimizer of records 89 and 92, of all parameters of a model, written from the notes.

One head and embedding until `split`, sums of gradients over the steps between two updates of a parameter.
"""

import math

import torch

from kernels.newton_schulz import ANVIL, POLAR_EXPRESS

PAIR = 2  # heads of q, or of k, in one matrix
SMALL = (0.9, 0.99)
ADAM = {  # label -> rate, betas, factor of the decay of 0.005
    "lm_head": (0.008, (0.5, 0.95), 150), "embed": (0.008, (0.5, 0.95), 150),
    "sa_lambdas": (0.04, SMALL, 0), "smear_lambda": (0.04, SMALL, 0), "skip_weights": (0.04, SMALL, 0),
    "smear_gate": (0.00008, SMALL, 0), "ve_gate": (0.008, SMALL, 1),
    "post_lambdas": (0.008, (0.9, 0.95), 0), "resid_lambdas": (0.04, (0.9, 0.95), 0),
    "mudd": (0.002, SMALL, 1), "mudd_bias": (0.002, SMALL, 0), "token_gate": (0.0008, SMALL, 1),
    "token_gate_bias": (0.0008, SMALL, 0), "token_gate_scale": (0.0008, SMALL, 0)
}
TABLE = {89: (0.6, (0.75, 0.95), 5), 92: (0.56, (0.75, 0.95), 5)}  # of values, and of pairs in 89


def orthogonalised(x, maps, margin):
    """x <- a x + (b g + c g g) x, with g = x x^T, of a matrix whose Frobenius norm is 1 / margin."""
    x = x / (margin * x.norm() + 1e-6)
    wide = x if x.shape[0] <= x.shape[1] else x.T
    for a, b, c in maps:
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if x.shape[0] <= x.shape[1] else wide.T


class Replay:
    """values: {name: tensor}, what the parameters are. labels: {name: label}."""

    def __init__(self, n, values, labels, heads, split):
        self.n, self.values, self.labels, self.heads, self.split = n, values, labels, heads, split
        self.sums = {name: torch.zeros_like(x) for name, x in values.items()}
        self.states = {name: {"count": 0} for name in values}

    def step(self, gradients, step, lr_factor, momentum):
        """gradients: as if head and embedding were apart."""
        for name, g in gradients.items():
            to = "lm_head.weight" if name == "embed.weight" and step <= self.split else name
            self.sums[to] += g
        for name, label in self.labels.items():
            slow = self.n == 92 and label in ("value_embed", "bigram") and step >= 336
            if label in ("qkvo", "c_fc", "c_proj"):
                self.matrix(name, label, step, lr_factor, momentum)
            elif step % 4 != 3 if slow else step % 2 == 0:
                continue
            elif label == "bigram" and self.n == 92:
                self.rows(name, lr_factor, 2 if slow else 1)
            elif name != "embed.weight" or step > self.split:
                rates = TABLE[self.n] if label in ("value_embed", "bigram") else ADAM[label]
                self.adam(name, rates, lr_factor, 2 if slow else 1)
            self.sums[name] = torch.zeros_like(self.sums[name])
        if step <= self.split:
            self.values["embed.weight"] = self.values["lm_head.weight"]
            self.states["embed.weight"] = dict(self.states["lm_head.weight"])

    def matrix(self, name, label, step, lr_factor, momentum):
        """As the original stores it: pairs of heads of q and k, the second matrix of an MLP turned."""
        p, state = self.values[name], self.states[name]
        rows = PAIR * p.shape[-2] // self.heads if name.endswith(".qk") else None
        turn = label == "c_proj"
        w, g = (x.T[None] if turn else x.reshape(-1, rows or x.shape[0], x.shape[-1])
                for x in (p, self.sums[name]))
        tall, lr = w.shape[1] >= w.shape[2], 0.023 * lr_factor
        factor = math.sqrt(max(1, w.shape[1] / w.shape[2])) * (2 if turn else 1)
        fast, slow = (state.get(key, torch.zeros_like(w)) for key in ("fast", "slow"))
        anvil = self.n == 92
        beta, share = (0.85, 0.4385) if anvil and step >= 514 else (momentum, 1.0)
        fast, slow = beta * fast + (1 - beta) * g, 0.98 * slow + 0.02 * g
        ahead = (1 - momentum) * g + momentum * (share * fast + (1 - share) * slow)
        maps, margin, decay = (ANVIL, 1.05, 2.25) if anvil else (POLAR_EXPRESS, 1.02, 1.2)
        u = torch.stack([orthogonalised(x, maps, margin) for x in ahead])
        moment = 0.9 * state.get("moment", 0.0) + 0.1 * u.square().mean(-1 if tall else -2, keepdim=True)
        y = u * moment.clamp_min(1e-10).rsqrt()
        y = y * (u.flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1))[:, None, None]
        gate = (slow if anvil else y) * w >= 0
        self.states[name] = {"fast": fast, "slow": slow, "moment": moment}
        w = w - lr * factor * (decay * lr * gate * w + y)
        self.values[name] = w[0].T if turn else w.reshape(p.shape)

    def adam(self, name, rates, lr_factor, times):
        """times: updates that one stands for, in betas and decay."""
        (lr, betas, decay), state, g = rates, self.states[name], self.sums[name]
        (b1, b2), lr = (beta ** times for beta in betas), lr * lr_factor
        state["count"] += 1
        state["mean"] = b1 * state.get("mean", 0.0) + (1 - b1) * g
        state["square"] = b2 * state.get("square", 0.0) + (1 - b2) * g * g
        rate = lr * math.sqrt(1 - b2 ** state["count"]) / (1 - b1 ** state["count"])
        u = rate * state["mean"] / (state["square"].sqrt() + 1e-10)
        self.move(name, u, lr * lr * 0.005 * decay * times)

    def rows(self, name, lr_factor, times):
        """Adam without a mean, and with one second moment a row."""
        state, g, lr, b2 = self.states[name], self.sums[name], 0.56 * lr_factor, 0.95 ** times
        state["count"] += 1
        state["square"] = b2 * state.get("square", 0.0) + (1 - b2) * g.square().mean(1, keepdim=True)
        rate = lr * math.sqrt(1 - b2 ** state["count"])
        self.move(name, rate * g / (state["square"].sqrt() + 1e-10), lr * lr * 0.005 * 5 * times)

    def move(self, name, u, decay):
        p = self.values[name]
        self.values[name] = p - u - decay * (u * p > 0) * p
