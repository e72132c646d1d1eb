"""The feed-forward part of a block."""

import torch
import torch.nn.functional as F
from torch import nn

from kernels import eager
from kernels.linear_relu_sq import mlp_relu_sq
from layers.fp8_mlp import FP8MLP
from layers.primitives import bias_init, linear, linear_init, parameter, products_dtype
from settings import Settings
from updates import views


def relu_sq(x: torch.Tensor) -> torch.Tensor:
    """relu(x)^2, elementwise."""
    return eager.ReluSq.apply(x) if eager.applies(x) else F.relu(x).square()


class MLP(nn.Module):
    """W_proj phi(W_fc x), or with SwiGLU W_proj (silu(W_gate x) * W_fc x), hidden width F."""

    ACTIVATIONS = {
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu,
        "relu_sq": relu_sq, "swiglu": F.silu
    }

    def __init__(self, s: Settings, hidden: int, c_fc_factor: float = 1.0) -> None:
        """c_fc_factor: of the initial values of c_fc."""
        super().__init__()
        init = s.model.init
        d, f, n = s.model.model_dim, hidden, s.numerics
        self.c_fc = parameter((f, d), n.matrix, role="matrix", label="c_fc", views=views.c_fc(s),
                              init=linear_init(s, d, False, init.c_fc_bound, c_fc_factor))
        self.c_proj = parameter((d, f), n.matrix, role="matrix", label="c_proj", views=views.c_proj(s),
                                init=linear_init(s, f, True, init.c_proj_bound))
        self.gate = None
        if s.model.mlp.activation == "swiglu":
            self.gate = parameter((f, d), n.matrix, role="matrix", label="c_fc", views=views.c_fc(s),
                                  init=linear_init(s, d, projection=False))
        self.c_fc_bias = self.c_proj_bias = None
        if s.model.bias:
            self.c_fc_bias = parameter(
                (f,), n.scalar, role="scalar", label="bias", init=bias_init(s, d, False)
            )
            self.c_proj_bias = parameter(
                (d,), n.scalar, role="scalar", label="bias", init=bias_init(s, f, True)
            )
        self.activation = self.ACTIVATIONS[s.model.mlp.activation]
        self.fused = s.system.kernels.mlp == "triton"
        self.fp8 = FP8MLP(s) if n.fp8_mlp else None
        self.products = products_dtype(s)

    def forward(self, x: torch.Tensor, tokens_per_rank: int | None = None) -> torch.Tensor:
        """x (R, T, D) -> (R, T, D).

        tokens_per_rank: tokens of a logical rank in this step; None: all of x is one rank.
        """
        if self.fp8 is not None and self.training:
            return self.fp8(x, self.c_fc, self.c_proj, tokens_per_rank)
        if self.fused:
            return mlp_relu_sq(x, self.c_fc, self.c_proj)
        products = self.products
        if self.gate is None:
            hidden = self.activation(linear(x, self.c_fc, self.c_fc_bias, products))  # (R, T, F)
        else:
            hidden = self.activation(linear(x, self.gate, None, products))
            hidden = hidden * linear(x, self.c_fc, None, products)
        return linear(hidden, self.c_proj, self.c_proj_bias, products)
