"""Multi-token prediction by a module of its own."""

import torch
from torch import nn

from layers.attention import AttnMeta
from layers.primitives import Norm, linear, linear_init, parameter, products_dtype
from settings import Settings


class MTPModule(nn.Module):
    """Depth 1 of DeepSeek-V3's multi-token prediction (arXiv 2412.19437, section 2.2).

    The stream h_t after the last block and the embedding of token t + 1 give a stream that predicts token
    t + 2: x_t = Block(M [norm(h_t); norm(e_(t+1))]).

    Embedding and head are shared with the model. Generation does not use the module.
    """

    def __init__(self, s: Settings, block: nn.Module) -> None:
        """block: a dense block with attention, used by this module only."""
        super().__init__()
        d, n = s.model.model_dim, s.numerics
        self.h_norm, self.e_norm, self.norm = Norm(s), Norm(s), Norm(s)
        self.merge = parameter((d, 2 * d), n.matrix, role="matrix", label="mtp_merge",
                               init=linear_init(s, 2 * d, projection=False))
        self.block = block
        self.products = products_dtype(s)

    def forward(self, h: torch.Tensor, e: torch.Tensor, meta: AttnMeta, dtype: torch.dtype) -> torch.Tensor:
        """h, e (R, T, D) -> (R, T, D), normed, in the matmul dtype."""
        block = self.block
        x = torch.cat([self.h_norm(h), self.e_norm(e)], dim=-1).to(dtype)
        x = linear(x, self.merge, None, self.products).to(h.dtype)
        x = x + block.attn(block.attn_norm(x).to(dtype), block.rotary, None, meta)
        x = x + block.mlp(block.mlp_norm(x).to(dtype))
        return self.norm(x).to(dtype)


def within_documents(documents: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
    """(R, T) bool: whether the next two tokens of each token exist and belong to its document.

    documents: (R, T) document number of each token; None: a row is one document. The document of the token
    after the row is unknown and counts as that of the last token.
    """
    keep = torch.ones_like(targets, dtype=torch.bool)
    if documents is not None:
        same = documents[:, 1:] == documents[:, :-1]  # (R, T - 1): token t + 1 in the document of token t
        keep[:, :-1] = same
        keep[:, :-2] &= same[:, 1:]
    keep[:, -1] = False  # the second next token of the last token lies beyond the row
    return keep
