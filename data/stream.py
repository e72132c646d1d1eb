"""The fixed order of training tokens: eight logical ranks, whatever the number of processes.

Positions are planned apart from reading. `positions` says where logical rank r reads at each step, from shard
lengths alone: loaders `shuffled` (record 1, llm.c), `per_rank` (records 2-17), `synced` (records 18-25).
`document_steps` says it for loaders that go by documents: `bos_aligned` (records 26-28, @classiclarryd) and
`packed` (record 29 on, @varunneal).
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np

import schedule
from common.errors import UserError
from data.shards import Corpus, Shard, check_vocabulary, open_shard
from settings import Settings
from settings.data import LOGICAL_RANKS

FINEWEB_SHARD = 100_000_000  # tokens of every train shard but the last
BY_POSITION, BY_DOCUMENT = ("shuffled", "per_rank", "synced"), ("bos_aligned", "packed")


class OutOfShards(Exception):
    """The plan passed the last shard and may not begin again."""


def step_sizes(tokens_per_rank: int | list[int]) -> Iterator[int]:
    """Tokens per rank of each step, without end: one number for all steps, or a list with one for each."""
    if isinstance(tokens_per_rank, int):
        return itertools.repeat(tokens_per_rank)
    return itertools.chain(tokens_per_rank, itertools.repeat(tokens_per_rank[-1]))


# ----- where each rank reads: by position -------------------------------------------------------------------

def positions(
    lengths: Sequence[int], rank: int, *, loader: str, tokens_per_rank: int | list[int], wrap: bool,
    first_batch_twice: bool = False, switch_at_equal: bool = False
) -> Iterator[tuple[int, int, int]]:
    """Yield (epoch, shard, start) of each step for one logical rank; the rank reads its tokens_per_rank + 1
    ids there.

    lengths: tokens per shard. tokens_per_rank: as in step_sizes. switch_at_equal: the shard ends one token
    earlier (records 15-17). Raises OutOfShards after the last shard unless wrap. All loaders keep the
    remainder of a shard that no whole step fits into unread.
    """
    sizes = step_sizes(tokens_per_rank)
    if loader == "shuffled":
        if not isinstance(tokens_per_rank, int):
            raise UserError("data.loader=shuffled needs steps of one size: choose another loader")
        walk = shuffled_positions(lengths, rank, tokens_per_rank, wrap)
    elif loader == "per_rank":
        walk = per_rank_positions(lengths, rank, sizes, wrap, switch_at_equal)
    elif loader == "synced":
        walk = synced_positions(lengths, rank, sizes, wrap)
    else:
        raise UserError(f"data.loader = {loader!r}: choose {', '.join(BY_POSITION + BY_DOCUMENT)}")
    if first_batch_twice:  # the original read one batch, trained on it, and reset its loader
        first = next(walk)
        walk = itertools.chain([first, first], walk)
    return walk


def per_rank_positions(
    lengths: Sequence[int], rank: int, sizes: Iterator[int], wrap: bool, switch_at_equal: bool
) -> Iterator[tuple[int, int, int]]:
    """Records 2-17: each rank has its own position, all move by one step of all ranks."""
    shard, epoch, base, size = 0, 0, 0, next(sizes)
    while True:
        yield epoch, shard, base + rank * size
        base, size = base + LOGICAL_RANKS * size, next(sizes)
        end = base + (rank + LOGICAL_RANKS) * size + 1
        if end > lengths[shard] or (switch_at_equal and end == lengths[shard]):
            shard, base = shard + 1, 0
            if shard == len(lengths):
                if not wrap:
                    raise OutOfShards
                shard, epoch = 0, epoch + 1


def synced_positions(
    lengths: Sequence[int], rank: int, sizes: Iterator[int], wrap: bool
) -> Iterator[tuple[int, int, int]]:
    """Records 18-25: all ranks change shards together."""
    shard, epoch, base = 0, 0, 0
    for size in sizes:
        if base + LOGICAL_RANKS * size + 1 >= lengths[shard]:
            shard, base = shard + 1, 0
            if shard == len(lengths):
                if not wrap:
                    raise OutOfShards
                shard, epoch = 0, epoch + 1
        yield epoch, shard, base + rank * size
        base += LOGICAL_RANKS * size


def shuffled_positions(
    lengths: Sequence[int], rank: int, tokens_per_rank: int, wrap: bool
) -> Iterator[tuple[int, int, int]]:
    """llm.c: shard order and the order of step-sized slots inside a shard, drawn per rank from mt19937(42 +
    rank)."""
    step_tokens = LOGICAL_RANKS * tokens_per_rank
    generator = np.random.MT19937()
    generator._legacy_seeding(42 + rank)  # the reference initialisation of mt19937, which llm.c uses
    order = list(range(len(lengths)))
    for epoch in itertools.count():
        permute(order, generator)
        for shard in order:
            slots = list(range((lengths[shard] - 1) // step_tokens))
            permute(slots, generator)
            for slot in slots:
                yield epoch, shard, slot * step_tokens + rank * tokens_per_rank
        if not wrap:
            raise OutOfShards


def permute(items: list[int], generator: np.random.MT19937) -> None:
    """Fisher-Yates from the end with 32-bit draws modulo the remaining count, in place."""
    for i in range(len(items) - 1, 0, -1):
        j = int(generator.random_raw()) % (i + 1)
        items[i], items[j] = items[j], items[i]


# ----- where each rank reads: by document -------------------------------------------------------------------

class Shards:
    """The train shards of a corpus, each opened when it is first needed."""

    def __init__(self, corpus: Corpus, max_doc_len: int | list[int] | None = None) -> None:
        """max_doc_len: longest document, as in step_sizes; None: no limit."""
        self.corpus, self.opened = corpus, {}
        self.limits = max_doc_len or max(corpus.train_tokens)
        self.longest = next(step_sizes(self.limits))

    def __getitem__(self, index: int) -> Shard:
        if index not in self.opened:
            self.opened[index] = Shard(self.corpus.train[index], self.corpus.bos, self.longest)
        self.opened[index].cut(self.longest)
        return self.opened[index]

    def look_ahead(self, index: int) -> None:
        """One scan of what is not yet known of this shard, or of the next one if all of this one is known.

        Done with every batch, so that the next shard is known long before it is needed (record 33), without a
        thread that would go on while the clock stands still.
        """
        for shard in (self[index], self[(index + 1) % len(self.corpus.train)]):
            if not shard.complete:
                return shard.scan()


def document_steps(
    shards: Shards, *, loader: str, tokens_per_rank: int | list[int], wrap: bool
) -> Iterator[tuple[int, int, list[tuple]]]:
    """Yield (epoch, shard, pieces) of each step; pieces[r] = (starts, ends) of what logical rank r reads one
    after the other, tokens_per_rank + 1 ids together. All ranks move together.

    A shard that holds no further whole step is left. Raises OutOfShards after the last one unless wrap, and
    UserError when no shard holds a step even from its beginning.
    """
    follow = aligned_step if loader == "bos_aligned" else packed_step
    count, shard, epoch, at, barren = len(shards.corpus.train), 0, 0, 0, 0
    for size, shards.longest in zip(step_sizes(tokens_per_rank), step_sizes(shards.limits)):
        while (step := follow(shards[shard], at, size)) is None:
            barren += at == 0
            if barren == count:
                raise UserError(barren_reason(shards, loader, size))
            shard, at = shard + 1, 0
            if shard == count:
                if not wrap:
                    raise OutOfShards
                shard, epoch = 0, epoch + 1
        (pieces, at), barren = step, 0
        yield epoch, shard, pieces


def barren_reason(shards: Shards, loader: str, size: int) -> str:
    """Why no train shard holds one step, told of the largest one."""
    shard = max((shards[i] for i in range(len(shards.corpus.train))), key=lambda shard: len(shard.tokens))
    while not shard.complete:
        shard.scan()
    tokens, documents = len(shard.tokens), len(shard.starts)
    text = (f"{shards.corpus.folder}: no train shard holds one step of {loader} data, {LOGICAL_RANKS} x "
            f"{size} tokens: {shard.path.name} has {tokens} tokens in {documents} "
            f"document{'s' if documents > 1 else ''}")
    aligned = loader == "bos_aligned"
    if tokens < LOGICAL_RANKS * (2 * size if aligned else size + 1) + 2 * aligned:
        return f"{text}: lower data.tokens_per_rank or use larger shards"
    if aligned or documents < LOGICAL_RANKS:
        return (
            f"{text}, and each of {LOGICAL_RANKS} ranks begins with a document of its own: tokenise the text "
            "as shorter documents (--separator), or choose a loader that reads across them (--set "
            "data.loader=synced)"
        )
    return (f"{text}, of which {shard.kept[-1]} are left when each is cut at {shard.longest} "
            "(data.max_doc_len): tokenise the text as shorter documents (--separator), or raise "
            "data.max_doc_len")


def aligned_step(shard: Shard, position: int, size: int) -> tuple[list[tuple], int] | None:
    """(pieces, position after the step), or None: every rank's tokens begin with a document.

    A rank begins at the first document start that lies at least `size` tokens after the beginning of the rank
    before; the tokens between are skipped. The step ends at the ninth such start. A shard is left when fewer
    than two steps' tokens remain. The original stops with an assertion when these do not hold nine starts;
    here they may come later in the shard, so that small steps with long documents run too.
    """
    if position + 2 * LOGICAL_RANKS * size + 1 >= len(shard.tokens):
        return None
    pieces, start = [], shard.first(position)
    for _ in range(LOGICAL_RANKS):
        following = None if start is None else shard.first(start + size)
        if following is None:
            return None
        pieces.append(([start], [start + size + 1]))
        start = following
    return pieces, start


def packed_step(shard: Shard, first: int, size: int) -> tuple[list[tuple], int] | None:
    """(pieces, number of the next document), or None: whole documents one after the other, cut at the maximum
    length.

    Rank 0 takes documents until it has size + 1 tokens, then rank 1 goes on with the next document. What is
    cut off, at the maximum length or at the end of a rank's tokens, is skipped.
    """
    pieces = []
    for _ in range(LOGICAL_RANKS):
        filled = shard.fill(first, size + 1)
        if filled is None:
            return None
        starts, ends, first = filled
        pieces.append((starts, ends))
    return pieces, first


# ----- how many shards --------------------------------------------------------------------------------------

def shards_needed(
    lengths: Sequence[int], *, steps: int, shards: Shards | None = None, **stream: Any
) -> int:
    """Number of leading shards that `steps` steps read, planned exactly.

    Where the known shards run out and the stream may not wrap, further shards of FineWeb's size are assumed,
    or for loaders that go by documents (they need `shards`) further ones that give as many steps as the known
    ones.
    """
    if stream["loader"] in BY_DOCUMENT:
        return document_shards_needed(shards, steps, stream)
    step_tokens = LOGICAL_RANKS * max(itertools.islice(step_sizes(stream["tokens_per_rank"]), steps))
    per_shard = (FINEWEB_SHARD - 1) // step_tokens
    if stream["loader"] == "shuffled":  # the shuffle runs over all shards there are, so all of them are used
        slots = sum((n - 1) // step_tokens for n in lengths)
        lacking = 0 if stream["wrap"] else steps - bool(stream.get("first_batch_twice")) - slots
        return len(lengths) + max(0, -(-lacking // max(1, per_shard)))
    if not stream["wrap"]:
        lengths = [*lengths, *[FINEWEB_SHARD] * (steps // max(1, per_shard) + 2)]
    return 1 + max(shard for rank in (0, LOGICAL_RANKS - 1)
                   for _, shard, _ in itertools.islice(positions(lengths, rank, **stream), steps))


def document_shards_needed(shards: Shards, steps: int, stream: dict[str, Any]) -> int:
    """Shards that loaders by documents read in `steps` steps."""
    walk = document_steps(shards, **{k: stream[k] for k in ("loader", "tokens_per_rank", "wrap")})
    have, planned, highest = len(shards.corpus.train), 0, 0
    try:
        for _, shard, _ in itertools.islice(walk, steps):
            planned, highest = planned + 1, max(highest, shard)
    except OutOfShards:
        return max(have + 1, -(-have * steps // planned))
    return 1 + highest


def require_shards(
    corpus: Corpus, *, steps: int, max_doc_len: int | list[int] | None = None, **stream: Any
) -> int:
    """Number of shards a run reads; UserError before training if there are too few or they are too small."""
    step_tokens = LOGICAL_RANKS * max(itertools.islice(step_sizes(stream["tokens_per_rank"]), steps))
    have = len(corpus.train)
    need = shards_needed(corpus.train_tokens, steps=steps, shards=Shards(corpus, max_doc_len), **stream)
    # a short rest that is not read is no harm
    for path, length in list(zip(corpus.train, corpus.train_tokens))[:need]:
        if length < step_tokens + 2 and stream["loader"] in BY_POSITION:
            raise UserError(
                f"{path}: {length} tokens are too few for one step of {step_tokens}: remove it, use larger "
                "shards or lower data.tokens_per_rank"
            )
    if need > have:
        remedy = (f"run `python -m data.fineweb {need}`" if corpus.name == "fineweb"
                  else "add shards, lower schedule.steps, or set data.wrap=true")
        raise UserError(f"{steps} steps of {step_tokens} tokens need {need} train shards, found {have} in "
                        f"{corpus.folder}: {remedy}")
    return need


def stream_arguments(s: Settings) -> dict[str, Any]:
    """The settings of a run that fix its stream, as keyword arguments of Stream, require_shards and
    shards_needed."""
    d = s.data
    return dict(
        loader=d.loader, tokens_per_rank=schedule.by_step(s, d.tokens_per_rank), wrap=d.wrap,
        first_batch_twice=d.first_batch_twice, switch_at_equal=d.switch_at_equal,
        max_doc_len=schedule.by_step(s, d.max_doc_len)
    )


def after_rewinds(arguments: dict[str, Any], rewinds: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Arguments of Stream for a run that went back to earlier steps and on with the next batches.

    arguments: as from stream_arguments. rewinds: [(batches read until then, step to which the run went
    back)], oldest first. A batch has the size of the step that trains on it.
    """
    def in_order(values):
        if not isinstance(values, list):
            return values
        found = values
        for read, step in rewinds:
            found = found[:read] + values[step:]
        return found

    changed = {name: in_order(arguments[name]) for name in ("tokens_per_rank", "max_doc_len")}
    return {**arguments, **changed}


