"""Replay the optimizer fixtures of the optimizer track through our Optimizer.

tests/golden/t3_*.npz: `init/<parameter>`, `grad/<parameter>` (calls, ...) as the upper 16 bits of a float32,
`param/<parameter>` (kept calls, ...) in float64, `basis/...` (arbitrary bases of rank-deficient statistics),
`noise/...`, and `config`: shapes, the training step, learning rates and momentum of every call.
"""

import numpy as np
import torch

import small_models
from golden_records import load
from optim import Optimizer
from updates import views

# State of the original -> ours.
BASES = {"q_row": "soap_left_basis", "q_col": "soap_right_basis", "Q_left": "basis_left",
         "Q_right": "basis_right", "Q.0": "basis_left", "Q.1": "basis_right"}
HIDDEN = {"c_fc": "mlp.fc.weight", "c_proj": "mlp.proj.weight"}
QKVO = [f"attn.{x}.weight" for x in ("q", "k", "v", "proj")]
# Chains of the track on the root of short records, until a test resolves the record itself.
CHAIN = ("optim.muon.momentum=0.95", "optim.muon.momentum_ema=true", "optim.muon.momentum_warmup=false",
         "optim.muon.convergent=true", "optim.muon.ns_steps=12", "optim.muon.scale=sqrt_ratio",
         "optim.muon.split_qkv=true", "optim.muon.c_fc_orientation=out_in", "optim.grad_clip=false")


class Replay:
    """The hidden matrices of a fixture in our Optimizer.

    sets: settings on top of CHAIN. lr: optim.muon.lr, which the fixture's rates are relative to.
    """

    def __init__(self, name, *sets, lr=1.0, ref="short/11", rules=None):
        self.numbers, self.config = load(name)
        c = self.config
        sets = {line.partition("=")[0]: line for line in (*CHAIN, *sets)}.values()  # the last of each path
        self.s = small_models.settings(
            ref, f"model.model_dim={c['model_dim']}", f"model.attn.num_heads={c['heads']}",
            f"model.mlp.hidden={c['hidden']}", f"optim.muon.lr={lr}", *sets
        )
        self.lr = lr
        of = {"qkvo": views.qkvo(self.s), "c_fc": views.c_fc(self.s), "c_proj": views.c_proj(self.s)}
        self.model = small_models.Toy(**{
            f"{label}_{layer}": (torch.from_numpy(x), "matrix", label, of[label])
            for (label, layer), x in self.of_ours(lambda name: self.numbers[f"init/{name}"]).items()
        })
        self.optimizer = Optimizer(self.model, self.s, **({} if rules is None else {"rules": rules}))

    def of_ours(self, get):
        """{(label, layer): float64 array}, q, k, v and o as one. get: from the original's name."""
        found = {}
        for layer in range(self.config["layers"]):
            block = f"blocks.{layer}."
            found["qkvo", layer] = np.stack([get(block + name) for name in QKVO], axis=-3).astype(np.float64)
            for label, name in HIDDEN.items():
                found[label, layer] = get(block + name).astype(np.float64)
        return found

    def gradients(self, call):
        """{our parameter: gradient} of a call, from 0."""
        def get(name):
            return (self.numbers[f"grad/{name}"][call].astype(np.uint32) << 16).view(np.float32)
        return {f"{label}_{layer}": torch.from_numpy(x) for (label, layer), x in self.of_ours(get).items()}

    def rate(self, call, of="blocks.0.mlp.fc.weight"):
        """(learning rate, momentum) of the group with this parameter."""
        names = self.config["groups"]
        for optimizer, groups in enumerate(names):
            for group, members in enumerate(groups):
                lr, momentum = self.config["rates"][call][optimizer][group]
                if of in members and lr is not None:  # a wrapper has every parameter and no rate
                    return lr, momentum
        raise KeyError(of)

    def inject(self, name, key, value):
        """Set a state of one of the original's matrices. name: blocks.0.attn.v.weight; key: ours."""
        _, layer, part, matrix, _ = name.split(".")
        label = "qkvo" if part == "attn" else {"fc": "c_fc", "proj": "c_proj"}[matrix]
        piece = {"q": 0, "k": 1, "v": 2, "proj": 3}[matrix] if label == "qkvo" else 0
        for bank in self.optimizer.banks:
            own = f"{key}@{'qkvo'[piece]}" if bank.views.joined else key
            for member, state in bank.members_of(bank.state[own]) if own in bank.state else ():
                if member == f"{label}_{layer}":
                    state[0 if bank.views.joined else piece] = torch.from_numpy(value)
                    return
        raise KeyError(name, key)

    def call(self, i):
        """The update of call i."""
        lr, momentum = self.rate(i)
        plan = small_models.plan(
            self.config["step_index"][i], momentum=0.95 if momentum is None else momentum,
            lr_factor=lr / self.lr
        )
        small_models.update(self.optimizer, self.model, self.gradients(i), plan)

    def errors(self, before=None, after=None):
        """{(call, label, layer, piece): largest error / largest movement} of all calls that are kept.

        before, after: called with the number of each call, from 0 (wrappers).
        """
        start = self.of_ours(lambda name: self.numbers[f"init/{name}"])
        found = {}
        for i in range(len(self.config["step_index"])):
            if before is not None:
                before(i)
            self.call(i)
            if i + 1 == self.config.get("basis_call"):
                self.inject_bases()
            if after is not None:
                after(i)
            if i + 1 in self.config["kept_calls"]:
                at = self.config["kept_calls"].index(i + 1)
                golden = self.of_ours(lambda name: self.numbers[f"param/{name}"][at])
                for (label, layer), x in golden.items():
                    ours = self.model.get_parameter(f"{label}_{layer}").detach().numpy()
                    pieces = zip("qkvo", ours, x, start[label, layer]) if label == "qkvo" else [
                        (label, ours, x, start[label, layer])]
                    for piece, a, b, from_ in pieces:
                        # a step of length 0 leaves the rounding of the weights
                        moved = max(np.abs(b - from_).max(), 1e-7 * np.abs(b).max())
                        found[i + 1, label, layer, piece] = np.abs(a - b).max() / moved
        return found

    def inject_bases(self):
        """Set the bases of matrices that are not square to the fixture's, because they were arbitrary."""
        for name in self.numbers:
            if name.startswith("basis/"):
                _, of, side = name.split("/")
                self.inject(of, BASES[side], self.numbers[name])


