"""The number of logical ranks or rows in one forward pass: a choice of speed and memory only.

No torch here, so that a dry run can print it.
"""

from schedule import apart
from settings import Settings
from settings.data import per_stage

TRAINING_TOKENS = 65536  # of a forward pass on CUDA
VALIDATION_TOKENS = {True: 32768, False: 4096}  # of a forward pass on CUDA, and elsewhere


def ranks_per_microbatch(s: Settings, ranks: int, cuda: bool) -> int:
    """Logical ranks in one forward pass, of the `ranks` of a process: a power of two."""
    if s.system.reduction == "ordered" or apart(s):
        return 1
    if s.system.ranks_per_microbatch:
        return min(s.system.ranks_per_microbatch, ranks)
    most = max(1, min(ranks, TRAINING_TOKENS // max(per_stage(s.data.tokens_per_rank)))) if cuda else ranks
    return 1 << (most.bit_length() - 1)  # forwards of equal size, whose losses have equal shares


def validation_rows_at_once(rows: int, seq_len: int, cuda: bool) -> int:
    """Rows in one forward pass in validation, of the `rows` of a logical rank; at least one."""
    return min(rows, max(1, VALIDATION_TOKENS[cuda] // seq_len))
