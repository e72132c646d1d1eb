"""Generate text from a checkpoint, so that one sees what was trained.

    python sample.py runs/.../checkpoint.pt --prompt "The nation" --tokens 100 --temperature 0.8 --seed 1

The text goes to stdout; then what it cost goes to stderr, one line per form of the cache, the one that gave the text
first (variants/5 at scale micro, 200 tokens, one thread of a busy AMD EPYC):

    cache     tokens/s  bytes/token
    latent       200.4        1,152
    dense        201.5        4,608
    both caches give the same tokens

tokens/s: new tokens by the wall clock of one generation, which reads the prompt and refills a full cache too; two tokens
before it, untimed, wake the threads. bytes/token: what the cache holds for a token of the context, all layers together. A
model with model.attn.latent can keep latents (model.LatentAttention); then the same tokens are generated once more from keys
and values. Where it cannot, because something else is mixed into the values, a line says so.
"""

import environment  # first: refuses a Python that is too old

import argparse
import dataclasses
import sys
import time

from settings import System, UserError


def parser():
    p = argparse.ArgumentParser(prog="sample.py", description="Generate text from a checkpoint (KV cache).")
    p.add_argument("checkpoint")
    p.add_argument("--prompt", default="", help="text to continue (default: a new document)")
    p.add_argument("--tokens", type=int, default=100, help="tokens to generate")
    p.add_argument("--temperature", type=float, default=0.8, help="0: the most likely token")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--cache", choices=["auto", "dense", "latent"], default="auto",
                   help="what to keep of past tokens: keys and values, or latents; auto: latents where the model has them, "
                        "and then keys and values once more, to compare")
    return p


def load(path):
    """(model in eval mode, tokenizer name) of a checkpoint. Errors are one line."""
    import torch

    import deltas
    from model import GPT
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        s = deltas.from_plain(saved["settings"])
        s = dataclasses.replace(s, system=System())  # of the device it was trained on; precision lies in numerics
        model = GPT(s)
        model.initialise(0)  # fills the tables that a checkpoint does not hold
        model.load_state_dict(saved["model"])
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; train with --save to get one") from None
    except UserError:
        raise
    except Exception as error:  # torch.load raises many kinds for a file that is not a checkpoint
        raise UserError(f"{path}: not a checkpoint of this program ({type(error).__name__})") from None
    return model.eval(), saved["tokenizer"]


def generate(model, ids, count, *, vocab_size, bos, temperature, seed, cached=True, absorbed=None):
    """Continue `ids` by `count` tokens. Returns (new ids, cache at the end).

    The context is the last validation.seq_len tokens, seen through the windows of the final validation; the cache is
    rebuilt from half of them whenever it is full, since positions may not pass the trained length. bos: the token that
    begins documents. Padding classes are never drawn. absorbed: form of the cache (GPT.new_cache); cached=False: none (the
    cache that is returned is None), every token reads the whole context.
    """
    import torch

    import schedule
    s = model.settings
    seq_len, windows = s.validation.seq_len, schedule.validation_windows(s, s.schedule.steps)
    generator = torch.Generator().manual_seed(seed)
    cache, ids, new, held = None, list(ids), [], []
    with torch.no_grad():
        for _ in range(count):
            fresh = not held or len(held) >= seq_len or not cached
            if fresh:
                held = ids[-(seq_len if len(ids) < seq_len else max(1, seq_len // 2)):]
                cache = model.new_cache(absorbed) if cached else None
            else:
                held = held + ids[-1:]
            context = model.context(torch.tensor([held]), bos, windows, cached=not fresh)
            logits = model(torch.tensor([held if fresh else held[-1:]]), context=context, cache=cache)[0, -1]
            logits = logits[:vocab_size].float()
            if temperature == 0:
                token = int(logits.argmax())
            else:
                token = int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))
            ids.append(token)
            new.append(token)
    return new, cache


def bytes_per_token(cache):
    """What a cache of one row holds for each of its tokens, all layers together."""
    tensors = [x for layer in cache for x in layer if x is not None]
    return sum(x.numel() * x.element_size() for x in tensors) // tensors[0].size(1)  # every one has all the tokens


def forms(model, wanted):
    """([forms of the cache to generate with, the text's first], why there is no latent one though the model has latents)."""
    try:
        model.new_cache(absorbed=True)
    except ValueError as error:
        if wanted == "latent":
            raise UserError(f"--cache latent: {error}; use --cache dense") from None
        return ["dense"], "" if model.settings.model.attn.latent is None else str(error)
    return ["latent", "dense"] if wanted == "auto" else [wanted], ""


def timed(model, form, ids, count, **options):
    """(new ids, line of figures) of one generation with one form of the cache."""
    generate(model, ids, min(count, 2), absorbed=form == "latent", **options)
    start = time.perf_counter()
    new, cache = generate(model, ids, count, absorbed=form == "latent", **options)
    return new, f"{form:<8}{count / (time.perf_counter() - start):>10,.1f}{bytes_per_token(cache):>13,}"


def agreement(tokens, others):
    """One line: whether two forms of the cache gave the same tokens."""
    i = next((i for i, (a, b) in enumerate(zip(tokens, others)) if a != b), None)
    if i is None:
        return "both caches give the same tokens"
    return f"the caches give different tokens from number {i + 1} of {len(tokens)} on: they are equal up to rounding only"


def main(argv=None):
    options = parser().parse_args(argv)
    environment.require(*environment.TRAINING)
    try:
        if options.tokens < 1 or options.temperature < 0:
            raise UserError("--tokens must be at least 1 and --temperature not negative")
        model, tokenizer = load(options.checkpoint)
        from data import tokenizer as tokenizers
        encoding = tokenizers.load(tokenizer)
        ids = [encoding.eot_token, *encoding.encode_ordinary(options.prompt)]
        (first, *others), why_dense = forms(model, options.cache)
        asked = dict(vocab_size=encoding.n_vocab, bos=encoding.eot_token, temperature=options.temperature, seed=options.seed)
        new, line = timed(model, first, ids, options.tokens, **asked)
        print(options.prompt + encoding.decode([t for t in new if t != encoding.eot_token]), flush=True)
        lines = ["cache     tokens/s  bytes/token", line]
        for form in others:
            again, line = timed(model, form, ids, options.tokens, **asked)
            lines += [line, agreement(new, again)]
        lines += [f"dense only: {why_dense}"] if why_dense else []
        print(*lines, sep="\n", file=sys.stderr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