# ----- reading ----------------------------------------------------------------------------------------------

class Stream:
    """The batches of this process's logical ranks, in order, with one running digest per rank.

    ranks: range of logical ranks. tokens_per_rank: a number, or a list with one for each step. The row of a
    logical rank is the same whichever process serves it. `epoch` counts the passes over the corpus (0 during
    the first).
    """

    def __init__(
        self, corpus: Corpus, *, ranks: Sequence[int], tokens_per_rank: int | list[int], loader: str,
        wrap: bool, max_doc_len: int | list[int] | None = None, **stream: Any
    ) -> None:
        self.corpus, self.ranks, self.sizes = corpus, ranks, step_sizes(tokens_per_rank)
        self.shards = Shards(corpus, max_doc_len)
        about = dict(loader=loader, tokens_per_rank=tokens_per_rank, wrap=wrap)
        if loader in BY_DOCUMENT:
            self.steps = document_steps(self.shards, **about)
        else:
            self.walks = [positions(corpus.train_tokens, r, **about, **stream) for r in ranks]
            self.steps = None
        self.digests = [hashlib.sha256() for _ in ranks]
        self.before = self.digests  # the digests one batch ago
        self.epoch, self.step = 0, 0

    def next(self) -> np.ndarray:
        """int32 (len(ranks), tokens_per_rank + 1): inputs are [:, :-1], targets [:, 1:].

        Of the loaders that go by documents: each document begins with `bos` and there is no other `bos`, so
        the tokens alone say where attention must stop.
        """
        size = next(self.sizes)
        try:
            rows = self.pieces() if self.steps else [self.span(walk, size) for walk in self.walks]
        except OutOfShards:
            raise UserError(f"the stream ran out of shards at step {self.step}: add shards or set "
                            "data.wrap=true") from None
        self.before, self.digests = self.digests, [digest.copy() for digest in self.digests]
        for row, digest in zip(rows, self.digests):
            digest.update(row.tobytes())
        rows = np.stack(rows).astype(np.int32)
        check_vocabulary(rows, self.corpus.vocab_size, f"{self.corpus.folder} (step {self.step})")
        self.step += 1
        return rows

    def span(self, walk: Iterator[tuple[int, int, int]], size: int) -> np.ndarray:
        epoch, shard, start = next(walk)
        self.epoch = max(self.epoch, epoch)
        self.shards[shard].check_length()
        return self.shards[shard].tokens[start:start + size + 1]

    def pieces(self) -> list[np.ndarray]:
        self.epoch, shard, pieces = next(self.steps)
        self.shards[shard].check_length()
        tokens = self.shards[shard].tokens
        rows = [np.concatenate([tokens[a:b] for a, b in zip(*pieces[r])]) for r in self.ranks]
        self.shards.look_ahead(shard)
        return rows

    def rank_digests(self, steps: int | None = None) -> dict[int, str]:
        """{logical rank: digest} after so many batches: all that were read, or all but the last of them."""
        at = {None: self.digests, self.step: self.digests, self.step - 1: self.before}[steps]
        return {rank: digest.hexdigest() for rank, digest in zip(self.ranks, at)}

    def skip(self, steps: int, digests: dict[str, str]) -> None:
        """Read the first `steps` batches again, as a run that continues needs it.

        A position alone would be quicker to reach, but the digests run over all tokens, and so the shards are
        held to what the run has read. digests: {logical rank as text: digest} of these batches. UserError if
        the shards hold other tokens now.
        """
        for _ in range(steps):
            self.next()
        here = self.rank_digests() if steps else {}
        if wrong := [rank for rank, digest in here.items() if digests[str(rank)] != digest]:
            raise UserError(
                f"{self.corpus.folder}: the first {steps} steps read other tokens than before (logical rank "
                f"{wrong[0]}): bring the shards back with which the run began, or start a new one"
            )


