"""The stream of training tokens and the measurement of the loss: `data.*`, `validation.*`, and the numbers
that follow from them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from settings.declare import REFUSE, opt
from settings.model import padded_vocab

LOGICAL_RANKS = 8  # the token buffers of a step, whatever the number of processes


@dataclass(frozen=True)
class Data:
    """The stream of training tokens (axis ml)."""
    loader: Literal["shuffled", "per_rank", "synced", "bos_aligned", "packed"] = opt(
        "shuffled", "order of the tokens. shuffled: llm.c's shuffled slots. per_rank: in order, a position "
                    "per logical rank (the positions drift apart at shard ends). synced: in order, one "
                    "position for all ranks. bos_aligned: each rank starts at a document start. packed: "
                    "whole documents, truncated to max_doc_len")
    switch_at_equal: bool = opt(False, "earlier shard switch: a shard ends one token earlier (records "
                                       "15-17)", off=False, needs="data.loader=per_rank")
    max_doc_len: int | tuple[int, ...] | None = opt(
        None,
        "maximum document length: longer documents are truncated; one number, or one per stage (record 72)",
        unit="token", shrink="length", needs="data.loader=packed", least=1
    )
    tokens_per_rank: int | tuple[int, ...] = opt(
        65536, "tokens of one logical rank per step, or one number per stage; a step has eight logical ranks",
        unit="token", off=REFUSE, shrink="batch", least=1, most=2 ** 24)
    seq_len: int = opt(1024, "context length in training: the tokens of a rank are cut into rows of this "
                             "length", unit="token", off=REFUSE, shrink="length", least=1)
    first_batch_twice: bool = opt(False, "repeated first batch: steps 0 and 1 use the same batch (the "
                                         "original reset its loader)", off=False,
                                  needs="data.loader=per_rank")
    wrap: bool = opt(True, "restart at the first shard after the last one (off: running out of shards is an "
                           "error)", off=False, shrink="reread")

    def check(self, s: Any) -> Iterator[str]:
        sizes, stages, documents = per_stage(self.tokens_per_rank), s.schedule.stages, by_document(s)
        if isinstance(self.tokens_per_rank, tuple) and not fits_stages(len(sizes), s):
            yield (f"data.tokens_per_rank has {len(sizes)} values and schedule.stages has {len(stages)}: "
                   "give one value per stage (and one for the extension), or one number for all")
        if isinstance(self.max_doc_len, tuple) and not fits_stages(len(self.max_doc_len), s):
            yield (
                f"data.max_doc_len has {len(self.max_doc_len)} values and schedule.stages has {len(stages)}: "
                "give one value per stage, or one number for all"
            )
        if len(set(sizes)) > 1 and self.loader == "shuffled":
            yield ("data.loader=shuffled needs steps of one size: choose another loader, or one "
                   "data.tokens_per_rank for all stages")
        for size in sizes if not (documents and stages) else ():
            if size % self.seq_len:
                yield (f"data.tokens_per_rank = {size} is not a multiple of data.seq_len = {self.seq_len}: "
                       "change one of them")
        if documents and self.seq_len != max(sizes):
            yield (f"data.loader={self.loader} needs one row per logical rank: set data.seq_len = "
                   f"data.tokens_per_rank = {max(sizes)}")
        if self.loader == "packed" and self.max_doc_len is None:
            yield ("data.loader=packed needs data.max_doc_len: set it to the longest piece of a document, "
                   "like 2048")


@dataclass(frozen=True)
class LateValidations:
    """More frequent validations towards the end of a run (optimizer track), which show where it crosses."""
    frac: float = opt(0.1, "last fraction of the steps", off=REFUSE, above=0, most=1)
    every: int = opt(25, "steps between validations there; the number of a step is a multiple of it",
                     unit="step", off=REFUSE, shrink="late", least=1)


@dataclass(frozen=True)
class Validation:
    """The measurement of the validation loss (axis ml)."""
    tokens: int = opt(10_485_760, "validation targets: the first ones of the validation shard", unit="token",
                      off=REFUSE, shrink="validation", least=1, most=10 ** 9)
    seq_len: int = opt(1024, "context length in validation", unit="token", off=REFUSE, shrink="length",
                       least=1)
    every: int = opt(250, "steps between validations; there is always one after the last step", unit="step",
                     off=REFUSE, shrink="eighth", least=1)
    late: LateValidations | None = opt(None, "more frequent validations towards the end")
    canonical_mask: bool = opt(
        False, "canonical masking (record 91): in the final validation, tokens that the "
        "tokenizer never writes after the previous one get the logit -60", off=False
    )
    target: float | None = opt(3.28, "validation loss to reach, in nats per token", off=None, shrink="target")

    def check(self, s: Any) -> Iterator[str]:
        if self.tokens % (LOGICAL_RANKS * self.seq_len):
            yield (f"validation.tokens = {self.tokens} is not a multiple of 8 x validation.seq_len = "
                   f"{LOGICAL_RANKS * self.seq_len}: change one of them")
        if self.canonical_mask and padded_vocab(s) % 8:
            yield ("validation.canonical_mask keeps a bit for each class, eight in a byte, and there are "
                   f"{padded_vocab(s)}: set model.pad_vocab_to to a multiple of 8")


# ----- what follows from them (s: settings.Settings) --------------------------------------------------------

def per_stage(value: object) -> tuple:
    """The values of a setting that may have one per stage; length 1 if one value holds for all stages."""
    return value if isinstance(value, tuple) else (value,)


def fits_stages(count: int, s: Any) -> bool:
    """Whether a list has a value per stage, and perhaps one more for the extension."""
    return count == len(s.schedule.stages) or (
        s.schedule.extension_steps > 0 and count == len(s.schedule.stages) + 1
    )


def longest_document(s: Any) -> int | None:
    """The longest document of any stage, None without a limit."""
    return None if s.data.max_doc_len is None else max(per_stage(s.data.max_doc_len))


def by_document(s: Any) -> bool:
    """Whether the loader goes by documents. A logical rank then has one row, whatever its tokens."""
    return s.data.loader in ("bos_aligned", "packed")


def row_limit(s: Any) -> int:
    """The longest row that the tokens of a logical rank allow in every stage."""
    sizes = per_stage(s.data.tokens_per_rank)
    return max(sizes) if by_document(s) else min(sizes)


def tokens_per_step(s: Any) -> int | float:
    """Tokens of one step over all logical ranks, the mean over the steps. Single steps: schedule.plan."""
    sizes = per_stage(s.data.tokens_per_rank)
    if len(sizes) == 1:
        return LOGICAL_RANKS * sizes[0]
    scheduled = sum(size * share for size, share in zip(sizes, s.schedule.stages))
    extension = s.schedule.extension / s.schedule.steps
    return LOGICAL_RANKS * ((1 - extension) * scheduled + extension * sizes[-1])
