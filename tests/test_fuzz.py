"""Damaged and random input, by Hypothesis: shards, settings, logs, manifests and checkpoints are read whole and
as they were written, or refused in one line. FUZZ_CASES=1000 (tests/long.sh) makes as many of each.
"""

import json
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import runlog
from claim_builder import good  # noqa: F401  a fixture
from common.errors import UserError
from data.shards import Shard, write_shard
from evidence import manifest
from settings import deltas, schema
from system import checkpoint

CASES = int(os.environ.get("FUZZ_CASES", "40"))
FUZZ = settings(
    max_examples=CASES, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
BOS = 50256


@st.composite
def damaged(draw, good):
    """Bytes that differ from good ones: some changed, cut off, put in, exchanged or written twice."""
    at = st.integers(0, len(good) - 1)
    first, last = sorted((draw(at), draw(at)))
    bad = draw(st.one_of(
        st.binary(max_size=8).map(lambda x: good[:first] + x + good[first + len(x):]),
        st.binary(min_size=1, max_size=600).map(lambda x: good[:first] + x + good[first:]),
        st.just(good[:first]),
        st.just(good[:first] + good[last:]),
        st.just(good[:last] + good[first:]),
        st.integers(0, 7).map(lambda bit: good[:first] + bytes([good[first] ^ 1 << bit]) + good[first + 1:]),
        st.binary(max_size=40),
    ))
    return bad


def refused(read, *args):
    """Whether a reader refuses its input; in one line that a terminal can show."""
    try:
        read(*args)
    except UserError as error:
        assert "\n" not in str(error) and str(error).isprintable(), str(error)
        return True
    return False


# ----- files


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    path = tmp_path_factory.mktemp("shard") / "fineweb_train_000001.bin"
    tokens = np.random.default_rng(0).integers(0, BOS, 700)
    tokens[::90] = BOS
    write_shard(path, tokens)
    return path, path.read_bytes()


@FUZZ
@given(data=st.data())
def test_a_damaged_shard_is_refused_or_holds_what_its_bytes_say(shard, data):
    """A header's magic number, version and count are checked; a changed token is another text, which the digests
    of a corpus tell."""
    path, good = shard
    bad = data.draw(damaged(good))
    path.write_bytes(bad)
    if refused(Shard, path, BOS, 2048):
        return
    assert bad[:12] == good[:12] and len(bad) == len(good)
    found = Shard(path, BOS, 2048)
    while not found.complete:
        found.more()
    assert found.tokens.tobytes() == bad[1024:]
    assert found.starts.tolist() == np.flatnonzero(np.frombuffer(bad[1024:], "<u2") == BOS).tolist()


@pytest.fixture
def log(good, tmp_path):  # noqa: F811  the fixture
    """The log of a run of a good claim, as a file of its own."""
    return tmp_path / "run.jsonl", next(good.glob("runs/*/run.jsonl")).read_bytes()


@FUZZ
@given(data=st.data())
def test_a_changed_log_is_refused(log, data):
    """The hash of a line is over all lines before it, and a line has one spelling; lines may be missing at the
    end only, as after a kill."""
    path, good = log
    bad = data.draw(damaged(good))
    path.write_bytes(bad)
    whole = not refused(runlog.read_chain, path)
    assert whole == (bad != b"" and good.startswith(bad) and bad.endswith(b"\n"))
    assert len(runlog.readable(path)) <= good.count(b"\n")  # what a kill has left, and never a traceback


@pytest.fixture
def plan(good, tmp_path):  # noqa: F811  the fixture
    """The manifest of a good claim, as a file of its own."""
    return tmp_path / manifest.NAME, (good / manifest.NAME).read_bytes()


@FUZZ
@given(data=st.data())
def test_a_changed_manifest_is_refused(plan, data):
    path, good = plan
    bad = data.draw(damaged(good))
    path.write_bytes(bad)
    assert refused(manifest.read, path) or good.startswith(bad) and bad.endswith(b"\n")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "step_4.pt"
    tensors = {"model.a": torch.arange(40.0), "optimizer.a": torch.ones(3, 5, dtype=torch.bfloat16)}
    checkpoint.write(path, {"step": 4, "seed": 0, "points": [[0, 7.5]]}, tensors)
    return path, path.read_bytes(), tensors


@FUZZ
@given(data=st.data())
def test_a_damaged_checkpoint_is_refused_or_holds_what_was_written(kept, data):
    """Padding and the archive's own fields may change; texts and tensors are held to a digest."""
    path, good, tensors = kept
    path.unlink()  # the file before is mapped
    path.write_bytes(data.draw(damaged(good)))
    if refused(checkpoint.read, path):
        return
    found = checkpoint.read(path)
    assert found.about == {"step": 4, "seed": 0, "points": [[0, 7.5]]}
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[name], x) for name, x in tensors.items())


# ----- settings

PATHS = sorted(schema.fields())
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-10 ** 12, 10 ** 12), st.floats(), st.text(max_size=8),
              st.sampled_from(["off", "none", "true", "1e999", "nan", "-0", "[]", "{}", "[[]]", "{a = {}}"])),
    lambda inner: st.lists(inner, max_size=3), max_leaves=6
)


@FUZZ
@given(record=st.sampled_from(["short/1", "short/33", "short/57", "short/92", "variants/4", "optimizer/36"]),
       path=st.sampled_from(PATHS), value=st.one_of(VALUES.map(str), VALUES.map(repr), st.text(max_size=12)))
def test_any_value_of_a_setting_is_taken_with_its_type_or_refused(record, path, value):
    """What is taken resolves to settings that can be written as JSON and have a hash."""
    found = []
    if not refused(lambda: found.append(deltas.resolve(record, scale="micro", sets=[f"{path}={value}"]))):
        s = found[0].settings
        assert json.loads(json.dumps(schema.plain(s), allow_nan=False)) and len(schema.ml_hash(s)) == 16
