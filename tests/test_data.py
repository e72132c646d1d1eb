"""Laws of shards, stream, corpus, tokenizers and downloads."""

import hashlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data import corpus as corpus_module
from data import fineweb as fineweb_module
from data.corpus import documents, sample_corpus
from data.shards import corpus_digest, open_corpus, open_shard, val_digest, write_shard
from data.stream import (
    Prefetch, Shards, Stream, document_steps, positions, require_shards, shards_needed, stream_digest,
    validation_rows
)
from data.tokenizer import load
from hub import Hub
from common.errors import UserError
from settings.deltas import resolve_name

ROOT = Path(__file__).parent.parent
PER_RANK = dict(loader="per_rank", wrap=True)


@pytest.fixture(scope="module", autouse=True)
def unreachable(tmp_path_factory):
    """A download from a closed port: the hub's client retries for 24 s, so it runs while the other tests
    do."""
    folder = tmp_path_factory.mktemp("unreachable")
    running = subprocess.Popen(
        [sys.executable, "-m", "data.fineweb", "1", "--dir", str(folder / "fw")],
        cwd=ROOT,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={
            **os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(folder),
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1"
        },
    )
    yield running
    running.kill()
    running.wait()


@pytest.fixture
def small(tmp_path):
    """A corpus of three shards of 16-bit noise below 1000 and a validation shard."""
    generator = np.random.default_rng(0)
    for i, n in enumerate((5633, 6465, 5990), 1):
        write_shard(tmp_path / f"x_train_{i:06d}.bin", generator.integers(1000, size=n))
    write_shard(tmp_path / "x_val_000000.bin", generator.integers(1000, size=2000))
    (tmp_path / "corpus.json").write_text('{"name": "x", "tokenizer": "none", "vocab_size": 1000, "bos": 0}')
    return open_corpus(tmp_path)


# ----- shards

def test_a_shard_gives_back_its_tokens(tmp_path):
    tokens = np.arange(65536)
    write_shard(tmp_path / "a.bin", tokens)
    assert np.array_equal(open_shard(tmp_path / "a.bin"), tokens)


def damaged(path, kind):
    raw = bytearray(path.read_bytes())
    if kind == "magic":
        raw[0:4] = (1).to_bytes(4, "little")
    elif kind == "version":
        raw[4:8] = (7).to_bytes(4, "little")
    elif kind == "truncated":
        raw = raw[:-100]
    elif kind == "count":
        raw[8:12] = (3).to_bytes(4, "little")
    elif kind == "short":
        raw = raw[:17]
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize("kind, message", [("magic", "wrong magic number 1"), ("version", "version 7"),
                                           ("truncated", "truncated"), ("count", "header's count is wrong"),
                                           ("short", "too short for a shard header")])
def test_a_damaged_shard_is_named_with_its_fault(small, kind, message):
    damaged(small.train[1], kind)
    with pytest.raises(UserError, match=message) as error:
        open_corpus(small.folder)
    assert str(small.train[1]) in str(error.value)


def test_missing_folders_and_shards_say_what_to_type(tmp_path, small):
    for folder, message in ((tmp_path / "none", "no data folder"), (ROOT / "tests", "no train shards")):
        with pytest.raises(UserError, match=message) as error:
            open_corpus(folder)
        assert "python -m data.fineweb" in str(error.value)
    small.val.unlink()
    with pytest.raises(UserError, match="no validation shard"):
        open_corpus(small.folder)


def test_an_id_outside_the_vocabulary_names_file_and_id(small):
    (small.folder / "corpus.json").write_text(
        '{"name": "x", "tokenizer": "none", "vocab_size": 900, "bos": 0}'
    )
    stream = Stream(open_corpus(small.folder), ranks=range(8), tokens_per_rank=64, **PER_RANK)
    with pytest.raises(UserError, match="token id 9.. is outside the vocabulary of 900"):
        for _ in range(5):
            stream.next()


RIGHT = {"name": "x", "tokenizer": "none", "vocab_size": 1000, "bos": 0}


