"""Causal softmax attention with documents and windows: one call, several backends, one meaning.

    prepared = view(documents, window, backend)    once per forward, shared by the layers with this window
    y = attend(q, k, v, prepared)

Shapes: R rows, T tokens, H heads, K head width. A position is the index in the row; nothing joins across
rows. Query q sees key k of its row if and only if

    k <= q,  both in one document,  q - k < tokens (if given),  q // block - k // block < blocks (if given).

FlashAttention's left window W shows W + 1 keys, the query's own among them: that is tokens = W + 1.

Backends: `dense`, scaled_dot_product_attention with a mask (any device): the reference, to which all others
are equal. `banded`, blocks of queries against a slice of keys: the cost grows with the window, not with the
row; static shapes. `documents`, documents of about one length batched together, long ones banded: shapes
depend on the data, so never compiled. `flex`, FlexAttention (CUDA; it has no backward on the CPU). `varlen`,
the FlashAttention 2 inside torch (CUDA, 16-bit numbers, token windows). `flash3` and `flash4`, the same call
served by those packages (Dao et al., arXiv 2205.14135, 2307.08691; Shah et al., 2407.08608). Triton and
FlexAttention are imported when first used.
"""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BACKENDS = ("dense", "documents", "banded", "flex", "varlen", "flash3", "flash4")
# lengths are rounded up to a multiple of this: the CPU kernel runs up to 1.5 times as fast as on odd ones
UNIT = 16
TILE = 128  # edge of a FlexAttention tile


class Window(NamedTuple):
    """How far back a query sees; None: no limit. `blocks` of `block` tokens count the query's own."""
    tokens: int | None = None
    blocks: int | None = None
    block: int = 1


CAUSAL = Window()


class Missing(str):
    """Why a backend cannot run, where neither the device nor the window is the reason."""


class View(NamedTuple):
    """What `view` prepared: the backend and the tensors that it wants."""
    backend: str
    plan: Any