class LookAhead:
    """EMA-Nesterov of results 40 to 46 by hand (before, after), on the hidden matrices.

    Before step t in [300, 1950): W <- W + 0.3 r m, where r is the embedding's rate of the call before over
    its peak. After it: m <- 0.99 m + 0.01 (W - its value after the call before).
    """

    def __init__(self, replay, peak=0.3):
        self.replay, self.peak = replay, peak
        self.last = {name: p.detach().clone() for name, p in replay.model.named_parameters()}
        self.ema = {name: torch.zeros_like(p) for name, p in self.last.items()}

    def before(self, i):
        if 300 <= self.replay.config["step_index"][i] < 1950:
            share = self.replay.rate(i - 1, "embed.weight")[0] / self.peak if i else 1.0
            for name, p in self.replay.model.named_parameters():
                p.data += 0.3 * share * self.ema[name]

    def after(self, i):
        for name, p in self.replay.model.named_parameters():
            self.ema[name].mul_(0.99).add_(p.detach() - self.last[name], alpha=0.01)
            self.last[name] = p.detach().clone()


class Extrapolation:
    """Reduced-rank extrapolation of result 34 by hand, of all hidden matrices as one vector.

    From step + 1 = 2820 on the last four weights are kept; when step + 1 is a multiple of 5, the differences
    d of four of them give c = (d d^T + ridge)^-1 1, normed to sum 1, g_a = sum of c_b over b >= a, and the
    weights move by -0.875 sum g_a d_a, at most 0.001 of their norm.
    """

    def __init__(self, replay):
        self.replay, self.kept = replay, []

    def after(self, i):
        done = self.replay.config["step_index"][i] + 1
        if done < 2820:
            return
        weights = list(self.replay.model.parameters())
        now = torch.cat([p.detach().flatten() for p in weights])
        self.kept = [*self.kept, now][-4:]
        if done % 5 or len(self.kept) < 4:
            return
        d = torch.stack([b - a for a, b in zip(self.kept, self.kept[1:])])
        gram = d @ d.T
        ridge = (1e-6 * gram.trace() / 3 + 1e-10) * torch.eye(3)
        c = torch.linalg.solve(gram + ridge, torch.ones(3, dtype=gram.dtype))
        move = -0.875 * (c / c.sum()).flip(0).cumsum(0).flip(0) @ d
        now = now + move * min(1.0, 0.001 * now.norm().item() / move.norm().item())
        self.kept = [now]
        for p, x in zip(weights, now.split([p.numel() for p in weights])):
            p.data.copy_(x.view(p.shape))


def assert_equal(errors, tolerance=1e-9):
    """Every error is at most this share of the movement, and none is NaN."""
    above = {name: error for name, error in errors.items() if not error <= tolerance}
    assert errors and not above, above
