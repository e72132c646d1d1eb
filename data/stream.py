"""The fixed order of training tokens: eight logical ranks, whatever the number of processes.

Positions are planned apart from reading: `positions` says where logical rank r reads at each step, from shard lengths
alone. Loaders: `shuffled` (record 1, llm.c), `per_rank` (records 2-17), `synced` (record 18 on).
"""

import hashlib
import itertools
import threading

import numpy as np

from data.shards import check_vocabulary, open_shard
from settings import LOGICAL_RANKS, UserError

FINEWEB_SHARD = 100_000_000  # tokens of every train shard but the last


class OutOfShards(Exception):
    """The plan passed the last shard and may not begin again."""


# ----- where each rank reads ----------------------------------------------------------------------------------------

def positions(lengths, rank, *, loader, tokens_per_rank, wrap, first_batch_twice=False, switch_at_equal=False):
    """Yield (epoch, shard, start) of each step for one logical rank; the rank reads tokens_per_rank + 1 ids there.

    lengths: tokens per shard. switch_at_equal: the shard ends one token earlier (records 15-17). Raises OutOfShards
    after the last shard unless wrap. All loaders keep the remainder of a shard that no whole step fits into unread.
    """
    step_tokens = LOGICAL_RANKS * tokens_per_rank
    if loader == "shuffled":
        walk = shuffled_positions(lengths, rank, tokens_per_rank, wrap)
    elif loader == "per_rank":
        walk = per_rank_positions(lengths, rank, tokens_per_rank, step_tokens, wrap, switch_at_equal)
    elif loader == "synced":
        walk = synced_positions(lengths, rank, tokens_per_rank, step_tokens, wrap)
    else:
        raise UserError(f"data.loader = {loader!r}: choose shuffled, per_rank or synced")
    if first_batch_twice:  # the original read one batch, trained on it, and reset its loader
        first = next(walk)
        walk = itertools.chain([first, first], walk)
    return walk


def per_rank_positions(lengths, rank, tokens_per_rank, step_tokens, wrap, switch_at_equal):
    shard, epoch, start = 0, 0, rank * tokens_per_rank
    while True:
        yield epoch, shard, start
        start += step_tokens
        end = start + step_tokens + 1
        if end > lengths[shard] or (switch_at_equal and end == lengths[shard]):
            shard, start = shard + 1, rank * tokens_per_rank
            if shard == len(lengths):
                if not wrap:
                    raise OutOfShards
                shard, epoch = 0, epoch + 1


def synced_positions(lengths, rank, tokens_per_rank, step_tokens, wrap):
    shard, epoch, start = 0, 0, 0
    while True:
        if start + step_tokens + 1 >= lengths[shard]:
            shard, start = shard + 1, 0
            if shard == len(lengths):
                if not wrap:
                    raise OutOfShards
                shard, epoch = 0, epoch + 1
        yield epoch, shard, start + rank * tokens_per_rank
        start += step_tokens


def shuffled_positions(lengths, rank, tokens_per_rank, wrap):
    """llm.c: shard order and the order of step-sized slots inside a shard, drawn per rank from mt19937(42 + rank)."""
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


def permute(items, generator):
    """Fisher-Yates from the end with 32-bit draws modulo the remaining count, in place."""
    for i in range(len(items) - 1, 0, -1):
        j = int(generator.random_raw()) % (i + 1)
        items[i], items[j] = items[j], items[i]


