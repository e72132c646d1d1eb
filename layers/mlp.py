"""The feed-forward part of a block."""

import torch.nn.functional as F
from torch import nn

from kernels.linear_relu_sq import mlp_relu_sq
from layers.fp8_mlp import FP8MLP
from layers.primitives import constant, linear, linear_init, parameter
from settings import Settings
from updates import views


class MLP(nn.Module):
    """W_down phi(W_up x), or with SwiGLU W_down (silu(W_gate x) * W_up x), hidden width F."""

    ACTIVATIONS = {
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu,
        "relu_sq": lambda x: F.relu(x).square(), "swiglu": F.silu
    }

    def __init__(self, s: Settings, hidden: int):
        super().__init__()
        d, f, n = s.model.model_dim, hidden, s.numerics
        self.up = parameter((f, d), n.matrix, role="matrix", label="mlp_up", views=views.mlp_up(s),
                            init=linear_init(s, d, projection=False))
        self.down = parameter((d, f), n.matrix, role="matrix", label="mlp_down", views=views.mlp_down(s),
                              init=linear_init(s, f, projection=True))
        self.gate = None
        if s.model.mlp.activation == "swiglu":
            self.gate = parameter((f, d), n.matrix, role="matrix", label="mlp_up", views=views.mlp_up(s),
                                  init=linear_init(s, d, projection=False))
        self.up_bias = self.down_bias = None
        if s.model.bias:
            self.up_bias = parameter((f,), n.scalar, role="scalar", label="bias", init=constant(0.0))
            self.down_bias = parameter((d,), n.scalar, role="scalar", label="bias", init=constant(0.0))
        self.activation, self.fused = (
            self.ACTIVATIONS[s.model.mlp.activation],
            s.system.kernels.mlp == "triton",
        )
        self.fp8 = FP8MLP(s) if n.fp8_mlp else None

    def forward(self, x):
        if self.fp8 is not None and self.training:
            return self.fp8(x, self.up, self.down)
        if self.fused:
            return mlp_relu_sq(x, self.up, self.down)
        if self.gate is not None:
            return linear(self.activation(linear(x, self.gate)) * linear(x, self.up), self.down)
        return linear(self.activation(linear(x, self.up, self.up_bias)), self.down, self.down_bias)