@pytest.mark.parametrize(
    "about, message",
    [
        ("[1]", "not an object"),
        ("{", "Expecting"),
        ("", "Expecting"),
        (RIGHT | {"bos": 1000}, "0 <= bos < vocab_size"),
        (RIGHT | {"vocab_size": 70_000}, "vocab_size <= 65536"),
        (RIGHT | {"vocab_size": "1000"}, 'vocab_size is "1000", not a whole'),
        (RIGHT | {"vocab_size": 1000.0}, "vocab_size is 1000.0, not a whole"),
        (RIGHT | {"bos": True}, "bos is true, not a whole"),
        (RIGHT | {"bos": None}, "bos is null"),
        (RIGHT | {"name": ""}, "name is"),
        (RIGHT | {"name": 3}, "name is 3, not text"),
        (RIGHT | {"tokenizer": "gpt2"}, "tokenizer gpt2 has vocab_size 50257 and bos 50256"),
        (
            RIGHT | {"tokenizer": "sample", "vocab_size": 1257, "bos": 7},
            "tokenizer sample has vocab_size 1257 and bos 1256",
        ),
        *(({k: v for k, v in RIGHT.items() if k != gone}, f"{gone} is missing") for gone in RIGHT),
    ],
)
def test_a_wrong_corpus_json_is_named_with_what_it_must_hold(small, about, message):
    (small.folder / "corpus.json").write_text(about if isinstance(about, str) else json.dumps(about))
    with pytest.raises(
        UserError, match=f"corpus.json: .*{message}.* must hold name, tokenizer, vocab_size and bos"
    ):
        open_corpus(small.folder)


def test_only_finewebs_own_names_need_no_corpus_json(small, tmp_path):
    (small.folder / "corpus.json").unlink()
    with pytest.raises(
        UserError, match="corpus.json is missing, so nothing says which tokens x_train_000001.bin holds"
    ):
        open_corpus(small.folder)
    (small.folder / "corpus.json").symlink_to("nowhere")
    with pytest.raises(UserError, match="corpus.json: No such file"):
        open_corpus(small.folder)
    other = tmp_path / "fw"
    other.mkdir()
    for name in ("fineweb_train_000001.bin", "fineweb_val_000000.bin"):
        write_shard(other / name, [1, 2])
    assert (open_corpus(other).name, open_corpus(other).bos) == ("fineweb", 50256)


def test_shards_are_read_in_the_order_of_their_numbers(small):
    for i in range(4, 12):
        write_shard(small.folder / f"x_train_{i}.bin", [i, i])
    for i in (1, 2, 3):
        (small.folder / f"x_train_{i:06d}.bin").rename(small.folder / f"x_train_{i}.bin")
    assert [int(p.stem.split("_")[-1]) for p in open_corpus(small.folder).train] == list(range(1, 12))


@pytest.mark.parametrize(
    "made, message",
    [
        ("y_train_000004.bin", "mixes corpora .x_train_000001.bin and y_train_000004.bin"),
        ("y_val_000001.bin", "mixes corpora"),
        ("x_train_000005.bin", "train shard 000004 is missing, the last one is x_train_000005.bin"),
        ("x_train_3.bin", "two train shards of number 3, x_train_000003.bin and x_train_3.bin"),
        ("x_train_last.bin", "shards are called NAME_train_NUMBER.bin"),
        ("x_val_000002.bin", "val shard 000001 is missing")
    ],
)
def test_folders_that_mix_miss_or_repeat_shards_are_refused(small, made, message):
    write_shard(small.folder / made, [1, 2])
    with pytest.raises(UserError, match=message):
        open_corpus(small.folder)


def test_leftovers_next_to_shards_are_no_shards(small):
    for name in (
        "._x_train_000001.bin", ".DS_Store", "x_train_000004.bin~", "x_train_000009.bin.tmp", "Thumbs.db"
    ):
        (small.folder / name).write_text("junk")
    assert open_corpus(small.folder) == small


