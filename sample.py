"""Generate text from a checkpoint, so that one sees what was trained.

    python sample.py runs/.../checkpoint.pt --prompt "The nation" --tokens 100 --temperature 0.8 --seed 1
    python sample.py runs/.../checkpoint.pt --prompt-file story.txt --samples 3 --top-k 50 --top-p 0.95
    cat story.txt | python sample.py runs/.../checkpoint.pt --prompt-file - --stop

The text goes to stdout as it is generated; `<|endoftext|>` and a new line stand where a document ends (with
--stop the sample ends there). Sample i is drawn with seed --seed + i. Each token is drawn from softmax(logits
/ temperature), cut to the --top-k likeliest tokens and then to the fewest likeliest ones that hold --top-p of
what is left; the rest is drawn never.

What it cost goes to stderr, one line per form of the cache, the one that gave the text first (variants/5 at
scale micro, 200 tokens, one thread of a busy AMD EPYC):

    cache     tokens/s  bytes/token
    latent       200.4        1,152
    dense        201.5        4,608
    both caches give the same tokens

tokens/s: new tokens of the first sample by the wall clock, which reads the prompt, refills a full cache and
prints, too; two tokens before it, untimed, wake the threads. bytes/token: what the cache holds for a token of
the context, all layers together. A model with model.attn.latent can keep latents (model.LatentAttention);
then the same tokens are generated once more from keys and values. Where it cannot, because something else is
mixed into the values, a line says so. Exit codes: 0, 2 bad input, 130 interrupted.
"""

from common import environment  # first: refuses a Python that is too old

import argparse
import codecs
import dataclasses
import math
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import arguments, console
from common.errors import UserError
from settings.model import padded_vocab
from settings.system import System

if TYPE_CHECKING:
    import tiktoken
    import torch

    from layers.attention import Cache
    from model import GPT

END = "<|endoftext|>\n"  # how the end of a document is shown
GREEDY_BELOW = 1e-6  # a temperature below this one cannot be told from 0 in float32


def parser() -> arguments.Parser:
    """Options of sample.py."""
    p = arguments.Parser(prog="sample.py", description="Generate text from a checkpoint (KV cache).")
    p.add_argument("checkpoint",
                   help="checkpoint.pt of a run made with --save-checkpoint, or the run's folder")
    prompt = p.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", help="text to continue (default: a new document)")
    prompt.add_argument(
        "--prompt-file", metavar="FILE", help="read the prompt from a UTF-8 file, as it stands; -: from stdin"
    )
    p.add_argument(
        "--tokens", type=arguments.integer(1), default=100, metavar="N",
        help="tokens of each sample (default 100)"
    )
    p.add_argument(
        "--samples", type=arguments.integer(1), default=1, metavar="N",
        help="continue the prompt so many times (default 1)"
    )
    p.add_argument(
        "--temperature", type=arguments.temperature, default=0.8, metavar="T",
        help="0: the likeliest token (default 0.8)"
    )
    p.add_argument(
        "--top-k", type=arguments.integer(1), metavar="K",
        help="draw from the K likeliest tokens (default: all)"
    )
    p.add_argument(
        "--top-p", type=arguments.probability, metavar="P",
        help="draw from the fewest likeliest tokens that hold this share of the probability (default: all)"
    )
    p.add_argument(
        "--seed", type=arguments.first_seed, default=0, metavar="K", help="of the first sample (default 0)"
    )
    p.add_argument("--stop", action="store_true", help="end a sample where its document ends")
    p.add_argument("--cache", choices=["auto", "dense", "latent"], default="auto",
                   help="what to keep of past tokens: keys and values, or latents; auto: latents where the "
                        "model has them, and then keys and values once more, to compare")
    return p


# ----- what is read -----------------------------------------------------------------------------------------

