"""An independent float64 model and optimizer of records 34 to 57, written from what the notes say of each.

One row of tokens, width 48, six heads of 8 channels; parameters under our names, matrices (outputs, inputs).
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

D, HEADS, WIDTH, BLOCK = 48, 6, 8, 16
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def norm(x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1.1920929e-07)


def gate(x, weight):
    """sigmoid of `weight` times the first 12 channels."""
    return torch.sigmoid(x[..., :12] @ weight.T)


def turned(x, history):
    """(q or k with rotary positions, softmax scale) after the long windows of `history`, in blocks."""
    quarter, scale = WIDTH // 4, 0.1
    f = (1 / 1024) ** torch.linspace(0, 1, quarter, dtype=x.dtype)
    f = torch.cat([f, torch.zeros_like(f)])
    for old, new in zip(history, history[1:]):
        mix = ((BLOCK * old * f / (2 * math.pi) - 1) / 31).clamp(0, 1)
        f, scale = f * (old / new + mix * (1 - old / new)), scale * (1 + 0.2 * math.log(new / old))
    angle = torch.arange(len(x), dtype=x.dtype)[:, None, None] * f
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()], -1), scale


class Layout:
    """What record n has in which layer."""

    def __init__(self, n):
        late = n >= 49  # eleven layers from there on
        self.n, self.count = n, 11 if late else 12
        self.first = 1 if 35 <= n < 49 else 0  # layer 0 is empty
        self.without = {6} if late else {7} | set(range(self.first))
        self.attention = [i for i in range(self.count) if i not in self.without]
        self.without_mlp = set() if late else {0}
        self.long = {3, 10} if late else {0, 4, 11}
        self.values = {0: 1, 1: 2, 8: 0, 9: 1, 10: 2} if late else {0: 0, 1: 1, 2: 2, 9: 0, 10: 1, 11: 2}
        self.backout = 7 if late else 8 if n >= 40 else None
        self.skips = {11 - j: j for j in range(self.first, 6)}
        if n >= 45:
            self.skips = {6: 3} if late else {7: 4}


def attention(p, layout, i, h, x, visible, history):
    """What layer i's attention adds, from its normed input h (T, D)."""
    n, j, pre = layout.n, layout.attention.index(i), f"blocks.{i}.attn."
    w = p[pre + "qkvo"]
    factor = p["sa_lambdas.qkv.value"][j] if n >= 47 else 1.0  # of the weights of q and k too
    q, k, v = ((factor * h @ w[m].T).view(len(h), HEADS, WIDTH) for m in range(3))
    (q, scale), (k, _) = turned(norm(q), history), turned(norm(k), history)
    if n >= 49 and i in layout.long:  # channels that do not turn come from the token before
        before, still = F.pad(k[:-1], (0, 0, 0, 0, 1, 0)), torch.arange(WIDTH) % (WIDTH // 2) >= WIDTH // 4
        k = torch.where(still & (torch.arange(len(k)) > 0)[:, None, None], before, k)
    if n < 47:
        v = v * p["values.v_lambdas.value"][j]
    if i in layout.values:
        table = p[f"values.tables.{layout.values[i]}"][x].view(len(h), HEADS, WIDTH)
        if n >= 55:
            table = table * 2 * gate(h, p[f"values.gates.{i}"])[..., None]
        v = v + (table if n >= 48 else table * p["values.ve_lambdas.value"][j])
    a = (torch.einsum("thd,shd->hts", q, k) * scale).masked_fill(~visible, -math.inf).softmax(-1)
    y = torch.einsum("hts,shd->thd", a, v) * gate(h, p[pre + "gate"])[..., None]
    return y.flatten(1) @ w[3].T * (p["sa_lambdas.o.value"][j] if n >= 48 else 1.0)


def loss(p, n, x, y, documents, long, history, weights, tied):
    """Sum of the losses of record n (34 to 57): x, y (T,) tokens and targets, windows in blocks."""
    layout, at = Layout(n), torch.arange(len(x))
    e = p["lm_head.weight" if tied else "embed.weight"][x]
    more = p["embed.smear.lam.value"] * gate(e[1:], p["embed.smear.gate"]) * e[:-1]
    x0 = stream = norm(torch.cat([e[:1], e[1:] + more]))
    distance, outputs = at[:, None] - at, {}
    for i in range(layout.first, layout.count):
        if i in layout.skips:
            share = torch.sigmoid(p["residual.skip_weights.value"][i - 6 if n < 45 else 0])
            if n >= 55:
                share = share * 2 * gate(x0, p["residual.skip_gate"])
            stream = stream + share * outputs[layout.skips[i]]
        r, z = (p[f"residual.{name}_lambdas.value"][i - layout.count] for name in ("resid", "x0"))
        stream = r * stream + z * x0
        if i in layout.attention:
            window = BLOCK * (long if i in layout.long else long // 2)
            visible = (documents[:, None] == documents) & (distance >= 0) & (distance <= window)
            stream = stream + attention(p, layout, i, norm(stream), x, visible, history)
        if i not in layout.without_mlp:
            h = F.relu(norm(stream) @ p[f"blocks.{i}.mlp.c_fc"].T).square()
            stream = stream + h @ p[f"blocks.{i}.mlp.c_proj"].T
        outputs[i] = stream
    if layout.backout is not None:
        stream = stream - p["residual.backout.value"] * outputs[layout.backout]
    logits = norm(stream) @ p["lm_head.weight"].T
    logits = 23 * torch.sigmoid((logits + 5) / 7.5) if n >= 54 else 30 * torch.sigmoid(logits / 7.5)
    total = 0.0
    for k, weight in enumerate(weights):
        total = total + weight * F.cross_entropy(logits[:len(x) - k], y[k:], reduction="sum")
    return total


# ----- updates

class Muon:
    """Polar Express, NorMuon (axis: of the mean square, None without) and cautious decay of a stored matrix.

    split: matrices that stand below each other in it.
    """

    def __init__(self, lr, factor, decay, axis=None, split=1):
        self.lr, self.factor, self.decay, self.axis, self.split = lr, factor, decay, axis, split
        self.momentum = self.moment = 0.0

    def orthogonalised(self, x):
        x = x / (1.02 * np.linalg.norm(x) + 1e-6)
        wide = x if x.shape[0] <= x.shape[1] else x.T
        for a, b, c in POLAR_EXPRESS:
            gram = wide @ wide.T
            wide = a * wide + (b * gram + c * gram @ gram) @ wide
        return wide if x.shape[0] <= x.shape[1] else wide.T

    def update(self, p, g, momentum, lr_factor):
        self.momentum = momentum * self.momentum + (1 - momentum) * g
        ahead = (1 - momentum) * g + momentum * self.momentum
        u = np.stack([self.orthogonalised(x) for x in ahead.reshape(self.split, -1, p.shape[1])])
        if self.axis is not None:
            self.moment = 0.95 * self.moment + 0.05 * np.square(u).mean(self.axis, keepdims=True)
            scaled = u / np.sqrt(np.maximum(self.moment, 1e-10))
            u = scaled * (np.linalg.norm(u, axis=(1, 2)) / np.linalg.norm(scaled, axis=(1, 2)))[:, None, None]
        u, base = u.reshape(p.shape), self.lr * lr_factor
        return p - base * self.factor * (u + base * self.decay * (u * p >= 0) * p)


class Adam:
    """AdamW of these records: eps before the correction of the second moment, decay where update * p > 0."""

    def __init__(self, lr, beta1, beta2, eps, decay=0.0):
        self.lr, self.beta1, self.beta2, self.eps, self.decay = lr, beta1, beta2, eps, decay
        self.count, self.mean, self.square = 0, 0.0, 0.0

    def update(self, p, g, momentum, lr_factor):
        self.count, lr = self.count + 1, self.lr * lr_factor
        self.mean = self.beta1 * self.mean + (1 - self.beta1) * g
        self.square = self.beta2 * self.square + (1 - self.beta2) * g * g
        rate = lr * math.sqrt(1 - self.beta2 ** self.count) / (1 - self.beta1 ** self.count)
        u = rate * self.mean / (np.sqrt(self.square) + self.eps)
        return p - u - lr * lr * 0.005 * self.decay * (u * p > 0) * p
