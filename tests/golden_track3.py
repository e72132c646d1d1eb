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
        self.s = small_models.settings(
            ref, *CHAIN, f"model.model_dim={c['model_dim']}", f"model.attn.num_heads={c['heads']}",
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

    def rate(self, call):
        """(learning rate, momentum) of the hidden matrices."""
        names = self.config["groups"]
        for optimizer, groups in enumerate(names):
            for group, members in enumerate(groups):
                if "blocks.0.mlp.fc.weight" in members:
                    return self.config["rates"][call][optimizer][group]
        raise KeyError("no group has the hidden matrices")

    def call(self, i, between=None):
        """The update of call i."""
        lr, momentum = self.rate(i)
        plan = small_models.plan(
            self.config["step_index"][i], momentum=0.95 if momentum is None else momentum,
            lr_factor=lr / self.lr
        )
        small_models.update(self.optimizer, self.model, self.gradients(i), plan)

    def errors(self, after=None):
        """{(call, label, layer, piece): largest error / largest movement} of all calls that are kept.

        after: called with the number of each call that is done, from 1 (to inject bases).
        """
        start = self.of_ours(lambda name: self.numbers[f"init/{name}"])
        found = {}
        for i in range(len(self.config["step_index"])):
            self.call(i)
            if after is not None:
                after(i + 1)
            if i + 1 in self.config["kept_calls"]:
                at = self.config["kept_calls"].index(i + 1)
                golden = self.of_ours(lambda name: self.numbers[f"param/{name}"][at])
                for (label, layer), x in golden.items():
                    ours = self.model.get_parameter(f"{label}_{layer}").detach().numpy()
                    pieces = zip("qkvo", ours, x, start[label, layer]) if label == "qkvo" else [
                        (label, ours, x, start[label, layer])]
                    for piece, a, b, from_ in pieces:
                        moved = np.abs(b - from_).max()
                        found[i + 1, label, layer, piece] = np.abs(a - b).max() / max(moved, 1e-300)
        return found


def assert_equal(errors, tolerance=1e-9):
    """Every error is at most this share of the movement."""
    worst = max(errors, key=errors.get)
    assert errors[worst] <= tolerance, f"{worst}: {errors[worst]:.2e}"