def test_folders_that_are_none_say_so(small, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dir_train").mkdir()
    for folder, message in (
        (small.val, "is a file, not a folder of shards"), (tmp_path / "loop", "cannot read the data folder"),
        (tmp_path / "dir_train", "no train shards")
    ):
        with pytest.raises(UserError, match=message):
            open_corpus(folder)
    small.train[1].unlink()
    os.mkfifo(small.train[1])
    with pytest.raises(UserError, match="x_train_000002.bin: not a file"):
        open_corpus(small.folder)


# ----- what only a look at every token finds

def rewrite(path, change):
    tokens = np.array(open_shard(path))
    change(tokens)
    write_shard(path, tokens)


@pytest.mark.parametrize("start, length", [(0, 2048), (1000, 1100), (3000, 3465), (4953, 1512)])
@pytest.mark.parametrize("which", ["train", "val"])
def test_a_hole_of_zeros_is_seen(small, tmp_path, monkeypatch, which, start, length):
    monkeypatch.setenv("SPEEDRUN_CACHE", str(tmp_path / "cache"))
    path = small.train[1] if which == "train" else small.val
    write_shard(path, [0, *np.random.default_rng(1).integers(1, 1000, size=6464)])
    corpus_digest(small, 3)
    rewrite(path, lambda tokens: tokens.__setitem__(slice(start, start + length), 0))
    with pytest.raises(UserError, match=f"{path}: a hole of zeros at token"):
        corpus_digest(small, 3)


def test_ids_past_the_vocabulary_are_seen_before_training_wherever_they_stand(small, tmp_path, monkeypatch):
    monkeypatch.setenv("SPEEDRUN_CACHE", str(tmp_path / "cache"))
    rewrite(small.train[2], lambda tokens: tokens.__setitem__(-1, 1000))
    assert corpus_digest(small, 2)  # the third shard is not read
    with pytest.raises(
        UserError, match="x_train_000003.bin: token id 1000 is outside the vocabulary of 1000"
    ):
        corpus_digest(small, 3)


def test_parts_of_different_tokenizers_are_refused(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SPEEDRUN_CACHE", str(tmp_path / "cache"))
    rewrite(small.val, lambda tokens: tokens.__setitem__(tokens == 0, 1))
    with pytest.raises(
        UserError, match="x_val_000000.bin: no document begins here .* with different tokenizers"
    ):
        corpus_digest(small, 3)
    for path in small.train:
        rewrite(path, lambda tokens: tokens.__setitem__(tokens == 0, 1))
    corpus_digest(small, 3)
    assert "sees no borders of documents" in capsys.readouterr().err


def test_a_shard_of_document_starts_alone_is_refused(small, tmp_path, monkeypatch):
    monkeypatch.setenv("SPEEDRUN_CACHE", str(tmp_path / "cache"))
    (small.folder / "corpus.json").write_text(json.dumps(RIGHT | {"bos": 5}))
    write_shard(small.train[0], np.full(6000, 5))
    with pytest.raises(UserError, match="x_train_000001.bin: 6000 of 6000 tokens are document starts"):
        corpus_digest(open_corpus(small.folder), 1)


def test_corpus_digest_sees_content_and_order_but_not_names(small, tmp_path):
    first = corpus_digest(small, 2)
    other = tmp_path / "other"
    other.mkdir()
    for i, path in enumerate((*small.train, small.val)):
        (other / (f"y_train_{i}.bin" if i < 3 else "y_val_0.bin")).write_bytes(path.read_bytes())
    (other / "corpus.json").write_bytes((small.folder / "corpus.json").read_bytes())
    assert corpus_digest(open_corpus(other), 2) == first != corpus_digest(small, 3)
    a, b = (other / f"y_train_{i}.bin" for i in (0, 1))
    a_bytes = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(a_bytes)
    assert corpus_digest(open_corpus(other), 2) != first
    assert val_digest(small, 100) == hashlib.sha256(open_shard(small.val)[:101].tobytes()).hexdigest()


@pytest.mark.parametrize("junk", ["[]", "{", None])
def test_a_useless_digest_memory_does_not_stop_a_run_and_is_said_once(
    small, tmp_path, monkeypatch, capsys, junk
):
    memory = tmp_path / "memory"
    if junk is None:
        memory.write_text("a file where the folder should be")
    else:
        memory.mkdir()
        (memory / "shard_facts.json").write_text(junk)
    monkeypatch.setenv("SPEEDRUN_CACHE", str(memory))
    assert len(corpus_digest(small, 3)) == 64
    assert capsys.readouterr().err.count("not remembered") == (junk is None)


# ----- stream

GOLDEN = np.load(ROOT / "tests/golden/loaders.npz")


@pytest.mark.feature("data.loader", "data.switch_at_equal")
@pytest.mark.parametrize("key, loader, equal", [
    ("record05", "per_rank", False), ("record09", "per_rank", False), ("record12", "per_rank", False),
    ("record14", "per_rank", False), ("record17", "per_rank", True), ("record20", "synced", False),
    ("record26_plain", "synced", False)])
def test_positions_equal_the_original_loaders(key, loader, equal):
    expected = GOLDEN[f"{key}/shard_and_start"]
    lengths = GOLDEN["shard_lengths"].tolist()
    for rank in range(8):
        walk = positions(lengths, rank, loader=loader, tokens_per_rank=64, wrap=loader == "per_rank",
                         switch_at_equal=equal)
        got = [(shard, start) for _, shard, start in itertools.islice(walk, len(expected))]
        assert got == [tuple(x) for x in expected[:, rank].tolist()]


def test_ranks_drift_apart_at_shard_ends_in_the_early_loaders(small):
    walks = [positions(small.train_tokens, r, tokens_per_rank=64, **PER_RANK) for r in (0, 7)]
    assert any(a[1] != b[1] for a, b in itertools.islice(zip(*walks), 40))


def test_reference_mt19937_is_what_numpy_gives():
    generator = np.random.MT19937()
    generator._legacy_seeding(5489)
    assert int(generator.random_raw()) == 3499211612  # first output of the reference implementation


def test_shuffled_loader_visits_every_slot_once_per_epoch_and_differs_by_rank():
    lengths, orders = [5633, 6465, 5990], []
    for rank in (0, 3):
        walk = list(
            itertools.islice(positions(lengths, rank, loader="shuffled", tokens_per_rank=64, wrap=True), 68)
        )
        slots = sum((n - 1) // 512 for n in lengths)
        first = [(s, start - 64 * rank) for e, s, start in walk if e == 0]
        assert len(first) == len(set(first)) == slots and all(start % 512 == 0 for _, start in first)
        orders.append(first)
    assert orders[0] != orders[1]


def test_shuffled_loader_equals_llm_c_over_several_epochs(small):
    """The digest is of what llm.c's dataloader.h (f1e2ace6) read here, compiled: 80 batches, B 2, T 32."""
    stream = Stream(small, ranks=range(8), tokens_per_rank=64, loader="shuffled", wrap=True)
    for _ in range(80):
        stream.next()
    assert stream.epoch == 2
    assert (
        stream_digest(stream.rank_digests())
        == "5b6f509e0f5fb5429f193eec371dc7a5d8f9ef399394ebd810b16d9f03114a79"
    )


@pytest.mark.parametrize("loader", ["shuffled", "per_rank", "synced"])
def test_the_stream_is_the_same_for_1_2_4_8_processes(small, loader):
    seen = []
    for world in (1, 2, 4, 8):
        digests, rows = {}, []
        for process in range(world):
            each = 8 // world
            stream = Stream(small, ranks=range(process * each, process * each + each), tokens_per_rank=64,
                            loader=loader, wrap=True)
            rows.append(np.stack([stream.next() for _ in range(40)]))
            digests |= stream.rank_digests()
        seen.append((np.concatenate(rows, axis=1).tobytes(), stream_digest(digests)))
    assert len(set(seen)) == 1


@pytest.mark.feature("data.first_batch_twice")
def test_first_batch_twice(small):
    stream = Stream(small, ranks=range(8), tokens_per_rank=64, first_batch_twice=True, **PER_RANK)
    plain = Stream(small, ranks=range(8), tokens_per_rank=64, **PER_RANK)
    batches, once = [stream.next() for _ in range(3)], [plain.next() for _ in range(2)]
    assert np.array_equal(batches[0], batches[1]) and np.array_equal(batches[0], once[0])
    assert np.array_equal(batches[2], once[1])


def test_targets_are_inputs_one_token_later(small):
    batch = Stream(small, ranks=range(8), tokens_per_rank=64, **PER_RANK).next()
    assert np.array_equal(batch.reshape(-1)[:65], open_shard(small.train[0])[:65])
    assert batch.shape == (8, 65) and np.array_equal(batch[0, -1], batch[1, 0])


@pytest.mark.feature("data.wrap")
def test_epochs_are_counted_and_running_out_is_an_error(small):
    stream = Stream(small, ranks=range(8), tokens_per_rank=64, **PER_RANK)
    for _ in range(40):
        stream.next()
    assert stream.epoch == 1
    stream = Stream(small, ranks=range(8), tokens_per_rank=64, loader="synced", wrap=False)
    with pytest.raises(UserError, match="ran out of shards at step 33"):
        for _ in range(40):
            stream.next()


@pytest.mark.parametrize("loader", ["per_rank", "synced"])
def test_shards_needed_is_exact(loader):
    lengths = [5633, 6465, 5990]
    walks = [positions(lengths, r, loader=loader, tokens_per_rank=64, wrap=True) for r in range(8)]
    highest = 0
    for steps, now in enumerate(itertools.islice(zip(*walks), 33), 1):
        highest = max(highest, *(shard for _, shard, _ in now))
        assert (
            shards_needed(lengths, steps=steps, loader=loader, tokens_per_rank=64, wrap=True) == highest + 1
        )


def test_too_few_shards_is_known_before_training(small):
    with pytest.raises(UserError, match="3000 steps of 524288 tokens need 16 train shards, found 3"):
        object.__setattr__(small, "train_tokens", (100_000_000,) * 3)
        require_shards(small, steps=3000, tokens_per_rank=65536, loader="per_rank", wrap=False)


def test_the_shuffled_loader_too_is_refused_before_training_when_shards_are_few(small):
    about = dict(tokens_per_rank=64, loader="shuffled", wrap=False)
    slots = sum((n - 1) // 512 for n in small.train_tokens)
    assert require_shards(small, steps=slots, **about) == 3
    with pytest.raises(UserError, match=f"{slots + 1} steps of 512 tokens need 4 train shards, found 3"):
        require_shards(small, steps=slots + 1, **about)
    assert require_shards(small, steps=slots + 1, **about | dict(wrap=True)) == 3


def test_a_short_last_shard_matters_only_when_it_is_read(small):
    write_shard(small.folder / "x_train_000004.bin", np.zeros(300))
    corpus, about = open_corpus(small.folder), dict(tokens_per_rank=64, loader="per_rank", wrap=False)
    assert require_shards(corpus, steps=20, **about) == 2
    with pytest.raises(UserError, match="x_train_000004.bin: 300 tokens are too few for one step of 512"):
        require_shards(corpus, steps=36, **about)


def test_prefetch_keeps_the_order_and_rests_after_settle(small):
    plain = Stream(small, ranks=range(8), tokens_per_rank=64, **PER_RANK)
    ahead = Prefetch(Stream(small, ranks=range(8), tokens_per_rank=64, **PER_RANK), 5)
    before = threading.active_count()
    for step in range(5):
        assert np.array_equal(ahead.next(), plain.next())
        ahead.drain()
        assert ahead.ahead is None or ahead.ahead.done()
        assert ahead.stream.step == min(step + 2, 5)  # one ahead, and never beyond the last step
    with pytest.raises(IndexError):
        ahead.next()
    ahead.close()
    assert threading.active_count() == before


def test_validation_covers_every_target_once(small):
    rows = np.concatenate([validation_rows(small, 1024, 32, [r]) for r in range(8)])
    assert np.array_equal(rows[:, :, 1:].reshape(-1), open_shard(small.val)[1:1025])
    with pytest.raises(UserError, match="validation needs 4097"):
        validation_rows(small, 4096, 32, range(8))


# ----- tokenizers and the embedded corpus

def test_gpt2_tokens_are_gpt2s():
    gpt2 = load("gpt2")
    assert gpt2.encode_ordinary("Hello world") == [15496, 995] and gpt2.encode_ordinary(" the") == [262]
    assert gpt2.n_vocab == 50257 and gpt2.eot_token == 50256


@pytest.mark.parametrize("name", ["gpt2", "sample"])
def test_any_text_survives_tokenising(name):
    encoding, text = load(name), "naïve 日本語 🎉\n\ttabs  and\x00 bytes, 3.28!"
    assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_the_sample_vocabulary_is_a_small_image_of_gpt2s():
    sample = load("sample")
    assert sample.n_vocab == 1257
    leading = [t for t in map(sample.decode_single_token_bytes, range(256, 1256)) if t.startswith(b" ")]
    assert len(leading) > 300  # prefix structure: words begin with a blank


def test_the_embedded_corpus_has_its_pinned_tokens_and_room_for_packing():
    corpus = sample_corpus()
    assert hashlib.sha256(open_shard(corpus.train[0])).hexdigest() == corpus_module.DIGESTS["train"]
    starts = np.flatnonzero(np.asarray(open_shard(corpus.train[0])) == corpus.bos)
    lengths = np.diff([*starts, corpus.train_tokens[0]])
    assert np.minimum(lengths, 128).sum() >= 1_500_000
    assert corpus.val_tokens > 65_536


def test_no_paragraph_is_in_both_parts():
    validation, train = (set(p for text in part for p in text.split("\n\n") if len(p) >= 40)
                         for part in corpus_module.source_documents())
    assert validation and train and not validation & train


def test_documents_keep_the_text():
    source = corpus_module.source_documents()[0]
    assert "".join("".join(documents()[0]).split()) == "".join("".join(source).split())


# ----- commands

def command(module, *args, **env):
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, args)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, **env}
    )


def shard_bytes(tmp_path, n, seed):
    path = tmp_path / f"made_{seed}.bin"
    write_shard(path, [50256, *np.random.default_rng(seed).integers(50256, size=n - 1)])
    return path.read_bytes()


@pytest.fixture
def hub(tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    hub = Hub({"fineweb_val_000000.bin": shard_bytes(made, 3000, 0),
               "fineweb_train_000001.bin": shard_bytes(made, 400_000, 1),
               "fineweb_train_000002.bin": shard_bytes(made, 2000, 2)})
    yield hub
    hub.close()


def fineweb(tmp_path, url, count, *more, folder="fw"):
    return command("data.fineweb", count, "--dir", tmp_path / folder, "--repo", "test/fineweb", *more,
                   HF_ENDPOINT=url, HF_HOME=str(tmp_path / "home"),
                   HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_ETAG_TIMEOUT="2", HF_HUB_DOWNLOAD_TIMEOUT="2",
                   HF_HUB_DISABLE_XET="1", no_proxy="127.0.0.1")


def test_download_fetches_checks_and_leaves_alone_what_is_right(tmp_path, hub, monkeypatch):
    done = fineweb(tmp_path, hub.url, 2)
    assert done.returncode == 0 and done.stdout.endswith("2 train shards, verified\n"), done.stderr
    assert open_corpus(tmp_path / "fw").train_tokens == (400_000, 2000)
    kept = json.loads((tmp_path / "fw" / "shards.json").read_text())
    assert {n: e["sha256"] for n, e in kept.items()} == {
        n: hashlib.sha256(b).hexdigest() for n, b in hub.files.items()
    }
    hub.requests.clear()
    assert fineweb(tmp_path, hub.url, 2).returncode == 0 and not hub.requests
    path = tmp_path / "fw" / "fineweb_train_000002.bin"
    about = path.stat()
    rewrite(path, lambda tokens: tokens.__setitem__(7, tokens[7] ^ 1))
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    # nothing is remembered of the file by size and time
    monkeypatch.setenv("SPEEDRUN_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="fineweb_train_000002.bin is not what was downloaded"):
        corpus_digest(open_corpus(tmp_path / "fw"), 2)
    assert fineweb(tmp_path, hub.url, 2).returncode == 0 and not hub.requests  # size and time are the same
    done = fineweb(tmp_path, hub.url, 2, "--verify")
    assert done.returncode == 0 and "000002.bin is not the published file: fetched again" in done.stderr
    assert path.read_bytes() == hub.files[path.name] and [n for v, n, _ in hub.requests if v == "GET"] == [
        path.name
    ]


def test_shards_copied_by_hand_are_compared_with_the_hub(tmp_path, hub):
    (tmp_path / "fw").mkdir()
    for name, content in hub.files.items():
        (tmp_path / "fw" / name).write_bytes(content)
    write_shard(tmp_path / "fw" / "fineweb_train_000002.bin", [1, 2, 3])  # whole, but another file
    done = fineweb(tmp_path, hub.url, 2)
    assert done.returncode == 0 and done.stderr.count("there already, verified") == 2
    assert [n for v, n, _ in hub.requests if v == "GET"] == ["fineweb_train_000002.bin"]
    del hub.files["fineweb_val_000000.bin"]
    (tmp_path / "fw" / "shards.json").unlink()
    done = fineweb(tmp_path, hub.url, 2)
    assert (
        done.returncode == 0 and done.stdout.endswith("1 not verified\n")
        and "is not compared with the hub" in done.stderr
    )


def test_a_page_instead_of_a_shard_is_one_clear_line(tmp_path, hub):
    hub.files["fineweb_train_000001.bin"] = b"<!DOCTYPE html><p>Log in to the wireless network</p>"
    done = fineweb(tmp_path, hub.url, 1)
    assert done.returncode == 2 and "incomplete or damaged" in done.stderr and "Traceback" not in done.stderr
    hub.plain = True  # without the hub's headers, as a portal answers
    done = fineweb(tmp_path, hub.url, 1, folder="other")
    assert (
        done.returncode == 2 and "cannot fetch fineweb_val_000000.bin" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_published_hashes_and_sizes(tmp_path):
    known = [fineweb_module.published(fineweb_module.REPO, name) for name in fineweb_module.names(103)]
    assert {size for size, _ in known} == {200_001_024, 110_649_110} and known[-1][0] == 110_649_110
    digests = [digest for _, digest in known if digest]
    assert len(digests) == len(set(digests)) == 25 and all(re.fullmatch("[0-9a-f]{64}", d) for d in digests)
    assert fineweb_module.published("test/fineweb", "fineweb_val_000000.bin") == (None, None)


def test_a_full_disk_is_known_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10 ** 9))
    with pytest.raises(UserError, match="17 shards need 3.4 GB, .* has 1.0 GB free"):
        fineweb_module.download(16, tmp_path, fineweb_module.REPO)


def settings_of(record, scale):
    return resolve_name(record, scale=scale).settings


def test_shards_needed_are_computed_from_the_settings():
    needed = {(record, scale): fineweb_module.shards_needed(settings_of(record, scale))
              for record in ("short/1", "short/11", "short/33") for scale in ("full", "small")}
    assert needed == {
        ("short/1", "full"): 103, ("short/1", "small"): 1, ("short/11", "full"): 16, ("short/11", "small"): 1,
        ("short/33", "full"): 8, ("short/33", "small"): 1
    }
    assert "`python -m data.fineweb 1`" in fineweb_module.get(settings_of("short/11", "small"))
    assert fineweb_module.asked("short/11", "small") == 1 and fineweb_module.asked("9", None) == 9
    for shards, scale in (("short/99", None), ("9", "small"), ("two", None)):
        with pytest.raises(UserError):
            fineweb_module.asked(shards, scale)


@pytest.mark.parametrize(
    "loader, size, longest", [("packed", 6144, 2048), ("packed", 12288, 1024), ("bos_aligned", 6144, None)]
)
def test_tokens_that_loaders_by_document_pass_over_are_estimated_well(tmp_path, loader, size, longest):
    generator, count = np.random.default_rng(0), 3_000_000
    sigma = (2 * np.log(fineweb_module.MEAN_DOCUMENT / fineweb_module.MEDIAN_DOCUMENT)) ** 0.5
    starts = np.cumsum(
        generator.lognormal(np.log(fineweb_module.MEDIAN_DOCUMENT), sigma, count // 400).astype(int) + 1
    )
    tokens = np.ones(count, np.uint16)
    tokens[0] = tokens[starts[starts < count]] = 0
    write_shard(tmp_path / "a.bin", tokens)
    corpus = SimpleNamespace(train=[tmp_path / "a.bin"], bos=0, train_tokens=(count,), folder=tmp_path)
    steps = document_steps(Shards(corpus, longest), loader=loader, tokens_per_rank=size, wrap=True)
    last = [pieces[0][0][0] for epoch, _, pieces in itertools.takewhile(lambda step: step[0] == 0, steps)]
    passed = (last[-1] - last[0]) / (len(last) - 1) / 8
    assert abs(passed / fineweb_module.document_tokens(loader, size, longest) - 1) < 0.05


def test_a_broken_download_resumes_where_it_stopped(tmp_path, hub):
    # the client writes 10 MB at a time
    hub.files["fineweb_train_000001.bin"] = shard_bytes(tmp_path, 12_000_000, 3)
    hub.break_after = 15_000_000
    del hub.files["fineweb_val_000000.bin"]
    (tmp_path / "fw").mkdir()
    write_shard(tmp_path / "fw" / "fineweb_val_000000.bin", [1, 2, 3])
    for _ in range(2):
        done = fineweb(tmp_path, hub.url, 1)
    assert done.returncode == 0, done.stderr
    assert any(asked and not asked.startswith("bytes=0-") for _, _, asked in hub.requests)
    assert (tmp_path / "fw" / "fineweb_train_000001.bin").read_bytes() == hub.files[
        "fineweb_train_000001.bin"
    ]


@pytest.mark.parametrize(
    "fault, message", [("truncated", "incomplete or damaged"), ("missing", "has no file")]
)
def test_faults_of_the_hub_are_one_clear_line(tmp_path, hub, fault, message):
    if fault == "truncated":
        hub.files["fineweb_train_000001.bin"] = hub.files["fineweb_train_000001.bin"][:-10]
    else:
        del hub.files["fineweb_train_000001.bin"]
    done = fineweb(tmp_path, hub.url, 1)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_an_unreachable_hub_says_what_to_do_offline(unreachable):
    _, printed = unreachable.communicate(timeout=60)
    assert unreachable.returncode == 2 and "offline" in printed and "Traceback" not in printed


def test_an_interrupted_download_says_that_it_resumes(tmp_path):
    silent = socket.create_server(("127.0.0.1", 0))  # takes the connection and never answers
    running = subprocess.Popen(
        [sys.executable, "-m", "data.fineweb", "1", "--dir", str(tmp_path / "fw")],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_ETAG_TIMEOUT": "60",
            "no_proxy": "127.0.0.1"
        },
    )
    silent.settimeout(20)
    connection, _ = silent.accept()  # so the program is in the middle of its download
    running.send_signal(signal.SIGINT)
    _, printed = running.communicate(timeout=20)
    connection.close()
    silent.close()
    assert running.returncode == 130 and "to resume" in printed and "Traceback" not in printed


def test_an_unwritable_download_folder_is_named(tmp_path, hub):
    (tmp_path / "fw").write_text("a file")
    done = fineweb(tmp_path, hub.url, 1)
    assert done.returncode == 2 and "choose another --dir" in done.stderr and "Traceback" not in done.stderr
    assert command("data.fineweb", 200).returncode == 2