def stream_digest(rank_digests: dict[int, str]) -> str:
    """sha256 over the digests of all eight logical ranks in order: equal at any number of processes."""
    return hashlib.sha256("".join(rank_digests[r] for r in range(LOGICAL_RANKS)).encode()).hexdigest()


class Prefetch:
    """One batch ahead in a background thread. Nothing is read before the first next() and nothing after
    drain()."""

    def __init__(self, stream: Stream, steps: int) -> None:
        self.stream, self.left, self.steps = stream, steps, steps
        self.thread, self.ahead = ThreadPoolExecutor(1, "batches"), None

    def fetch(self) -> Future | None:
        """A future of the batch after those that were asked for, or None after the last."""
        self.left -= 1
        return self.thread.submit(self.stream.next) if self.left >= 0 else None

    def next(self) -> np.ndarray:
        """The next batch; begins to fetch the one after it. Raises what the stream raised."""
        ahead = self.ahead or self.fetch()
        if ahead is None:
            raise IndexError(f"all {self.steps} batches have been taken")
        batch = ahead.result()
        self.ahead = self.fetch()
        return batch

    def drain(self) -> None:
        """Wait for the fetch under way; afterwards nothing runs until next()."""
        if self.ahead is not None:
            wait([self.ahead])

    def close(self) -> None:
        self.thread.shutdown()


