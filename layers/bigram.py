"""Hashed bigram embedding (record 62): a table with a row per hashed pair of neighbouring tokens."""

import torch
import torch.nn.functional as F
from torch import nn

from layers.primitives import constant, dtype, parameter
from settings import Settings

HASH = 36313, 27191  # factors of a token and of the one before it


def int32(x: torch.Tensor) -> torch.Tensor:
    """The integers x (int64) as 32-bit arithmetic leaves them, wrapped around."""
    return (x + 2 ** 31) % 2 ** 32 - 2 ** 31


def bigram_ids(tokens: torch.Tensor, rows: int, second_token: str = "reserved") -> torch.Tensor:
    """Row of the bigram table for each token (R, T) int64; the first token of a row takes rows - 1.

    second_token: `reserved`: the second token is hashed with rows - 1, which the originals have written over
        the first token by then. `pair`: with the first token.
    """
    reserved = rows - 1
    before = tokens.roll(1, 1)
    if second_token == "reserved" and tokens.size(1) > 1:
        before[:, 1] = reserved
    ids = (int32(HASH[0] * tokens) ^ int32(HASH[1] * before)) % reserved
    ids[:, 0] = reserved
    return ids


def sign_ids(tokens: torch.Tensor, signs: int) -> torch.Tensor:
    """Row of the table of signs for each token (R, T) int64; 0 for the first token of a row."""
    ids = (tokens.roll(1, 1) ^ tokens) % signs
    ids[:, 0] = 0
    return ids


class Bigram(nn.Module):
    """Token ids (R, T) -> rows of the bigram table (R, T, D), zero in the channels that the table lacks."""

    def __init__(self, s: Settings):
        super().__init__()
        b, n = s.model.embed.bigram, s.numerics
        self.second_token, self.dim = b.second_token, s.model.model_dim
        width = b.dim or s.model.model_dim
        self.table = parameter((b.rows, width), n.table, role="embed", label="bigram", init=constant(0.0))
        self.residual_dtype = dtype(n.residual)
        if b.signs is not None:  # drawn by GPT.initialise
            self.register_buffer("signs", torch.empty(b.signs, width, dtype=dtype(n.table)))
        else:
            self.signs = None

    def draw_signs(self, generator: torch.Generator) -> None:
        """Fill the table of signs: +1 or -1 with equal chance."""
        draws = torch.randint(0, 2, self.signs.shape, generator=generator)
        self.signs.copy_(2 * draws - 1)

    def forward(self, tokens: torch.Tensor, past: torch.Tensor | None = None) -> torch.Tensor:
        """The bigram rows of tokens (R, T).

        past: (R, P) the tokens of the row before these, in generation; None: none.
        """
        line = tokens if past is None else torch.cat([past, tokens], 1)
        new = slice(-tokens.size(1), None)
        rows = F.embedding(bigram_ids(line, len(self.table), self.second_token)[:, new], self.table)
        if self.signs is not None:
            rows = rows * F.embedding(sign_ids(line, len(self.signs))[:, new], self.signs)
        return F.pad(rows.to(self.residual_dtype), (0, self.dim - rows.size(-1)))
