"""Hashed bigram embedding (record 62): a table with a row per hashed pair of neighbouring tokens."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from kernels import shared_table
from layers.primitives import constant, dtype, parameter
from settings import Settings, check_processes

HASH = 36313, 27191  # factors of a token and of the one before it
# Record 92: factors of a token and of the two before it, for rows of triples, signs of pairs and signs of
# triples.
TRIPLES, PAIR_SIGNS, TRIPLE_SIGNS = (17351, 60961, 45259), (48271, 30011), (58699, 39779, 26801)


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


def hashed(tokens: torch.Tensor, factors: tuple[int, ...]) -> torch.Tensor:
    """Exclusive or of factor times token, over each token (R, T) and those before it, in 32-bit integers."""
    parts = [int32(factor * tokens.roll(n, 1)) for n, factor in enumerate(factors)]
    found = parts[0]
    for part in parts[1:]:
        found = found ^ part
    return found


def ngram_ids(tokens: torch.Tensor, rows: int) -> torch.Tensor:
    """Rows (2, R, T) of each token's pair, in the first half of the table, and of its triple, in the second.

    Each half keeps its last row for tokens that have no pair or triple yet (record 92).
    """
    half = rows // 2
    triples = half + hashed(tokens, TRIPLES) % (rows - half - 1)
    triples[:, :2] = rows - 1
    return torch.stack([bigram_ids(tokens, half), triples])


def ngram_sign_ids(tokens: torch.Tensor, signs: int) -> torch.Tensor:
    """Rows (2, R, T) of the table of signs for each token's pair and triple; 0 where there is none yet."""
    ids = torch.stack([hashed(tokens, factors) % signs for factors in (PAIR_SIGNS, TRIPLE_SIGNS)])
    ids[0, :, 0] = 0
    ids[1, :, :2] = 0
    return ids


class Bigram(nn.Module):
    """Token ids (R, T) -> rows of the bigram table (R, T, D), zero in the channels that the table lacks.

    With trigrams the sum of two rows, of a pair and of a triple. With system.table_parallel each process
    holds a share of the rows, and look-ups are collective.
    """

    def __init__(self, s: Settings) -> None:
        super().__init__()
        b, n = s.model.embed.bigram, s.numerics
        self.second_token, self.trigrams, self.dim = b.second_token, b.trigrams, s.model.model_dim
        width = b.dim or s.model.model_dim
        parallel = s.system.table_parallel and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if parallel else (0, 1)
        check_processes(s, self.world)
        self.rows = b.rows  # of all processes
        self.table = parameter((b.rows // self.world, width), n.table, role="embed", label="bigram",
                               init=constant(0.0))
        self.table.row_lookups = 2 if b.trigrams else 1
        self.residual_dtype = dtype(n.residual)
        if b.signs is not None:  # drawn by GPT.initialise
            self.register_buffer("signs", torch.empty(b.signs, width, dtype=dtype(n.table)))
        else:
            self.signs = None

    def draw_signs(self, generator: torch.Generator) -> None:
        """Fill the table of signs: +1 or -1 with equal chance."""
        draws = torch.randint(0, 2, self.signs.shape, generator=generator)
        self.signs.copy_(2 * draws - 1)

    def look_up(self, tokens: torch.Tensor, past: torch.Tensor | None = None) -> torch.Tensor:
        """The rows of the table for tokens (R, T), without signs: (1 or 2, R, T, width). May be collective.

        past: as in `forward`.
        """
        line, new = self.line(tokens, past)
        if self.trigrams:
            ids = ngram_ids(line, self.rows)
        else:
            ids = bigram_ids(line, self.rows, self.second_token)[None]
        ids, table = ids[..., new], self.table
        if self.world > 1:
            return shared_table.look_up(table, ids, self.rank, self.world,
                                        lambda *rows: table.arrived.append(rows))
        return F.embedding(ids, table, sparse=table.takes_rows and self.training)

    def line(self, tokens: torch.Tensor, past: torch.Tensor | None) -> tuple[torch.Tensor, slice]:
        """(tokens with those before them, slice of the tokens in it)."""
        return tokens if past is None else torch.cat([past, tokens], 1), slice(-tokens.size(1), None)

    def forward(self, tokens: torch.Tensor, past: torch.Tensor | None = None,
                rows: torch.Tensor | None = None) -> torch.Tensor:
        """The bigram rows of tokens (R, T).

        past: (R, P) the tokens of the row before these, in generation; None: none.
        rows: what look_up returns; None: they are looked up here.
        """
        rows = self.look_up(tokens, past) if rows is None else rows
        if self.signs is not None:
            line, new = self.line(tokens, past)
            if self.trigrams:
                ids = ngram_sign_ids(line, len(self.signs))
            else:
                ids = sign_ids(line, len(self.signs))[None]
            rows = rows * F.embedding(ids[..., new], self.signs)
        rows = rows.sum(0) if self.trigrams else rows[0]
        return F.pad(rows.to(self.residual_dtype), (0, self.dim - rows.size(-1)))