def visible(q: int | torch.Tensor, k: int | torch.Tensor, window: Window) -> bool | torch.Tensor:
    """Whether positions q see positions k (integers or integer tensors that broadcast), documents aside."""
    seen = k <= q
    if window.tokens is not None:
        seen = seen & (q - k < window.tokens)
    if window.blocks is not None:
        seen = seen & (q // window.block - k // window.block < window.blocks)
    return seen


def keys_seen(window: Window, tokens: int) -> float:
    """How many keys a query of a row of `tokens` sees on average, documents aside."""
    q = torch.arange(tokens)
    first = torch.zeros_like(q)  # key that each query sees
    if window.tokens is not None:
        first = torch.maximum(first, q - window.tokens + 1)
    if window.blocks is not None:
        first = torch.maximum(first, (q // window.block - window.blocks + 1) * window.block)
    return float((q - first + 1).double().mean())


def reach(window: Window, tokens: int) -> int:
    """How many tokens before itself a query can see at most, in a row of `tokens`."""
    far = tokens - 1
    if window.tokens is not None:
        far = min(far, window.tokens - 1)
    if window.blocks is not None:
        far = min(far, window.blocks * window.block - 1)
    return far


def binding(window: Window, tokens: int) -> Window:
    """The window without limits that hide nothing in a row of `tokens`.

    ValueError if a limit is below 1, because a query sees at least itself.
    """
    for name, value in window._asdict().items():
        if value is not None and value < 1:
            raise ValueError(f"attention window with {name} = {value}; a query sees itself, so at least 1")
    limit = window.tokens if window.tokens is not None and window.tokens < tokens else None
    if window.blocks is None or (tokens - 1) // window.block < window.blocks:
        return Window(limit)
    return window._replace(tokens=limit)


# ----- choosing a backend -----------------------------------------------------------------------------------

def choose(
    requested: str, device: torch.device | str, *, documents: bool, window: Window, tokens: int,
    requires_grad: bool = True, dtype: torch.dtype = torch.float32, compiled: bool = False,
    passed: set[str] | None = None
) -> str:
    """Name of the backend that runs: `requested` itself, or for `auto` the first of a ladder that can.

    documents: whether rows are cut into documents. tokens: T.
    compiled: whether attend is called inside torch.compile.
    passed: a set to which the faster backends that only need an installation are added.
    ValueError, one line, if the requested backend cannot run; no backend ever ignores a window or a document.
    """
    device, window = torch.device(device), binding(window, tokens)
    if requested != "auto" and requested not in BACKENDS:
        raise ValueError(
            f"unknown attention backend {requested!r}; choose auto or one of {', '.join(BACKENDS)}"
        )
    ladder = preferred(device, documents, window, tokens, compiled) if requested == "auto" else (requested,)
    for backend in ladder:
        why = refusal(backend, device, window, requires_grad, dtype, compiled)
        if why is None:
            return backend
        if passed is not None and isinstance(why, Missing):
            passed.add(f"attention backend {backend} {why}")
    raise ValueError(f"attention backend {backend} {why}")


def preferred(
    device: torch.device, documents: bool, window: Window, tokens: int, compiled: bool
) -> tuple[str, ...]:
    """Backends in the order in which `auto` takes them.

    Elsewhere than on CUDA it is one, by bench/attention.py on one CPU thread, where a row has hundreds of
    tokens: with documents, `documents` (its time hardly depends on the window) passes `banded` at a reach of
    about 40 tokens; without, `banded` passes `dense` where the window is about 3/4 of the row. Rows of up to
    64 tokens gain nothing from either.
    """
    if not documents and window == CAUSAL:
        return ("dense",)
    if device.type == "cuda":
        return "flash3", "varlen", "flex", "banded"
    far = reach(window, tokens)
    if tokens <= 64:
        return ("dense",)
    if documents and not compiled and far >= 40:
        return ("documents",)
    return ("dense",) if 4 * far >= 3 * tokens else ("banded",)


def refusal(
    backend: str, device: torch.device, window: Window, requires_grad: bool, dtype: torch.dtype,
    compiled: bool
) -> str | None:
    """Why this backend cannot do it (the rest of a sentence), or None."""
    if backend == "documents" and compiled:
        return "has shapes that depend on the data and cannot be compiled; use banded"
    if backend == "flex" and device.type != "cuda" and (device.type != "cpu" or requires_grad):
        return f"has no backward on {device.type}; use banded"
    if backend not in FLASH:
        return None
    if device.type != "cuda":
        return f"needs CUDA and the device is {device.type}; use banded"
    if window.blocks is not None:
        return f"cannot do a window of {window.blocks} blocks of {window.block} tokens; use flex"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"needs 16-bit numbers, not {str(dtype).removeprefix('torch.')}; use flex"
    major = torch.cuda.get_device_capability(device)[0]
    if not (major >= 8 if backend == "varlen" else major == 9 if backend == "flash3" else major in (9, 10)):
        return f"does not run on compute capability {major}; use flex"
    if backend == "flash4" and tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 13):
        return "needs torch 2.13, as its backward rejects windows before; use varlen"
    return serve(backend)


# ----- preparing and attending ------------------------------------------------------------------------------

def view(
    documents: torch.Tensor | None, window: Window, backend: str, *, rows: int = 1, tokens: int | None = None,
    device: torch.device | str | None = None, dtype: torch.dtype | None = None, max_seqlen: int | None = None,
    max_docs: int | None = None
) -> View:
    """Prepare attention for one forward pass, outside what is compiled.

    documents: (R, T) integer ids, not decreasing along T. None: every row is one document, and `rows`,
        `tokens` and `device` give its sizes and place.
    dtype: dtype of q, k and v, to convert masks once; None: SDPA converts them in every layer.
    max_seqlen, max_docs: upper bounds of a document's tokens and of the number of documents, known on the
        host, so that nothing waits for the GPU. Both are checked (ValueError, on CUDA an assertion of the
        device). `banded` looks back no further than max_seqlen. FlashAttention starts a block for each tile
        of max_seqlen in each of max_docs documents, even if empty. Without max_docs, varlen waits for the
        GPU.
    """
    if documents is not None:
        rows, tokens, device = *documents.shape, documents.device
    if backend in FLASH:
        why = serve(backend)
        if why is not None:
            raise ValueError(f"attention backend {backend} {why}")
    window = binding(window, tokens)
    if backend in FLASH:
        return View(backend, prepare_varlen(documents, window, rows, tokens, device, max_seqlen, max_docs))
    return View(backend, PREPARE[backend](documents, window, rows, tokens, device, dtype, max_seqlen))


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, view: View | None = None, scale: float | None = None
) -> torch.Tensor:
    """q, k: (R, T, H, K), v: (R, T, H, V), one dtype. Returns (R, T, H, V).

    view: from `view`; None: plain causal attention. scale: factor of the logits, default 1/sqrt(K).
    """
    if q.is_meta:
        if view is not None and view.backend in FLASH:
            q, k, v = (x.contiguous() for x in (q, k, v))
        return ShapesOnly.apply(q, k, v)
    if view is None:
        return attend_dense(q, k, v, None, scale)
    return ATTEND[view.backend](q, k, v, view.plan, scale)


class ShapesOnly(torch.autograd.Function):
    """Attention of tensors without values: it keeps for the backward pass what FlashAttention keeps."""

    @staticmethod
    def forward(ctx, q, k, v):
        y = v.new_empty(*q.shape[:3], v.size(-1))
        # the last: log-sum-exps
        ctx.save_for_backward(q, k, v, y, q.new_empty(q.shape[:3], dtype=torch.float32))
        return y

    @staticmethod
    def backward(ctx, g):
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def attend_cached(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor | None = None,
    window: Window = CAUSAL, scale: float | None = None
) -> torch.Tensor:
    """The newest token of each row against all cached ones, of which it is the last.

    q: (R, 1, H, K); k: (R, T, H, K), v: (R, T, H, V); documents: (R, T) ids or None. Returns (R, 1, H, V).
    """
    seen = visible_to_last(k.size(1), k.device, documents, window)
    return sdpa(q, k, v, None if seen is None else seen[:, None, None], scale)


def visible_to_last(
    tokens: int, device: torch.device | str | None, documents: torch.Tensor | None = None,
    window: Window = CAUSAL
) -> torch.Tensor | None:
    """Which of T tokens the last one sees: booleans (R or 1, T), or None where it sees all."""
    window, seen = binding(window, tokens), None
    if window != CAUSAL:
        seen = visible(tokens - 1, torch.arange(tokens, device=device), window)[None]
    if documents is not None:
        same = documents == documents[:, -1:]
        seen = same if seen is None else seen & same
    return seen


def sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None,
    causal: bool = False
) -> torch.Tensor:
    """scaled_dot_product_attention of (R, T, H, K) tensors."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale
    ).transpose(1, 2)


def additive(seen: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A boolean mask as what SDPA adds to the logits."""
    return (
        seen if dtype is None
        else torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)
    )


