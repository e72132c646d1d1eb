"""Attention with windows: `python bench/attention.py [--out JSON]`.

The time should grow with the window, not with the row.

Forward and backward of one layer of 6 heads of 12 channels (tiny's), float32, by row length, window and
backend, on the CPU; without documents, and with documents as the corpus has them. Minimum over repeats.
"""

import measure
import torch
from report import Report

from common import arguments, console
from data.corpus import sample_corpus
from data.shards import open_shard
from kernels import attention
from kernels.attention import Window

HEADS, WIDTH = 6, 12
LENGTHS, WINDOWS, TOKENS = (512, 1024, 2048, 4096), (16, 64, 256, 1024), 4096


def documents_of_corpus(rows: int, tokens: int) -> torch.Tensor:
    """(rows, tokens) document ids of the first training tokens."""
    corpus = sample_corpus()
    ids = torch.from_numpy(open_shard(corpus.train[0])[:rows * tokens].astype("int64")).view(rows, tokens)
    return (ids == corpus.bos).cumsum(1, dtype=torch.int32)


def one(
    documents: torch.Tensor | None, window: Window, backend: str, rows: int, tokens: int, repeats: int
) -> float:
    """Milliseconds of view, forward and backward."""
    q, k, v = (torch.randn(rows, tokens, HEADS, WIDTH, requires_grad=True) for _ in range(3))

    def step():
        view = attention.view(documents, window, backend, rows=rows, tokens=tokens, device="cpu",
                              dtype=torch.float32)
        attention.attend(q, k, v, view).square().mean().backward()

    return 1000 * measure.best(step, repeats)[1]


def main() -> None:
    """Time every backend on rows of each length and print one table."""
    p = arguments.Parser(prog="bench/attention.py", description=__doc__.partition("\n\n")[0])
    p.add_argument("--repeats", type=arguments.integer(1, 10 ** 6), default=5,
                   help="timings of each (default 5)")
    p.add_argument("--out", metavar="JSON", help="also write the figures here")
    o = p.parse_args()
    torch.manual_seed(0)
    report = Report(o.out, "Attention with windows", tokens=TOKENS, heads=HEADS, head_dim=WIDTH)
    columns = "".join(f"{f'window {w}':>13}" for w in WINDOWS)
    print(f"{'documents':10} {'backend':10} {'row':>5}  {columns}   ms, {TOKENS} tokens in all, "
          f"{torch.get_num_threads()} threads")
    for with_documents in (False, True):
        for backend in ("dense", "banded", *(("documents",) if with_documents else ())):
            for tokens in LENGTHS:
                n = TOKENS // tokens
                documents = documents_of_corpus(n, tokens) if with_documents else None
                times = [one(documents, Window(tokens=w), backend, n, tokens, o.repeats) for w in WINDOWS]
                for w, ms in zip(WINDOWS, times):
                    report.add({"documents": with_documents, "backend": backend, "row": tokens, "window": w,
                                "ms": round(ms, 3)})
                print(f"{'of corpus' if with_documents else 'none':10} {backend:10} {tokens:5}  "
                      + "".join(f"{ms:13.1f}" for ms in times), flush=True)
    report.finish()


if __name__ == "__main__":
    console.program(main)