def load(path: Path | str) -> tuple["GPT", str]:
    """(model in eval mode, tokenizer name) of a checkpoint file, or of a run's folder. Errors are one
    line."""
    import torch

    path = Path(path)
    if path.is_dir():
        if not (path / "checkpoint.pt").is_file():
            raise UserError(f"{path}: a folder without checkpoint.pt; train with --save-checkpoint to get "
                            "one")
        path = path / "checkpoint.pt"
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; train with --save-checkpoint to get one") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        with file:
            saved = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: not a checkpoint of this program: it is no data of torch, or holds more "
                        "than tensors and plain values, and such code is not run") from None
    except Exception as error:  # torch.load raises many kinds for a file that is torn or of another kind
        raise UserError(f"{path}: not a checkpoint of this program, or torn ({type(error).__name__}): train "
                        "again with --save-checkpoint") from None
    return build(saved, path)


def build(saved: Any, path: Path | str) -> tuple["GPT", str]:
    """(model, tokenizer name) of what a checkpoint holds."""
    import torch

    from model import GPT
    from settings import renames, schema

    lacking = (
        [k for k in ("model", "settings", "tokenizer") if k not in saved] if isinstance(saved, dict)
        else ["everything"]
    )
    if lacking:
        raise UserError(f"{path}: not a checkpoint of this program: it lacks {', '.join(lacking)}")
    try:
        s = schema.from_plain(saved["settings"])
        # of the device it was trained on; precision lies in numerics
        s = dataclasses.replace(s, system=System())
        model = GPT(s)
        model.initialise(0)  # fills the tables that a checkpoint does not hold
        model.load_state_dict(renames.present_parameters(saved["model"]))
        model.tied = False  # a checkpoint holds both tables (GPT.full_state_dict)
    except (UserError, RuntimeError, TypeError, AttributeError, KeyError, ValueError) as error:
        why = str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: written by another version of this program ({why}): sample with the code "
                        "that wrote it, named in the run's log") from None
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"{path}: {name} holds values that are not finite: the run diverged, there is "
                            "nothing to sample")
    return model.eval(), saved["tokenizer"]


def read_out(model: "GPT") -> list[str]:
    """A list with the line on averaged or extrapolated weights, which a checkpoint holds as read."""
    import schedule
    s = model.settings
    found = [one.setting for one in schedule.readouts(s, s.schedule.steps)]
    return [f"weights: read out by {', '.join(found)}"] if found else []


def read_prompt(options: argparse.Namespace) -> str:
    """The prompt as text, from the option, a file or stdin."""
    if options.prompt_file is None:
        return options.prompt
    try:
        if options.prompt_file == "-":
            return sys.stdin.buffer.read().decode("utf-8-sig") if sys.stdin else ""
        return Path(options.prompt_file).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"--prompt-file {options.prompt_file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt-file {options.prompt_file}: not UTF-8 text (byte {error.start})") from None


def prompt_ids(encoding: "tiktoken.Encoding", text: str) -> list[int]:
    """Token ids of a prompt, after the token that begins a document."""
    try:
        return [encoding.eot_token, *encoding.encode_ordinary(text)]
    except BaseException as error:  # tiktoken's panic on a run of a million spaces is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise UserError(
            "the prompt cannot be tokenised (a very long run of one kind of character?): shorten it"
        ) from None


# ----- drawing tokens ---------------------------------------------------------------------------------------

def allowed(logits: "torch.Tensor", top_k: int | None = None, top_p: float | None = None) -> "torch.Tensor":
    """Logits (V,) with -inf at the tokens that may not be drawn. At least the likeliest one stays.

    top_k: how many of the likeliest tokens stay. top_p: of those the fewest that together hold at least this
    probability.
    """
    ordered, order = logits.sort(descending=True, stable=True)  # (V,): the first of equal ones comes first
    keep = ordered.new_ones(len(ordered), dtype=bool)
    if top_k is not None:
        keep[top_k:] = False
    if top_p is not None and top_p < 1:
        p = ordered.masked_fill(~keep, -math.inf).double().softmax(0)
        keep &= p.cumsum(0) - p < top_p  # a token stays if those before it do not hold top_p yet
        keep[0] = True
    return logits.masked_fill(~keep[order.argsort()], -math.inf)