def round_up(n: int, unit: int) -> int:
    """The smallest multiple of `unit` that is at least n."""
    return -(-n // unit) * unit


def power_of_two(n: int) -> int:
    """The least one that is not below n."""
    return 1 << (n - 1).bit_length()


def begins_document(documents: torch.Tensor) -> torch.Tensor:
    """Which of the flattened (R T,) tokens is the first one of a document; a row starts a new one."""
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return first.flatten()


def document_starts(documents: torch.Tensor) -> torch.Tensor:
    """Index in the flattened (R T,) tokens of the first token of every document."""
    return begins_document(documents).nonzero().flatten()


def document_lengths(starts: torch.Tensor, total: int) -> torch.Tensor:
    """Tokens of each document (N,), from document_starts (N,) and the number of all tokens."""
    return torch.diff(starts, append=starts.new_tensor([total]))


def check_max_seqlen(documents: torch.Tensor, promised: int) -> None:
    """ValueError if a document (R, T) has more tokens than promised; on CUDA an assertion, without a sync."""
    tokens = documents.size(1)
    if promised >= tokens:
        return
    # two tokens that far apart in one document
    broken = (documents[:, promised:] == documents[:, :tokens - promised]).any()
    if documents.is_cuda:
        torch._assert_async(~broken)
    elif broken:
        max_seqlen = int(document_lengths(document_starts(documents), documents.numel()).max())
        raise ValueError(f"a document of {max_seqlen} tokens where none should have more than {promised}")


def check_max_docs(first: torch.Tensor, promised: int) -> int:
    """The promised number of documents, whose first tokens `first` (R T,) marks.

    ValueError if there are more documents, some of which would see each other; on CUDA an assertion, without
    a sync.
    """
    if first.is_cuda:
        torch._assert_async(first.sum() <= promised)
    elif int(first.sum()) > promised:
        raise ValueError(f"{int(first.sum())} documents where no more than {promised} were promised")
    return promised


# ----- dense ------------------------------------------------------------------------------------------------

def prepare_dense(
    documents: torch.Tensor | None, window: Window, rows: int, tokens: int, device: torch.device | str | None,
    dtype: torch.dtype | None, max_seqlen: int | None, origin: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Mask (R or 1, 1, T, T), or None for plain causal attention. origin: as in prepare_banded."""
    if documents is None and window == CAUSAL:
        return None
    t = torch.arange(tokens, device=device)[None]
    if origin is not None:
        t = t + origin[:, None]
    seen = visible(t[:, :, None], t[:, None], window)
    if documents is not None:
        seen = seen & (documents[:, :, None] == documents[:, None])
    return additive(seen, dtype)[:, None]


def attend_dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """Attention by SDPA, with the mask of prepare_dense."""
    return sdpa(q, k, v, mask, scale, causal=mask is None)


# ----- banded -----------------------------------------------------------------------------------------------

class Band(NamedTuple):
    """n blocks of B queries in each row, each against the S keys up to its end."""
    width: int  # B
    queries: torch.Tensor | None  # (R n B,) the token of each query; None where the blocks divide the row
    keys: torch.Tensor  # (R n S,) the token of each key
    mask: torch.Tensor  # (R n, 1, B, S)


def block_width(far: int) -> int:
    """B for queries that reach `far` back: about half of it.

    Wider blocks waste masked work; narrower ones copy keys more often.
    """
    return min(256, max(32, 1 << max(0, (far * 5 // 8).bit_length() - 1)))


def prepare_banded(
    documents: torch.Tensor | None, window: Window, rows: int, tokens: int, device: torch.device | str | None,
    dtype: torch.dtype | None, max_seqlen: int | None, origin: torch.Tensor | None = None
) -> Band:
    """The Band of these documents and this window.

    origin: (R,) position of the first token of each row, for block windows where rows are documents.
    """
    far = reach(window, tokens)
    if documents is not None and max_seqlen is not None:
        check_max_seqlen(documents, max_seqlen)
        far = min(far, max_seqlen - 1)
    width = min(block_width(far), round_up(tokens, UNIT))
    count, span = -(-tokens // width), round_up(width + far, UNIT)
    end = torch.arange(1, count + 1, device=device)[:, None, None] * width
    q = end - torch.arange(width, 0, -1, device=device)[:, None]  # (n, B, 1)
    k = end - torch.arange(span, 0, -1, device=device)  # (n, 1, S)
    first = 0 if origin is None else origin[:, None, None, None]
    seen = visible(first + q, first + k, window) & (k >= 0)  # (n, B, S), with origin (R, n, B, S)
    row = torch.arange(rows, device=device)[:, None, None, None] * tokens
    # what pads the last block repeats the last token
    queries, keys = (row + x.clamp(0, tokens - 1) for x in (q, k))
    if documents is not None:
        ids = documents.flatten()
        seen = seen & (ids[queries] == ids[keys])
    mask = additive(seen.expand(rows, count, width, span).reshape(rows * count, 1, width, span), dtype)
    return Band(width, None if count * width == tokens else queries.flatten(), keys.flatten(), mask)


def attend_banded(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, band: Band, scale: float | None
) -> torch.Tensor:
    """Attention by SDPA in blocks of queries, each with the slice of keys of its Band."""
    rows, tokens = q.shape[:2]
    blocks = band.mask.size(0)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    if band.queries is not None:
        q = q.index_select(0, band.queries)
    # 4 times as fast as x[keys]
    k, v = (x.index_select(0, band.keys).unflatten(0, (blocks, -1)) for x in (k, v))
    y = sdpa(q.unflatten(0, (blocks, band.width)), k, v, band.mask, scale)
    return y.reshape(rows, -1, *y.shape[2:])[:, :tokens]


# ----- documents --------------------------------------------------------------------------------------------

class Batch(NamedTuple):
    """`count` documents padded at the end to `length`; causality hides the padding from real queries."""
    count: int
    length: int
    view: View


class Pack(NamedTuple):
    """All documents sorted by padded length, in batches of one length each."""
    tokens: torch.Tensor  # (P,) the token in each of the P slots of all batches; in padding, any
    slots: torch.Tensor  # (R T,) the slot of each token
    batches: list


def prepare_documents(
    documents: torch.Tensor | None, window: Window, rows: int, tokens: int, device: torch.device | str | None,
    dtype: torch.dtype | None, max_seqlen: int | None
) -> Pack:
    """The Pack of the documents; None counts as one document per row."""
    if documents is None:
        documents = torch.zeros(rows, tokens, dtype=torch.int32, device=device)
    starts = document_starts(documents)
    lengths = document_lengths(starts, rows * tokens)
    # beyond 128, padding is at most an eighth
    unit = (2 ** (lengths.float().log2().floor() - 3)).long().clamp(min=UNIT)
    lengths_padded = -(-lengths // unit) * unit
    order = lengths_padded.argsort(stable=True)
    first = torch.empty_like(starts)  # slot of each document's first token
    first[order] = lengths_padded[order].cumsum(0) - lengths_padded[order]
    every = torch.arange(rows * tokens, device=device)
    slots = every + torch.repeat_interleave(first - starts, lengths)
    batches = []
    for length in lengths_padded.unique().tolist():
        origin = starts[lengths_padded == length] % tokens
        batches.append(Batch(len(origin), length, view_batch(window, origin, length, device, dtype)))
    return Pack(every.new_zeros(int(lengths_padded.sum())).index_copy_(0, slots, every), slots, batches)


def view_batch(
    window: Window, origin: torch.Tensor, length: int, device: torch.device | str | None,
    dtype: torch.dtype | None
) -> View:
    """View of documents as rows of `length`, which begin at positions `origin` (R,) of their rows."""
    rows = len(origin)
    if window.blocks is None:
        window, origin = binding(window, length), None
    else:  # a document can touch one block more than a row of its length that begins with a block
        window = binding(window, length + window.block - 1)
    far = reach(window, length)
    backend = "dense" if window == CAUSAL or length <= far + 2 * block_width(far) else "banded"
    return View(backend, PREPARE[backend](None, window, rows, length, device, dtype, None, origin))


def attend_documents(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pack: Pack, scale: float | None
) -> torch.Tensor:
    """Attention of each batch of a Pack by itself, put back in the tokens' order."""
    rows, tokens = q.shape[:2]
    sizes = [batch.count * batch.length for batch in pack.batches]
    q, k, v = (x.flatten(0, 1).index_select(0, pack.tokens).split(sizes) for x in (q, k, v))
    parts = []
    for batch, *qkv in zip(pack.batches, q, k, v):
        y = attend(*(x.unflatten(0, (batch.count, batch.length)) for x in qkv), batch.view, scale)
        parts.append(y.flatten(0, 1))
    return torch.cat(parts).index_select(0, pack.slots).unflatten(0, (rows, tokens))


# ----- FlexAttention ----------------------------------------------------------------------------------------

def prepare_flex(
    documents: torch.Tensor | None, window: Window, rows: int, tokens: int, device: torch.device | str | None,
    dtype: torch.dtype | None, max_seqlen: int | None
) -> "BlockMask":
    """Block mask from the first and last document of each tile: no (T, T) mask is ever made.

    The limits of the window are tensors, so that another window compiles nothing.
    """
    from torch.nn.attention.flex_attention import BlockMask

    limits = Window(
        *(None if n is None else torch.full((), n, device=device) for n in window[:2]), window.block
    )
    some, full = tile_kinds(documents, limits, tokens, device)

    def seen(row, head, q, k):
        ok = visible(q, k, limits)
        return ok if documents is None else ok & (documents[row, q] == documents[row, k])

    lists = [x for kind in (some & ~full, full) for x in tile_list(kind)]
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=TILE, mask_mod=seen, seq_lengths=(tokens, tokens))


def tile_kinds(
    documents: torch.Tensor | None, window: Window, tokens: int, device: torch.device | str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(some, full), each (R or 1, n, n), for tiles of queries and of keys.

    some: whether the queries may see any of the keys. full: whether they see all of them.
    """
    tile = torch.arange(-(-tokens // TILE), device=device)
    first, last = tile * TILE, (tile * TILE + TILE - 1).clamp(max=tokens - 1)
    q, k = tile[:, None], tile
    some = (k <= q) & visible(first[:, None], torch.minimum(last, first[:, None]), window)  # the nearest pair
    full = (k < q) & visible(last[:, None], first, window)  # the farthest pair
    if documents is None:
        return some[None], full[None]
    low, high = documents[:, first], documents[:, last]
    some = some & (low[:, :, None] <= high[:, None]) & (low[:, None] <= high[:, :, None])
    return some, full & (low[:, :, None] == high[:, None]) & (low[:, None] == high[:, :, None])


def tile_list(kind: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, n, n) booleans -> the key tiles of each query tile.

    Returns their number (R, 1, n) and their indices (R, 1, n, n), nearest first.
    """
    order = kind.flip(-1).to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return kind.sum(-1, dtype=torch.int32)[:, None], (kind.size(-1) - 1 - order).to(torch.int32)[:, None]


@functools.cache
def compiled_flex() -> Callable:
    """flex_attention compiled for static shapes, once per process."""
    from torch.nn.attention.flex_attention import flex_attention
    return torch.compile(flex_attention, dynamic=False)


def attend_flex(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_mask: "BlockMask", scale: float | None
) -> torch.Tensor:
    """Attention by FlexAttention with the block mask of prepare_flex."""
    from torch.nn.attention.flex_attention import flex_attention
    if not torch.compiler.is_compiling():  # run eagerly it would make all T x T logits and not heed the tiles
        flex_attention = compiled_flex()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flex_attention(q, k, v, block_mask=block_mask, scale=scale).transpose(1, 2)


# ----- FlashAttention ---------------------------------------------------------------------------------------

FLASH = {"varlen": None, "flash3": "FA3", "flash4": "FA4"}  # torch's name of the implementation


class Varlen(NamedTuple):
    """What FlashAttention reads: the documents' boundaries, their sizes and the window."""
    # (room,) int32 boundaries of the documents among the R T tokens, the last one repeated
    cu_seqlens: torch.Tensor
    # most tokens of a document, and number of documents; of `traceable` a CPU tensor (2,) int64
    sizes: tuple
    # FlashAttention's (left, right); of `traceable` CPU tensors (1,): left int64, softmax scale float64
    window: tuple


def prepare_varlen(
    documents: torch.Tensor | None, window: Window, rows: int, tokens: int, device: torch.device | str | None,
    max_seqlen: int | None, max_docs: int | None
) -> Varlen:
    """Boundaries of all documents, padded to a fixed length so that compiled shapes do not change.

    The length is enough for documents of 300 tokens on average, rounded up to a multiple of 128, as in record
    29. FlashAttention gets the boundaries of `max_docs` documents only.
    """
    total = rows * tokens
    if documents is None:
        first = (torch.arange(total, device=device) % tokens) == 0
        max_seqlen, max_docs = tokens, rows
    else:
        first, max_seqlen = begins_document(documents), min(tokens, max_seqlen or tokens)
    max_docs = int(first.sum()) if max_docs is None else check_max_docs(first, max_docs)
    room = max(-(-(total // 300 + 1) // 128) * 128, power_of_two(max_docs + 1))
    # the i-th document begins where i have begun
    number = torch.arange(1, room + 1, dtype=torch.int32, device=device)
    cu_seqlens = torch.searchsorted(first.cumsum(0, dtype=torch.int32), number, out_int32=True)
    return Varlen(cu_seqlens, (max_seqlen, max_docs), (-1 if window.tokens is None else window.tokens - 1, 0))


def boundaries(cu_seqlens: torch.Tensor, sizes: tuple[int, int] | torch.Tensor) -> tuple[torch.Tensor, int]:
    """(cu_seqlens (N + 1,), max_seqlen) for FlashAttention: its grid has as many documents as boundaries."""
    max_seqlen, max_docs = map(int, sizes)
    return cu_seqlens[:max_docs + 1], max_seqlen


def traceable(
    views: list[View | None], scale: float | None, width: int
) -> list[tuple[View | None, float | None]]:
    """[(view, softmax scale)] of the layers in a compiled forward, with FlashAttention's numbers as tensors.

    A Python number is a constant of a graph: three windows (with YaRN three scales) would give three graphs
    of the whole model, four in validation, and one for each number of documents. CPU tensors, which `varlen`
    reads on the host, are inputs of one graph. They have size (1,), because dynamo takes 0-d tensors for
    numbers at first and starts again. All layers share the document boundaries, and each has its own window
    tensor, so that a graph has the same inputs whichever layers have equal windows. Views of other backends,
    whose masks are tensors already, are returned as they are.

    width: K, for scale None.
    """
    plans = [view.plan for view in views if view is not None and view.backend in FLASH]
    if not plans:
        return [(view, scale) for view in views]
    cu_seqlens, sizes = plans[0].cu_seqlens, torch.tensor(plans[0].sizes)
    factor = torch.tensor([1 / math.sqrt(width) if scale is None else scale], dtype=torch.float64)

    def of_layer(view):
        if view is None or view.backend not in FLASH:
            return view, scale
        return View(
            view.backend, Varlen(cu_seqlens, sizes, (torch.tensor(view.plan.window[:1]), factor))
        ), None

    return [of_layer(view) for view in views]


def attend_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Varlen, scale: float | None
) -> torch.Tensor:
    """Attention by FlashAttention; narrower q, k or v are padded with zeros to one width."""
    from torch.nn.attention.varlen import varlen_attn
    rows, tokens, _, width = q.shape
    value = v.size(-1)
    widest = max(width, value)  # FlashAttention wants one width; what zeros add is cut off again

    def flat(x):
        x = x.flatten(0, 1)
        # Contiguous: as a view of q, k and v together, v would keep them all for the backward pass.
        return x.contiguous() if x.size(-1) == widest else F.pad(x, (0, widest - x.size(-1)))

    q, k, v = flat(q), flat(k), flat(v)
    if isinstance(plan.window[0], torch.Tensor):
        y = varlen_op(q, k, v, plan.cu_seqlens, plan.sizes, *plan.window)[0]
    else:
        scale = 1 / math.sqrt(width) if scale is None else scale
        cu_seqlens, max_seqlen = boundaries(plan.cu_seqlens, plan.sizes)
        y = varlen_attn(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=plan.window
        )
    return y.unflatten(0, (rows, tokens))[..., :value]


def torchs_varlen() -> tuple[Callable, Callable]:
    """The operators (forward, backward) behind torch.nn.attention.varlen.varlen_attn, as in 2.11 to 2.13."""
    import torch.nn.attention.varlen  # noqa: F401  (defines them)
    return torch.ops.torch_attn._varlen_attn, torch.ops.torch_attn._varlen_attn_backward


def varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, sizes: torch.Tensor,
    left: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y like q, log-sum-exp (H, N) float32, random state) of N tokens (N, H, K)."""
    left, (cu_seqlens, max_seqlen) = int(left), boundaries(cu_seqlens, sizes)
    return torchs_varlen()[0](
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, left < 0, float(scale), [left, 0]
    )


def varlen_gradient(
    g: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor,
    sizes: torch.Tensor, left: torch.Tensor, scale: torch.Tensor, y: torch.Tensor, lse: torch.Tensor,
    state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, from the gradient g of y and what the forward pass kept."""
    left, (cu_seqlens, max_seqlen) = int(left), boundaries(cu_seqlens, sizes)
    run = torchs_varlen()[1]
    return run(g, q, k, v, y, lse, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, left < 0, state,
               float(scale), [left, 0])


varlen_op = torch.library.custom_op(
    "speedrun::varlen", varlen, mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor sizes, Tensor left, Tensor scale) -> "
           "(Tensor, Tensor, Tensor)")
varlen_gradient_op = torch.library.custom_op(
    "speedrun::varlen_gradient", varlen_gradient, mutates_args=(),
    schema="(Tensor g, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor sizes, Tensor left, Tensor "
           "scale, Tensor y, Tensor lse, Tensor state) -> (Tensor, Tensor, Tensor)")


@varlen_op.register_fake
def varlen_shape(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, sizes: torch.Tensor,
    left: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shapes and dtypes of `varlen`, for torch.compile."""
    lse = q.new_empty((q.size(1), q.size(0)), dtype=torch.float32)
    return torch.empty_like(q), lse, q.new_empty(2, dtype=torch.uint64)


@varlen_gradient_op.register_fake
def varlen_gradient_shape(
    g: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shapes and dtypes of `varlen_gradient`, for torch.compile."""
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def varlen_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Keep for the backward pass all inputs and outputs of `varlen`."""
    ctx.save_for_backward(*inputs, *output)


def varlen_backward(ctx: Any, g: torch.Tensor, *_) -> tuple[torch.Tensor | None, ...]:
    """Gradients for all inputs of `varlen`: only q, k and v have one."""
    return *varlen_gradient_op(g, *ctx.saved_tensors), None, None, None, None


varlen_op.register_autograd(varlen_backward, setup_context=varlen_context)


def serve(backend: str) -> Missing | None:
    """Make torch's FlashAttention calls run this implementation from now on.

    Returns why that is impossible, or None.
    """
    from torch.nn import attention
    wanted, failed = FLASH[backend], activation_failure(FLASH[backend])
    if failed is None and attention.current_flash_attention_impl() != wanted:
        if wanted is None:
            attention.restore_flash_attention_impl()
        else:
            attention.activate_flash_attention_impl(wanted)
    return failed


@functools.cache
def activation_failure(implementation: str | None) -> Missing | None:
    """Why torch cannot activate it, or None. Tried once a process: it imports the package."""
    from torch.nn import attention
    if implementation is None:
        return None
    try:
        attention.activate_flash_attention_impl(implementation)
    except Exception as error:  # a missing package, a build for another torch, missing kernels
        reason = (str(error).splitlines() or ["no reason given"])[0]
        return Missing(f"cannot be activated in this torch ({type(error).__name__}: {reason}); use varlen")
    return None


PREPARE = {
    "dense": prepare_dense, "documents": prepare_documents, "banded": prepare_banded, "flex": prepare_flex
}
ATTEND = {"dense": attend_dense, "documents": attend_documents, "banded": attend_banded, "flex": attend_flex,
          "varlen": attend_varlen, "flash3": attend_varlen, "flash4": attend_varlen}