# ----- validation -------------------------------------------------------------------------------------------

def validation_rows(corpus: Corpus, tokens: int, seq_len: int, ranks: Sequence[int]) -> np.ndarray:
    """int32 (len(ranks), rows, seq_len + 1): the first `tokens` targets, an eighth for each logical rank.

    Rows overlap by one id, so that every target is predicted once, from at most seq_len - 1 earlier tokens.
    """
    if tokens % (LOGICAL_RANKS * seq_len):
        raise UserError(f"validation.tokens = {tokens} is not a multiple of 8 x {seq_len}")
    if corpus.val_tokens < tokens + 1:
        row = LOGICAL_RANKS * seq_len
        fits = (corpus.val_tokens - 1) // row * row
        remedy = (f"--set validation.tokens={fits}" if fits
                  else "--set a shorter validation.seq_len, and validation.tokens")
        raise UserError(
            f"{corpus.val}: {corpus.val_tokens} tokens, validation needs {tokens + 1}: {remedy}, or use "
            "a larger validation shard"
        )
    ids = open_shard(corpus.val)[:tokens + 1].astype(np.int32)
    check_vocabulary(ids, corpus.vocab_size, str(corpus.val))
    share = tokens // LOGICAL_RANKS
    starts = np.arange(0, share, seq_len)[:, None] + np.arange(seq_len + 1)[None, :]
    return np.stack([ids[rank * share + starts] for rank in ranks])
