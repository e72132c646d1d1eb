"""Laws of attention: visible sets by brute force, every backend equal to the dense mask, honest refusals."""

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import schedule
from data.batch import to_rows
from data.corpus import sample_corpus
from data.stream import Stream, stream_arguments, validation_rows
from kernels import attention
from kernels.attention import CAUSAL, Window, attend, attend_cached, binding, choose, view
from model import GPT
from optim import Optimizer
from settings import deltas
from train_gpt import train_step, validation_loss

GOLDEN = Path(__file__).parent / "golden"
CPU = ("dense", "banded", "documents")
WINDOWS = (
    CAUSAL, Window(1), Window(7), Window(50), Window(1000), Window(None, 1, 8), Window(None, 3, 8),
    Window(20, 3, 8), Window(None, 2, 5)
)


def random_documents(rows, tokens, seed=0, mean=12):
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(rows, tokens, generator=g) < 1 / mean).long().cumsum(1)


def qkv(rows, tokens, dtype=torch.float64, grad=True, width=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, tokens, 2, width, dtype=torch.float64, generator=g).to(dtype).requires_grad_(grad)
        for _ in range(3)
    ]


def seen_by(backend, documents, window, **options):
    """The visible sets (R, T, T) of a backend: with equal logits and one-hot values the output shows what was
    averaged."""
    rows, tokens = documents.shape
    zero, values = torch.zeros(rows, tokens, 1, 8), torch.eye(tokens).expand(rows, tokens, tokens)[:, :, None]
    return attend(zero, zero, values, view(documents, window, backend, **options))[:, :, 0] > 0


def by_rule(documents, rule):
    """The sets (R, T, T) that loops over rows, queries and keys find."""
    sets = [[[k <= q and ids[q] == ids[k] and rule(q, k) for k in range(len(ids))] for q in range(len(ids))]
            for ids in documents.tolist()]
    return torch.tensor(sets)


# ----- what is visible