def draw(
    logits: "torch.Tensor", heat: float, top_k: int | None, top_p: float | None, generator: "torch.Generator"
) -> int:
    """One token of logits (V,)."""
    import torch
    if heat < GREEDY_BELOW:
        return int(logits.argmax())
    logits = logits / heat
    if top_k is not None or top_p is not None:
        logits = allowed(logits, top_k, top_p)
    return int(torch.multinomial(logits.softmax(0), 1, generator=generator))


class Generation:
    """Tokens that continue `ids`, by iteration. `cache` is that of the last token, None without one.

    The context is the last validation.seq_len tokens at first, seen through the windows of the final
    validation; when it has grown beyond that it begins anew with the last half, since positions may not pass
    the trained length. bos: the token that begins documents. Padding classes are never drawn. absorbed: form
    of the cache (GPT.new_cache); cached=False: none, every token reads the whole context.
    """

    def __init__(
        self, model: "GPT", ids: Sequence[int], count: int, *, vocab_size: int, bos: int, temperature: float,
        seed: int, top_k: int | None = None, top_p: float | None = None, stop: bool = False,
        cached: bool = True, absorbed: bool | None = None
    ) -> None:
        self.model, self.ids, self.count, self.vocab_size, self.bos = model, list(ids), count, vocab_size, bos
        self.temperature, self.seed, self.top_k, self.top_p, self.stop = temperature, seed, top_k, top_p, stop
        self.cached, self.absorbed, self.cache = cached, absorbed, None

    def __iter__(self) -> Iterator[int]:
        import torch

        import schedule
        s = self.model.settings
        seq_len, windows = s.validation.seq_len, schedule.validation_windows(s, s.schedule.steps)
        generator = torch.Generator().manual_seed(self.seed)
        self.model.update_yarn(windows)
        # first: index where the context begins
        ids, fresh, first = self.ids, True, max(0, len(self.ids) - seq_len)
        for _ in range(self.count):
            if len(ids) - first > seq_len:
                fresh, first = True, len(ids) - max(1, seq_len // 2)
            if fresh and self.cached:
                self.cache = self.model.new_cache(self.absorbed)
            read = ids[first:] if fresh or not self.cached else ids[-1:]
            with torch.no_grad():
                context = self.model.context(
                    torch.tensor([ids[first:]]), self.bos, windows, cached=self.cached and not fresh
                )
                logits = self.model(torch.tensor([read]), context=context, cache=self.cache)[0, -1]
            token = draw(
                logits[: self.vocab_size].float(), self.temperature, self.top_k, self.top_p, generator
            )
            fresh = False
            ids.append(token)
            yield token
            if self.stop and token == self.bos:
                return


def generate(model: "GPT", ids: Sequence[int], count: int, **options) -> tuple[list[int], "Cache | None"]:
    """(new ids, cache at the end) of a whole Generation."""
    made = Generation(model, ids, count, **options)
    return list(made), made.cache


# ----- what is shown ----------------------------------------------------------------------------------------

class Writer:
    """Prints tokens as text. A character whose bytes come in several tokens is printed when it is whole."""

    def __init__(self, encoding: "tiktoken.Encoding") -> None:
        self.encoding, self.decoder = encoding, codecs.getincrementaldecoder("utf-8")(errors="replace")

    def text(self, token: int) -> str:
        if token == self.encoding.eot_token:
            return self.decoder.decode(b"", final=True) + END
        return self.decoder.decode(self.encoding.decode_single_token_bytes(token))

    def write(self, token: int) -> None:
        print(self.text(token), end="", flush=True)

    def close(self) -> None:
        print(self.decoder.decode(b"", final=True), flush=True)


def bytes_per_token(cache: "Cache") -> int:
    """What a cache of one row holds for each of its tokens, all layers together."""
    tensors = [x for layer in cache for x in layer if x is not None]
    # every one has all the tokens
    return sum(x.numel() * x.element_size() for x in tensors) // tensors[0].size(1)


def forms(model: "GPT", wanted: str) -> tuple[list[str], str]:
    """([forms of the cache to generate with, the text's first], why there is no latent one though the model
    has latents)."""
    try:
        model.new_cache(absorbed=True)
    except ValueError as error:
        if wanted == "latent":
            raise UserError(f"--cache latent: {error}; use --cache dense") from None
        return ["dense"], "" if model.settings.model.attn.latent is None else str(error)
    return ["latent", "dense"] if wanted == "auto" else [wanted], ""


def timed(
    model: "GPT", form: str, ids: Sequence[int], count: int, show: Callable[[int], None] = lambda token: None,
    **options
) -> tuple[list[int], str]:
    """(new ids, line of figures) of one generation with one form of the cache. show: called with each
    token."""
    generate(model, ids, min(count, 2), absorbed=form == "latent", **options)
    made, new = Generation(model, ids, count, absorbed=form == "latent", **options), []
    start = time.perf_counter()
    for token in made:
        new.append(token)
        show(token)
    return (
        new,
        f"{form:<8}{len(new) / (time.perf_counter() - start):>10,.1f}{bytes_per_token(made.cache):>13,}",
    )


def agreement(tokens: Sequence[int], others: Sequence[int]) -> str:
    """One line: whether two forms of the cache gave the same tokens."""
    i = next((i for i, (a, b) in enumerate(zip(tokens, others)) if a != b), None)
    if i is None:
        return "both caches give the same tokens"
    return (
        f"the caches give different tokens from number {i + 1} of {len(tokens)} on: they are equal up to "
        "rounding only"
    )


def show_samples(
    options: argparse.Namespace, model: "GPT", encoding: "tiktoken.Encoding", form: str, ids: Sequence[int],
    text: str, asked: dict
) -> tuple[list[int], str]:
    """Print all samples as they are generated. Returns (ids, figures) of the first."""
    first = None
    for i in range(options.samples):
        if options.samples > 1:
            print(f"----- sample {i + 1} of {options.samples}, seed {options.seed + i}")
        print(text, end="", flush=True)
        writer = Writer(encoding)
        if first is None:
            first = timed(model, form, ids, options.tokens, writer.write, seed=options.seed, **asked)
        else:
            for token in Generation(
                model, ids, options.tokens, absorbed=form == "latent", seed=options.seed + i, **asked
            ):
                writer.write(token)
        writer.close()
    return first


def sample(options: argparse.Namespace) -> None:
    """The whole program behind the command line."""
    from data import tokenizer as tokenizers
    text = read_prompt(options)
    model, name = load(options.checkpoint)
    encoding = tokenizers.load(name)
    if encoding.n_vocab > padded_vocab(model.settings):
        raise UserError(
            f"{options.checkpoint}: the tokenizer {name} has {encoding.n_vocab} tokens, the model "
            f"{padded_vocab(model.settings)}: it was trained on other tokens and has no text"
        )
    ids, most = prompt_ids(encoding, text), model.settings.validation.seq_len
    lines = read_out(model)
    if len(ids) - 1 > most:
        lines.append(f"prompt: {len(ids) - 1} tokens, the model sees the last {most}, its context")
    (first, *others), why_dense = forms(model, options.cache)
    asked = dict(
        vocab_size=encoding.n_vocab, bos=encoding.eot_token, temperature=options.temperature,
        top_k=options.top_k, top_p=options.top_p, stop=options.stop
    )
    for line in lines:
        print(line, file=sys.stderr)
    new, line = show_samples(options, model, encoding, first, ids, text, asked)
    lines = ["cache     tokens/s  bytes/token", line]
    for form in others:
        again, line = timed(model, form, ids, options.tokens, seed=options.seed, **asked)
        lines += [line, agreement(new, again)]
    lines += [f"dense only: {why_dense}"] if why_dense else []
    print(*lines, sep="\n", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    """The command line of sample.py."""
    console.guard()
    options = parser().parse_args(argv)
    environment.require(*environment.TRAINING)
    try:
        sample(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    console.program(main, product=True)
