"""Laws of the loaders that go by documents: aligned (records 26-28) and packed (record 29 on)."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from data import shards as shards_module
from data.corpus import sample_corpus
from data.shards import open_corpus, write_shard
from data.stream import (BY_DOCUMENT, BY_POSITION, Prefetch, Shards, Stream, document_steps, positions,
                         require_shards, shards_needed, stream_digest)
from common.errors import UserError

GOLDEN = np.load(Path(__file__).parent / "golden/loaders.npz")
BOS, T, LONGEST = 999, 64, 40
ABOUT = dict(tokens_per_rank=T, max_doc_len=LONGEST)


def make_corpus(folder, shards, bos=BOS, vocab_size=1000):
    for i, tokens in enumerate(shards, 1):
        write_shard(folder / f"x_train_{i:06d}.bin", tokens)
    write_shard(folder / "x_val_000000.bin", np.zeros(2000))
    (folder / "corpus.json").write_text(
        f'{{"name": "x", "tokenizer": "none", "vocab_size": {vocab_size}, "bos": {bos}}}'
    )
    return open_corpus(folder)


def random_shard(generator, size, starts_inside):
    """Tokens below BOS in documents of 1 to about 300 tokens, two in three shorter than LONGEST."""
    tokens, at = generator.integers(BOS, size=size), 17 if starts_inside else 0
    while at < size:
        tokens[at] = BOS
        at += int(1 + 25 * np.exp(generator.standard_normal()))
    return tokens


@pytest.fixture
def corpus(tmp_path):
    """Three shards of random documents; the second begins inside a document, the third holds a handful of
    steps."""
    generator = np.random.default_rng(0)
    return make_corpus(
        tmp_path, [random_shard(generator, n, i == 1) for i, n in enumerate((25_633, 31_465, 5_990))]
    )


def batches(corpus, loader, steps, ranks=range(8), wrap=True, **more):
    stream = Stream(corpus, ranks=ranks, loader=loader, wrap=wrap, **{**ABOUT, **more})
    return [stream.next() for _ in range(steps)], stream


# ----- the streams of the originals

def test_aligned_batches_equal_the_original_loader_token_for_token(tmp_path):
    lengths, expected = GOLDEN["shard_lengths"].tolist(), GOLDEN["record26_bos_aligned/shard_and_start"]
    shards = []
    for i, n in enumerate(lengths):
        bos = np.unpackbits(GOLDEN[f"bos_mask/shard{i}"])[:n].astype(bool)
        shards.append(np.where(bos, 50256, (np.arange(n) * 7 + i * 19_000) % 50_000))
    stream = Stream(
        make_corpus(tmp_path, shards, 50256, 50257), ranks=range(8), tokens_per_rank=64, loader="bos_aligned",
        wrap=False, max_doc_len=2048
    )
    for step in expected:
        rows = np.stack([shards[shard][start:start + 65] for shard, start in step])
        assert np.array_equal(stream.next(), rows)
    with pytest.raises(UserError, match="ran out of shards at step 25"):
        stream.next()


def packed_by_hand(tokens, size, longest):
    """(rows of eight ranks, ends of their documents) of each whole step of a shard, token by token from the
    definition."""
    documents = []
    for token in tokens.tolist():
        if token == BOS:
            documents.append([])
        if documents:  # what stands before the first start belongs to no document here
            documents[-1].append(token)
    queue, steps = iter(documents), []
    try:
        while True:
            rows, ends = [], []
            for _ in range(8):
                row, bounds = [], [0]
                while len(row) < size + 1:
                    row += next(queue)[:longest][:size + 1 - len(row)]
                    bounds.append(len(row))
                bounds[-1] -= 1  # the last token is a target only
                rows.append(row)
                ends.append(bounds)
            steps.append((np.array(rows), ends))
    except StopIteration:  # an unfinished step is dropped
        return steps


@pytest.mark.feature("data.max_doc_len")
def test_packed_batches_equal_the_definition_on_random_documents(corpus):
    by_hand = [step for shard in Shards(corpus).corpus.train
               for step in packed_by_hand(np.asarray(shards_module.open_shard(shard)), T, LONGEST)]
    ours, stream = batches(corpus, "packed", len(by_hand), wrap=False)
    assert len(by_hand) > 40
    for rows, (expected, ends) in zip(ours, by_hand):
        assert np.array_equal(rows, expected)
        for row, bounds in zip(rows[:, :-1], ends):  # the tokens alone say where documents end
            assert [*np.flatnonzero(row == BOS), T] == sorted({*bounds, T})
    with pytest.raises(UserError, match="ran out of shards"):
        stream.next()


def test_aligned_batches_equal_the_definition_on_random_documents(corpus):
    """With ranks long enough that the original's look at two steps' tokens always suffices."""
    size, expected = 200, []
    for path in corpus.train:
        tokens, position = np.asarray(shards_module.open_shard(path)), 0
        while position + 16 * size + 1 < len(tokens):
            starts, candidates = [], [p for p in range(position, position + 16 * size) if tokens[p] == BOS]
            start = candidates[0]
            for end in candidates[1:]:
                if end - start >= size:
                    starts.append(start)
                    start = end
                    if len(starts) == 8:
                        break
            assert len(starts) == 8
            expected.append(np.stack([tokens[s:s + size + 1] for s in starts]))
            position = start
    ours, _ = batches(corpus, "bos_aligned", len(expected), wrap=False, tokens_per_rank=size)
    assert len(expected) > 10 and all(map(np.array_equal, ours, expected))


def test_aligned_ranks_begin_with_documents_and_skip_as_little_as_possible(corpus):
    tokens = [np.asarray(shards_module.open_shard(path)) for path in corpus.train]
    walk = document_steps(Shards(corpus), loader="bos_aligned", tokens_per_rank=T, wrap=True)
    beyond = 0
    for _, shard, pieces in itertools.islice(walk, 60):
        starts = [s for (s,), _ in pieces]
        assert all(tokens[shard][s] == BOS for s in starts)
        for a, b in itertools.pairwise(starts):
            assert b >= a + T and not (tokens[shard][a + T:b] == BOS).any()
        beyond += starts[-1] + T >= starts[0] + 16 * T
    assert beyond  # documents longer than a rank: the original would have stopped


# ----- laws

@pytest.mark.parametrize("loader", BY_DOCUMENT)
def test_the_stream_is_the_same_for_1_2_4_8_processes(corpus, loader):
    seen = set()
    for world in (1, 2, 4, 8):
        digests, rows = {}, []
        for process in range(world):
            each = 8 // world
            part, stream = batches(corpus, loader, 110, ranks=range(process * each, process * each + each))
            rows.append(np.stack(part))
            digests |= stream.rank_digests()
        assert stream.epoch == 1
        seen.add((np.concatenate(rows, axis=1).tobytes(), stream_digest(digests)))
    assert len(seen) == 1


@pytest.mark.parametrize("loader", BY_DOCUMENT)
def test_how_far_a_shard_is_looked_through_at_once_does_not_change_the_stream(corpus, loader, monkeypatch):
    """Record 33 knows only the beginning of the first shard when it starts, and looks through the rest
    meanwhile."""
    seen = set()
    for tokens in (97, 700, 5_000, 1_000_000):
        monkeypatch.setattr(shards_module, "SCAN", tokens)
        seen.add(stream_digest(batches(corpus, loader, 110)[1].rank_digests()))
    assert len(seen) == 1


def test_the_next_shard_is_known_before_it_is_needed_and_the_first_is_not_waited_for(corpus, monkeypatch):
    monkeypatch.setattr(shards_module, "SCAN", 4_000)
    stream = Stream(corpus, ranks=range(8), loader="packed", wrap=False, **ABOUT)
    stream.next()
    assert not stream.shards[0].complete
    while not stream.shards[1].complete:
        stream.next()
    assert next(stream.steps)[1] == 0  # still in the first shard


def test_prefetch_looks_ahead_too_and_rests_after_settle(corpus):
    plain = Stream(corpus, ranks=range(8), loader="packed", wrap=True, **ABOUT)
    ahead = Prefetch(Stream(corpus, ranks=range(8), loader="packed", wrap=True, **ABOUT), 60)
    for _ in range(60):
        assert np.array_equal(ahead.next(), plain.next())
        ahead.drain()
        assert ahead.ahead is None or ahead.ahead.done()


@pytest.mark.parametrize("loader", BY_DOCUMENT)
def test_shards_needed_by_document_is_exact(corpus, loader):
    about = dict(loader=loader, tokens_per_rank=T)
    shards = [shard for _, shard, _ in itertools.takewhile(
        lambda step: step[0] == 0, document_steps(Shards(corpus, LONGEST), wrap=True, **about))]
    for steps in (1, shards.index(1), shards.index(1) + 1, shards.index(2), shards.index(2) + 1, len(shards)):
        assert (
            require_shards(corpus, steps=steps, wrap=False, max_doc_len=LONGEST, **about)
            == shards[steps - 1] + 1
        )
    for steps, lowest in ((len(shards) + 1, 4), (2 * len(shards), 6)):
        assert shards_needed((), steps=steps, shards=Shards(corpus, LONGEST), wrap=False, **about) == lowest
        with pytest.raises(
            UserError, match=f"{steps} steps of 512 tokens need {lowest} train shards, found 3"
        ):
            require_shards(corpus, steps=steps, wrap=False, max_doc_len=LONGEST, **about)
    assert require_shards(corpus, steps=5 * len(shards), wrap=True, max_doc_len=LONGEST, **about) == 3


@pytest.mark.parametrize("loader", ["synced", "per_rank", "bos_aligned", "packed"])
def test_steps_may_differ_in_size_and_go_on_where_the_last_one_ended(corpus, loader):
    sizes = [32] * 5 + [64] * 4 + [96] * 6
    rows, stream = batches(corpus, loader, len(sizes), tokens_per_rank=sizes)
    assert [r.shape for r in rows] == [(8, size + 1) for size in sizes]
    same, _ = batches(corpus, loader, 5, tokens_per_rank=32)
    assert all(map(np.array_equal, rows, same))
    if loader in BY_POSITION:  # here without a gap: one long row of the shard
        joined = np.concatenate([r[:, :-1].reshape(-1) for r in rows])
        assert np.array_equal(joined, shards_module.open_shard(corpus.train[0])[:len(joined)])
    assert (
        require_shards(
            corpus, steps=len(sizes), wrap=False, loader=loader, **{**ABOUT, "tokens_per_rank": sizes}
        )
        == 1
    )


def test_the_shuffled_loader_refuses_steps_of_several_sizes(corpus):
    with pytest.raises(UserError, match="data.loader=shuffled needs steps of one size"):
        positions(corpus.train_tokens, 0, loader="shuffled", tokens_per_rank=[32, 64], wrap=True)


@pytest.mark.feature("data.switch_at_equal")
def test_a_shard_may_end_one_token_earlier_as_in_records_15_to_17(tmp_path):
    """6 x 512 + 1 tokens: the sixth step fits exactly, and is read unless switch_at_equal."""
    corpus = make_corpus(tmp_path, [np.arange(3073) % BOS, np.full(3073, 5)])
    for equal, expected in ((False, 6), (True, 5)):
        rows, _ = batches(corpus, "per_rank", 7, ranks=range(1), switch_at_equal=equal)
        assert sum((r != 5).any() for r in rows) == expected


@pytest.mark.parametrize("tokens_per_rank", [384, 96])
@pytest.mark.parametrize("loader", BY_DOCUMENT)
def test_the_embedded_corpus_holds_a_tiny_run_of_each_loader_in_one_pass(loader, tokens_per_rank):
    """1.5 times the 720,896 tokens of the scale `tiny`, documents cut at 128 tokens."""
    walk = document_steps(
        Shards(sample_corpus(), 128), loader=loader, tokens_per_rank=tokens_per_rank, wrap=True
    )
    steps = sum(1 for _ in itertools.takewhile(lambda step: step[0] == 0, walk))
    assert steps * 8 * tokens_per_rank > 1.5 * 720_896


# ----- bad input

@pytest.mark.parametrize("loader", BY_DOCUMENT)
def test_a_shard_without_document_starts_is_named_before_training(tmp_path, loader):
    generator = np.random.default_rng(0)
    corpus = make_corpus(
        tmp_path, [random_shard(generator, 9_000, False), generator.integers(BOS, size=9_000)]
    )
    assert require_shards(corpus, steps=5, loader=loader, wrap=True, **ABOUT) == 1
    with pytest.raises(
        UserError, match="x_train_000002.bin: no document begins here .token 999.*data.loader=synced"
    ):
        require_shards(corpus, steps=30, loader=loader, wrap=True, **ABOUT)


@pytest.mark.feature("data.wrap", "data.max_doc_len")
@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize(
    "loader, size, longest, reason",
    [
        ("packed", 1000, 1000, "use larger shards"),
        ("packed", 64, 3, "24 are left when each is cut at 3 .data.max_doc_len"),
        ("bos_aligned", 1000, 9, "use larger shards"),
        ("bos_aligned", 330, 9, "each of 8 ranks begins with a document of its own")
    ],
)
def test_shards_that_hold_no_whole_step_are_refused_with_the_true_reason(
    tmp_path, loader, size, longest, reason, wrap
):
    shard = np.ones(6_000)
    shard[::800] = BOS
    corpus = make_corpus(tmp_path, [shard, shard])
    with pytest.raises(
        UserError,
        match=f"no train shard holds one step of {loader} data, 8 x {size} tokens: x_train_000001.bin "
        f"has 6000 tokens in 8 documents.*{reason}"
    ):
        require_shards(corpus, steps=3, loader=loader, wrap=wrap, tokens_per_rank=size, max_doc_len=longest)


def test_an_unknown_loader_names_the_known_ones(corpus):
    with pytest.raises(UserError, match="choose shuffled, per_rank, synced, bos_aligned, packed"):
        Stream(corpus, ranks=range(8), loader="random", wrap=True, tokens_per_rank=T)