def shards_needed(lengths, *, steps, **stream):
    """Number of leading shards that `steps` steps read, planned exactly.

    Where the known shards run out and the stream may not wrap, further shards of FineWeb's size are assumed.
    """
    step_tokens = LOGICAL_RANKS * stream["tokens_per_rank"]
    per_shard = (FINEWEB_SHARD - 1) // step_tokens
    if stream["loader"] == "shuffled":  # the shuffle runs over all shards there are, so all of them are used
        slots = sum((n - 1) // step_tokens for n in lengths)
        lacking = 0 if stream["wrap"] else steps - bool(stream.get("first_batch_twice")) - slots
        return len(lengths) + max(0, -(-lacking // max(1, per_shard)))
    if not stream["wrap"]:
        lengths = [*lengths, *[FINEWEB_SHARD] * (steps // max(1, per_shard) + 2)]
    return 1 + max(shard for rank in (0, LOGICAL_RANKS - 1)
                   for _, shard, _ in itertools.islice(positions(lengths, rank, **stream), steps))


def require_shards(corpus, *, steps, **stream):
    """Number of shards a run reads; UserError before training if there are too few or they are too small."""
    step_tokens = LOGICAL_RANKS * stream["tokens_per_rank"]
    have, need = len(corpus.train), shards_needed(corpus.train_tokens, steps=steps, **stream)
    for path, length in list(zip(corpus.train, corpus.train_tokens))[:need]:  # a short rest that is not read is no harm
        if length < step_tokens + 2:
            raise UserError(f"{path}: {length} tokens are too few for one step of {step_tokens}: remove it, use larger "
                            "shards or lower data.tokens_per_rank")
    if need > have:
        remedy = (f"run `python -m data.fineweb {need}`" if corpus.name == "fineweb"
                  else "add shards, lower schedule.steps, or set data.wrap=true")
        raise UserError(f"{steps} steps of {step_tokens} tokens need {need} train shards, found {have} in "
                        f"{corpus.folder}: {remedy}")
    return need


# ----- reading ------------------------------------------------------------------------------------------------------

class Stream:
    """The batches of this process's logical ranks, in order, with one running digest per rank.

    ranks: range of logical ranks. The row of a logical rank is the same whichever process serves it. `epoch` counts
    the passes over the corpus (0 during the first).
    """

    def __init__(self, corpus, *, ranks, tokens_per_rank, **stream):
        self.corpus, self.ranks, self.tokens_per_rank = corpus, ranks, tokens_per_rank
        self.walks = [positions(corpus.train_tokens, r, tokens_per_rank=tokens_per_rank, **stream) for r in ranks]
        self.digests = [hashlib.sha256() for _ in ranks]
        self.shards, self.epoch, self.step = {}, 0, 0

    def next(self):
        """int32 (len(ranks), tokens_per_rank + 1): inputs are [:, :-1], targets [:, 1:]."""
        rows = []
        for walk, digest in zip(self.walks, self.digests):
            try:
                epoch, shard, start = next(walk)
            except OutOfShards:
                raise UserError(f"the stream ran out of shards at step {self.step}: add shards or set "
                                "data.wrap=true") from None
            row = self.shard(shard)[start:start + self.tokens_per_rank + 1]
            digest.update(row.tobytes())
            rows.append(row)
            self.epoch = max(self.epoch, epoch)
        rows = np.stack(rows).astype(np.int32)
        check_vocabulary(rows, self.corpus.vocab_size, f"{self.corpus.folder} (step {self.step})")
        self.step += 1
        return rows

    def shard(self, index):
        if index not in self.shards:
            self.shards[index] = open_shard(self.corpus.train[index])
        return self.shards[index]

    def rank_digests(self):
        return {rank: digest.hexdigest() for rank, digest in zip(self.ranks, self.digests)}


def stream_digest(rank_digests):
    """sha256 over the digests of all eight logical ranks in order: equal at any number of processes."""
    return hashlib.sha256("".join(rank_digests[r] for r in range(LOGICAL_RANKS)).encode()).hexdigest()


class Prefetch:
    """One batch ahead in a background thread. Nothing is read before the first next() and nothing after settle()."""

    def __init__(self, stream, steps):
        self.stream, self.steps, self.fetched = stream, steps, 0
        self.thread = self.batch = self.error = None

    def fetch(self):
        try:
            self.batch = self.stream.next()
        except BaseException as error:  # handed to the caller of next()
            self.error = error

    def start(self):
        self.fetched += 1
        self.thread = threading.Thread(target=self.fetch, daemon=True)
        self.thread.start()

    def next(self):
        """The next batch; begins to fetch the one after it."""
        if self.fetched == 0 and self.steps > 0:
            self.start()
        self.settle()
        if self.error is not None:
            raise self.error
        batch, self.batch = self.batch, None
        if batch is None:
            raise IndexError(f"all {self.steps} batches have been taken")
        if self.fetched < self.steps:
            self.start()
        return batch

    def settle(self):
        """Wait for the fetch under way; afterwards nothing runs until next()."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    close = settle


# ----- validation ---------------------------------------------------------------------------------------------------

def validation_rows(corpus, tokens, seq_len, ranks):
    """int32 (len(ranks), rows, seq_len + 1): the first `tokens` targets, an eighth for each logical rank.

    Rows overlap by one id, so that every target is predicted once, from at most seq_len - 1 earlier tokens.
    """
    if tokens % (LOGICAL_RANKS * seq_len):
        raise UserError(f"validation.tokens = {tokens} is not a multiple of 8 x {seq_len}")
    if corpus.val_tokens < tokens + 1:
        raise UserError(f"{corpus.val}: {corpus.val_tokens} tokens, validation needs {tokens + 1}: lower "
                        "validation.tokens or use a larger validation shard")
    ids = open_shard(corpus.val)[:tokens + 1].astype(np.int32)
    check_vocabulary(ids, corpus.vocab_size, str(corpus.val))
    share = tokens // LOGICAL_RANKS
    starts = np.arange(0, share, seq_len)[:, None] + np.arange(seq_len + 1)[None, :]
    return np.stack([ids[rank * share + starts] for rank in ranks])