RULES = {  # record: (its rule as the original states it, our window); blocks of 8 for the originals' 128
    "12: a fixed token window": (lambda q, k: q - k < 20, Window(20)),
    "13: a token window of a multiple of its unit": (
        lambda q, k: q - k < 4 * math.floor((4 + 108 * 0.3) / 4),
        Window(36),
    ),
    "15: both limits, w = 8": (
        lambda q, k: q - k < 8 and q // 8 - k // 8 < math.ceil(8 / 8),
        Window(8, 1, 8),
    ),
    "15: both limits, w = 12": (
        lambda q, k: q - k < 12 and q // 8 - k // 8 < math.ceil(12 / 8),
        Window(12, 2, 8),
    ),
    "16: a window of one block": (lambda q, k: q // 8 - k // 8 < 1, Window(None, 1, 8)),
    "16: a window of five blocks": (lambda q, k: q // 8 - k // 8 < 5, Window(None, 5, 8)),
    "29: FlashAttention's left window 16 shows 17 keys": (lambda q, k: q - 16 <= k <= q, Window(17)),
    "no window": (lambda q, k: True, CAUSAL),
}


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("record", RULES)
def test_visible_sets_are_the_records_definition(backend, record):
    rule, window = RULES[record]
    for seed, mean in ((0, 12), (1, 60)):
        documents = random_documents(2, 91, seed, mean)
        assert torch.equal(seen_by(backend, documents, window), by_rule(documents, rule))


def clipped_tiles(ids, block, blocks):
    """Records 16-21 as the original does it for one row: lists of tiles, nearest first, with clipped counts.

    Full tiles (an earlier tile, both within one document) are kept up to blocks - 1, partial ones up to
    max(blocks - unclipped full count, 1); a partial tile is masked by causality and documents, a full one by
    nothing.
    """
    tokens = len(ids)
    low, high = ids[::block], ids[block - 1::block]
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for i in range(tokens // block):
        some = [j for j in range(i, -1, -1) if low[i] <= high[j] and low[j] <= high[i]]
        full = [j for j in some if j < i and low[i] == high[j] and low[j] == high[i]]
        partial = [j for j in some if j not in full]
        for j in full[:max(blocks - 1, 0)]:
            seen[i * block:(i + 1) * block, j * block:(j + 1) * block] = True
        for j in partial[:max(blocks - len(full), 1)]:
            for q in range(i * block, (i + 1) * block):
                for k in range(j * block, min(q, (j + 1) * block - 1) + 1):
                    seen[q, k] = ids[q] == ids[k]
    return seen


@pytest.mark.parametrize("blocks", [0, 1, 2, 3, 6, 14])
def test_record_20_clipped_tile_lists_are_the_plain_block_window_and_0_acts_as_1(blocks):
    for seed, mean in ((0, 10), (1, 25), (2, 70)):
        documents = random_documents(1, 96, seed, mean)
        expected = clipped_tiles(documents[0].tolist(), 8, blocks)
        for backend in CPU:
            assert torch.equal(seen_by(backend, documents, Window(None, max(1, blocks), 8))[0], expected)


@pytest.mark.parametrize(
    "record, windows",
    [
        ("record12", {None: Window(192)}),
        ("record20", {None: Window(None, 2, 128), (0, 4, 11): Window(None, 4, 128)}),
    ],
)
@pytest.mark.parametrize("backend", CPU)
def test_counts_of_visible_keys_are_the_original_codes(record, windows, backend):
    golden = np.load(GOLDEN / f"{record}.npz")
    documents = torch.from_numpy(golden["in/doc_id"]).long()[None]
    counts = {layers: seen_by(backend, documents, window)[0].sum(1) for layers, window in windows.items()}
    for layer, expected in zip(golden["mask/layers"].tolist(), golden["mask/visible_count"]):
        layers = next((ls for ls in windows if ls is not None and layer in ls), None)
        assert np.array_equal(counts[layers].numpy(), expected)


def test_limits_beyond_the_row_are_dropped_and_no_others():
    for tokens in (1, 7, 8, 9, 40):
        for window in (
            *WINDOWS, *(Window(n) for n in range(1, 12)), *(Window(None, n, 4) for n in range(1, 12))
        ):
            q, k = torch.arange(tokens)[:, None], torch.arange(tokens)
            kept = binding(window, tokens)
            assert torch.equal(attention.visible(q, k, window), attention.visible(q, k, kept))
            assert kept == CAUSAL or not torch.equal(attention.visible(q, k, kept), k <= q)


# ----- every backend equals the dense mask

@pytest.mark.parametrize("rows, tokens", [(1, 1), (3, 5), (2, 64), (3, 130), (1, 301)])
def test_cpu_backends_equal_dense_forward_and_backward(rows, tokens):
    """Documents of all kinds: random, absent, one a row, one token each; T that is no multiple of the blocks;
    windows beyond T."""
    some = random_documents(rows, tokens)
    for documents in (some, None, torch.zeros_like(some), torch.arange(tokens).expand(rows, tokens)):
        for window in WINDOWS:
            q, k, v = qkv(rows, tokens)
            upstream = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(1))
            results = []
            for backend in CPU:
                prepared = view(
                    documents, window, backend, rows=rows, tokens=tokens, device=q.device, dtype=q.dtype
                )
                y = attend(q, k, v, prepared)
                results.append((y, *torch.autograd.grad(y, (q, k, v), upstream)))
            for other in results[1:]:
                assert all((a - b).abs().max() < 1e-12 for a, b in zip(results[0], other)), (
                    window,
                    documents,
                )


def test_dense_is_softmax_over_the_visible_keys():
    documents, scale = random_documents(2, 40), 0.12
    q, k, v = qkv(2, 40, grad=False)
    logits = torch.einsum("rqhd,rkhd->rhqk", scale * q, k)
    seen = by_rule(documents, lambda q, k: q - k < 9)
    expected = torch.einsum("rhqk,rkhd->rqhd", logits.masked_fill(~seen[:, None], -math.inf).softmax(-1), v)
    for backend in CPU:
        assert (attend(q, k, v, view(documents, Window(9), backend), scale) - expected).abs().max() < 1e-12


def test_without_a_view_attention_is_causal():
    q, k, v = qkv(2, 33, grad=False)
    causal = view(None, CAUSAL, "banded", rows=2, tokens=33)
    assert (attend(q, k, v) - attend(q, k, v, causal)).abs().max() < 1e-12


@pytest.mark.parametrize("backend", ["banded", "documents"])
def test_masks_in_16_bits(backend):
    documents = random_documents(2, 200, mean=50)
    q, k, v = qkv(2, 200, torch.bfloat16, grad=False, width=16)
    exact = attend(q.double(), k.double(), v.double(), view(documents, Window(30), "dense"))
    prepared = view(documents, Window(30), backend, dtype=torch.bfloat16)
    assert (attend(q, k, v, prepared).double() - exact).abs().max() < 0.05


@pytest.mark.parametrize("window", WINDOWS)
def test_the_newest_token_against_the_cache_sees_what_it_sees_in_the_row(window):
    documents = random_documents(3, 60, mean=40)
    q, k, v = qkv(3, 60, grad=False)
    for ids in (documents, None):
        row = attend(q, k, v, view(ids, window, "dense", rows=3, tokens=60), 0.2)
        assert (attend_cached(q[:, -1:], k, v, ids, window, 0.2) - row[:, -1:]).abs().max() < 1e-12


def test_banded_looks_at_no_more_keys_when_the_row_grows():
    keys = [
        view(None, Window(100), "banded", rows=2, tokens=tokens).plan.mask.size(-1) for tokens in (512, 4096)
    ]
    assert keys[0] == keys[1] <= 100 + attention.block_width(99) + attention.UNIT


def test_a_promised_longest_document_narrows_banded_and_is_checked():
    documents = torch.arange(300).div(25, rounding_mode="floor")[None]
    q, k, v = qkv(1, 300, grad=False)
    short, free = (view(documents, CAUSAL, "banded", max_seqlen=n) for n in (25, None))
    assert short.plan.mask.numel() < free.plan.mask.numel() / 4
    assert (attend(q, k, v, short) - attend(q, k, v, free)).abs().max() < 1e-12
    with pytest.raises(ValueError, match="a document of 25 tokens where none should have more than 24"):
        view(documents, CAUSAL, "banded", max_seqlen=24)


def test_static_backends_compile_without_a_graph_break():
    documents = random_documents(2, 100)
    q, k, v = qkv(2, 100, grad=False)
    for backend in ("dense", "banded"):
        prepared = view(documents, Window(20), backend)
        compiled = torch.compile(attend, backend="eager", fullgraph=True, dynamic=False)
        assert (compiled(q, k, v, prepared) - attend(q, k, v, prepared)).abs().max() < 1e-12


# ----- FlexAttention

@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("mean", [3, 12, 60, None])
def test_flex_tiles_miss_no_visible_key_and_full_tiles_hide_none(window, mean, monkeypatch):
    monkeypatch.setattr(attention, "TILE", 8)
    tokens, n = 93, 12
    documents = None if mean is None else random_documents(2, tokens, mean=mean)
    some, full = attention.tile_kinds(documents, window, tokens, "cpu")
    ids = torch.zeros(1, tokens, dtype=torch.long) if documents is None else documents
    seen = torch.zeros(len(ids), n * 8, n * 8, dtype=torch.bool)
    seen[:, :tokens, :tokens] = seen_by("dense", ids, window)
    tiles = seen.view(len(ids), n, 8, n, 8)
    assert not (tiles.any(4).any(2) & ~some).any() and not (full & ~some).any()
    inside = (n - 1) * 8  # the last tile is cut off by the end of the row
    exact = tiles.all(4).all(2) & (torch.arange(n)[:, None] > torch.arange(n))
    assert torch.equal(full[:, :inside // 8], exact[:, :inside // 8])
    for kind in (some & ~full, full):
        number, order = attention.tile_list(kind)
        for row, i in np.ndindex(len(kind), n):
            kept = order[row, 0, i, :number[row, 0, i]].tolist()
            # the nearest first
            assert kept == sorted(kind[row, i].nonzero().flatten().tolist(), reverse=True)


def test_compiled_flex_heeds_the_tiles_equals_dense_and_compiles_once():
    """Forward only: FlexAttention has no backward on the CPU. Another window or other documents compile
    nothing."""
    torch._dynamo.reset()
    attention.compiled_flex.cache_clear()
    q, k, v = qkv(2, 300, torch.float32, grad=False, width=16)
    graphs = []
    for seed, window in ((0, Window(None, 1, 128)), (1, Window(None, 2, 128)), (2, Window(None, 1, 128))):
        documents = random_documents(2, 300, seed, mean=100)
        exact = attend(q, k, v, view(documents, window, "dense"))
        assert (attend(q, k, v, view(documents, window, "flex")) - exact).abs().max() < 1e-5
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] and attention.compiled_flex.cache_info().misses == 1
    torch._dynamo.reset()


# ----- FlashAttention

def flash(q, k, v, ends_q, ends_k, longest_q, longest_k, *, scale, window_size):
    """FlashAttention's documented meaning: sequences between the ends, left window W shows W + 1 keys, right
    0: causal."""
    left, right = window_size
    assert (
        right == 0 and ends_q.dtype == torch.int32 and torch.equal(ends_q, ends_k) and longest_q == longest_k
    )
    out = torch.full_like(q, math.nan)
    for start, end in zip(ends_q.tolist(), ends_q.tolist()[1:]):
        assert end - start <= longest_q
        t = torch.arange(end - start)
        seen = (t <= t[:, None]) & ((left < 0) | (t >= t[:, None] - left))
        if end > start:
            logits = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * scale
            out[start:end] = torch.einsum(
                "hqk,khd->qhd", logits.masked_fill(~seen, -math.inf).softmax(-1), v[start:end]
            )
    return out


@pytest.mark.parametrize("window", [CAUSAL, Window(1), Window(17), Window(1000)])
def test_varlen_hands_flash_attention_the_left_window_of_one_token_less(window, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "torch.nn.attention.varlen.varlen_attn",
        lambda *tensors, **options: calls.append(options["window_size"]) or flash(*tensors, **options),
    )
    q, k, v = qkv(3, 50, grad=False)
    for documents in (random_documents(3, 50, mean=20), None):
        prepared = view(documents, window, "varlen", rows=3, tokens=50)
        exact = attend(q, k, v, view(documents, window, "dense", rows=3, tokens=50), 0.3)
        assert (attend(q, k, v, prepared, 0.3) - exact).abs().max() < 1e-12
    assert set(calls) == {(window.tokens - 1 if window.tokens in (1, 17) else -1, 0)}


def dense_flash(q, k, v, ends_q, ends_k, longest_q, longest_k, causal, scale, window_size):
    """torch_attn::_varlen_attn in plain torch."""
    assert causal == (window_size == [-1, 0])
    out = flash(q, k, v, ends_q, ends_k, longest_q, longest_k, scale=scale, window_size=window_size)
    return out, out.new_zeros((q.size(1), q.size(0)), dtype=torch.float32), torch.zeros(2, dtype=torch.uint64)


def dense_flash_gradient(
    g, q, k, v, out, lse, ends_q, ends_k, longest_q, longest_k, causal, state, scale, window_size
):
    """torch_attn::_varlen_attn_backward, one (N, N) softmax P per head: dS = P (dP - rowsum(dP P))."""
    assert (
        causal == (window_size == [-1, 0]) and lse.shape == (q.size(1), q.size(0))
        and torch.equal(ends_q, ends_k)
    )
    document, t = torch.bucketize(torch.arange(len(q)), ends_q.long(), right=True), torch.arange(len(q))
    seen = (t <= t[:, None]) & (document == document[:, None])
    seen = seen & (t >= t[:, None] - window_size[0]) if window_size[0] >= 0 else seen
    p = torch.einsum("qhd,khd->hqk", q, k).mul(scale).masked_fill(~seen, -math.inf).softmax(-1)
    assert (torch.einsum("hqk,khd->qhd", p, v) - out).abs().max() < 1e-5
    dp = torch.einsum("qhd,khd->hqk", g, v)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
    grads = (
        torch.einsum("hqk,khd->qhd", ds, k), torch.einsum("hqk,qhd->khd", ds, q),
        torch.einsum("hqk,qhd->khd", p, g)
    )
    return tuple(torch.empty_like(x).copy_(grad) for x, grad in zip((q, k, v), grads))


def counted(graphs):
    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
    return backend


def test_compiled_varlen_is_one_graph_for_all_windows_and_scales_with_the_gradients_of_dense(monkeypatch):
    monkeypatch.setattr(attention, "torchs_varlen", lambda: (dense_flash, dense_flash_gradient))
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(
        lambda *args: attend(*args), backend=counted(graphs), fullgraph=True, dynamic=False
    )
    for seed, (window, scale) in enumerate(
        [(Window(17), 0.3), (Window(5), 0.3), (Window(1), 0.2), (CAUSAL, 0.1)]
    ):
        q, k, v = qkv(3, 50, seed=seed)
        documents = random_documents(3, 50, seed, mean=20)
        g = torch.randn_like(v)
        results = []
        (traced, inside), none = attention.traceable(
            [view(documents, window, "varlen", max_seqlen=50), None], scale, 4
        )
        assert none == (None, scale) and inside is None
        for y in (compiled(q, k, v, traced),
                  attend(q, k, v, view(documents, window, "dense"), scale)):
            results.append([y, *torch.autograd.grad(y, (q, k, v), g)])
        assert all((a - b).abs().max() < 1e-12 for a, b in zip(*results, strict=True))
    assert len(graphs) == 1
    for others in ([view(None, Window(5), "dense", rows=3, tokens=50), None], [None]):
        assert attention.traceable(others, 0.3, 4) == [(other, 0.3) for other in others]
    flash, dense = view(None, CAUSAL, "varlen", rows=3, tokens=50), view(None, CAUSAL, "dense")
    (traced, inside), other = attention.traceable([flash, dense], None, 4)
    assert traced.plan.window[1] == 0.5 and inside is None and other == (dense, None)
    assert traced.plan.sizes.tolist() == [50, 3]
    torch._dynamo.reset()


def test_a_compiled_model_with_growing_windows_and_yarn_is_one_graph_in_training_and_one_in_validation(
    monkeypatch,
):
    """Record 33: three windows, a wider one and another in the last layer at the end, the softmax scale
    follows."""
    monkeypatch.setattr(attention, "torchs_varlen", lambda: (dense_flash, dense_flash_gradient))
    monkeypatch.setattr(attention, "choose", lambda *args, **options: "varlen")
    torch._dynamo.reset()
    small = [
        "model.num_layers=3", "model.attn.drop_layers=[]", "model.mlp.drop_layers=[]",
        "model.attn.window.long_layers=[0, 2]"
    ]
    without = ["model.attn.value_embed", "model.residual.unet_skips"]
    s = deltas.resolve("short/33", scale="micro", sets=small, without=without).settings
    model, graphs, scales = GPT(s), [], set()
    model.initialise(0)
    model.prepare_compile()
    compiled = torch.compile(model, backend=counted(graphs), dynamic=False)
    tokens = torch.randint(1, 1200, (2, 96), generator=torch.Generator().manual_seed(0))
    tokens[:, ::40] = 0
    steps = [*{plan.shape.windows: plan.step for plan in schedule.plan(s)}.values()]
    for step in steps:
        model.update_yarn(schedule.windows(s, step))
        compiled(tokens, tokens, model.context(tokens, 0, schedule.windows(s, step))).mean().backward()
        scales.add(model.rotary_tables.scales[0])
    assert len(steps) == len(scales) == 3 and len(graphs) == 1
    with torch.no_grad():
        model.eval()
        tokens, read = tokens.view(1, 192), []  # longer than the last layer's window
        monkeypatch.setattr(
            attention, "torchs_varlen",
            lambda: (lambda *args: read.append(args[5]) or dense_flash(*args), None)
        )
        for step, final in [*((step, False) for step in steps), (s.schedule.steps, True)]:
            model.update_yarn(schedule.windows(s, step, final))
            context = model.context(tokens, 0, schedule.windows(s, step, final), max_seqlen=40 + step)
            assert len({int(view.plan.window[0]) for view, *_ in context.layers}) == (3 if final else 2)
            found = compiled(tokens, tokens, context)
        assert len(graphs) == 2 and set(read) == {40 + step for step in [*steps, s.schedule.steps]}
        model.compiled = False
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash)
        plain = model(tokens, tokens, model.context(tokens, 0, schedule.windows(s, s.schedule.steps, True)))
    assert (found - plain).abs().max() < 1e-5
    torch._dynamo.reset()


@pytest.mark.parametrize("max_seqlen", [None, 20])
def test_varlen_needs_no_count_of_the_documents_if_it_is_promised(max_seqlen):
    for seed in range(3):
        documents = random_documents(3, 50, seed)
        first = [
            r * 50 + t for r in range(3) for t in range(50)
            if t == 0 or documents[r, t] != documents[r, t - 1]
        ]
        counted, promised = (
            view(documents, CAUSAL, "varlen", max_seqlen=max_seqlen, max_docs=max_docs).plan
            for max_docs in (None, len(first) + 5)
        )
        for plan in (counted, promised):
            assert plan.cu_seqlens[: len(first)].tolist() == first and set(
                plan.cu_seqlens[len(first) :].tolist()
            ) == {150}
            assert plan.cu_seqlens.dtype == torch.int32 and plan.sizes[0] == (max_seqlen or 50)
            assert plan.sizes[1] == (len(first) if plan is counted else len(first) + 5)
        assert counted.cu_seqlens.shape == promised.cu_seqlens.shape
    rows = torch.arange(128).repeat_interleave(3)[None]  # as many as there is room for in steps of 128
    cu_seqlens = view(rows, CAUSAL, "varlen", max_docs=128).plan.cu_seqlens
    assert len(cu_seqlens) > 128 and cu_seqlens[126:129].tolist() == [378, 381, 384]
    with pytest.raises(ValueError, match="128 documents where no more than 127 were promised"):
        view(rows, CAUSAL, "varlen", max_docs=127)
    with pytest.raises(ValueError, match="a document of 50 tokens where none should have more than 49"):
        view(torch.zeros(1, 50, dtype=torch.int32), CAUSAL, "banded", max_seqlen=49)


def lengths_in(rows, bos):
    """Tokens of each document of rows (R, T), counted one by one."""
    found = []
    for row in rows.tolist():
        for t, token in enumerate(row):
            if t == 0 or token == bos:
                found.append(0)
            found[-1] += 1
    return found


@pytest.mark.parametrize("microbatch", [2, 8])
@pytest.mark.parametrize("ref", ["short/12", "short/14", "short/29", "short/33"])
def test_flash_attention_starts_blocks_for_the_documents_that_there_are(ref, microbatch, monkeypatch):
    """Its grid is documents times tiles of the longest: neither may come from the room that shapes leave."""
    s = deltas.resolve(ref, scale="micro").settings
    model, corpus, calls, texts = GPT(s), sample_corpus(), [], []
    model.initialise(0)
    monkeypatch.setattr(attention, "choose", lambda *args, **options: "varlen")
    monkeypatch.setattr(
        "torch.nn.attention.varlen.varlen_attn",
        lambda *tensors, **options: calls.append(tensors[3:]) or flash(*tensors, **options)
    )
    forward = model.forward
    model.forward = lambda x, y, context, **more: texts.append(x) or forward(x, y, context, **more)
    world = SimpleNamespace(total=lambda x: x, cuda=False, device=torch.device("cpu"), gather=lambda x: x)
    run = SimpleNamespace(s=s, world=world, model=model, compiled=model, optimizer=Optimizer(model, s),
                          hooks=[], workers=None, guards=None, ranks_per_microbatch=microbatch, corpus=corpus)
    batch = Stream(corpus, ranks=range(8), **stream_arguments(s)).next()
    plan = schedule.plan(s)[0]
    train_step(run, plan, *to_rows(batch, plan.shape.seq_len, world.device, corpus.bos))
    run.between_chunks = lambda: None
    run.rows = validation_rows(corpus, s.validation.tokens, s.validation.seq_len, range(2))
    validation_loss(run, 0)
    each = len(calls) // len(texts)  # layers with attention
    assert each > 8 and len(texts) > 8 // microbatch
    for i, (cu_seqlens, same, max_seqlen, _) in enumerate(calls):
        lengths = lengths_in(texts[i // each], corpus.bos)
        assert (
            len(cu_seqlens) == len(lengths) + 1 and torch.equal(cu_seqlens, same)
            and max_seqlen == max(lengths)
        )


def test_a_faster_backend_is_missed_only_where_an_installation_would_bring_it(monkeypatch):
    monkeypatch.setattr(
        attention, "serve",
        lambda backend: attention.Missing("is not installed") if backend == "flash3" else None
    )
    for capability, window, chosen, missed in (
        ((9, 0), Window(64), "varlen", {"attention backend flash3 is not installed"}),
        ((8, 0), Window(64), "varlen", set()),  # the device cannot
        # nor for such a window
        ((9, 0), Window(None, 3, 128), "flex", set()),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        passed = set()
        assert (
            choose(
                "auto", torch.device("cuda"), documents=True, window=window, tokens=512, dtype=torch.bfloat16,
                compiled=True, passed=passed
            )
            == chosen
        )
        assert passed == missed


def test_varlen_shapes_stay_as_documents_change():
    plans = [view(random_documents(2, 1000, seed, mean=20), CAUSAL, "varlen", max_seqlen=n).plan
             for seed in range(5) for n in (None, 400)]
    assert {len(p.cu_seqlens) for p in plans} == {128}
    assert {p.sizes[0] for p in plans[1::2]} == {400} and {p.sizes[0] for p in plans[::2]} == {1000}


# ----- choosing

def chosen(requested, device="cpu", documents=True, window=CAUSAL, tokens=512, **options):
    return choose(requested, device, documents=documents, window=window, tokens=tokens, **options)


def test_auto_on_the_cpu():
    assert chosen("auto", documents=False) == "dense"
    assert chosen("auto") == chosen("auto", window=Window(64)) == "documents"
    assert chosen("auto", window=Window(None, 2, 8)) == "banded"
    assert (
        chosen("auto", documents=False, window=Window(64)) == chosen("auto", window=Window(64), compiled=True)
        == "banded"
    )
    assert chosen("auto", documents=False, window=Window(500)) == chosen("auto", tokens=64) == "dense"


@pytest.mark.parametrize("requested, options, reason", [
    ("flash5", {}, "unknown attention backend 'flash5'; choose auto or one of dense"),
    ("flex", {}, "attention backend flex has no backward on cpu; use banded"),
    ("flex", {"device": "mps", "requires_grad": False}, "flex has no backward on mps"),
    ("varlen", {}, "varlen needs CUDA and the device is cpu"),
    ("flash3", {}, "flash3 needs CUDA and the device is cpu"),
    ("documents", {"compiled": True}, "shapes that depend on the data and cannot be compiled; use banded"),
    ("banded", {"window": Window(0)}, "tokens = 0; a query sees itself, so at least 1"),
    ("auto", {"window": Window(None, 0, 8)}, "blocks = 0; a query sees itself")])
def test_a_backend_that_cannot_is_refused_in_one_line(requested, options, reason):
    with pytest.raises(ValueError) as error:
        chosen(requested, **options)
    assert reason in str(error.value) and "\n" not in str(error.value)


HALF = {"device": "cuda", "dtype": torch.bfloat16}


def test_refusals_and_ladder_on_cuda(monkeypatch):
    capability = [9]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability[0], 0))
    attention.activation_failure.cache_clear()
    blocks = Window(None, 2, 128)
    # flash3 is not installed here
    assert chosen("auto", **HALF) == chosen("auto", window=Window(64), **HALF) == "varlen"
    assert chosen("varlen", window=Window(None, 4, 128), **HALF) == "varlen"  # hides nothing in 512 tokens
    assert chosen("auto", window=blocks, **HALF) == chosen("auto", device="cuda") == "flex"
    assert chosen("auto", documents=False, **HALF) == "dense"
    for requested, options, reason in (
        ("varlen", {**HALF, "window": blocks}, "cannot do a window of 2 blocks of 128 tokens; use flex"),
        ("flash3", {**HALF, "window": blocks}, "cannot do a window of 2 blocks of 128 tokens; use flex"),
        ("varlen", {"device": "cuda"}, "needs 16-bit numbers, not float32; use flex"),
        ("flash3", HALF, "flash3 cannot be activated in this torch"), ("flash4", HALF, "cannot be activated")
    ):
        with pytest.raises(ValueError, match=reason):
            chosen(requested, **options)
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    with pytest.raises(ValueError, match="needs torch 2.13, as its backward rejects windows before"):
        chosen("flash4", **HALF)
    capability[0] = 7
    with pytest.raises(ValueError, match="does not run on compute capability 7"):
        chosen("varlen", **HALF)
    assert chosen("auto", **HALF) == "flex"


def test_flash_implementations_are_activated_when_used_and_varlen_restores_torchs_own(monkeypatch):
    active = [None]
    monkeypatch.setattr("torch.nn.attention.current_flash_attention_impl", lambda: active[0])
    monkeypatch.setattr(
        "torch.nn.attention.activate_flash_attention_impl", lambda name: active.__setitem__(0, name)
    )
    monkeypatch.setattr(
        "torch.nn.attention.restore_flash_attention_impl", lambda: active.__setitem__(0, None)
    )
    attention.activation_failure.cache_clear()
    for backend, expected in (("flash3", "FA3"), ("varlen", None), ("flash4", "FA4"), ("flash3", "FA3")):
        view(None, CAUSAL, backend, rows=1, tokens=8)
        assert active[0] == expected
    attention.activation_failure.cache_clear()


def test_importing_attention_imports_neither_triton_nor_flex_attention():
    code = """
import sys, torch
before = set(sys.modules)
import kernels.attention
new = set(sys.modules) - before
print([name for name in new if "flex" in name or "triton" in name or "varlen" in name])
"""
    got = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert got.stdout.strip() == "[]", got.stderr
