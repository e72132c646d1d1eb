"""Generate text from a checkpoint, so that one sees what was trained.

    python sample.py runs/.../checkpoint.pt --prompt "The nation" --tokens 100 --temperature 0.8 --seed 1
"""

import argparse
import sys

from settings import UserError


def parser():
    p = argparse.ArgumentParser(prog="sample.py", description="Generate text from a checkpoint (KV cache).")
    p.add_argument("checkpoint")
    p.add_argument("--prompt", default="", help="text to continue (default: a new document)")
    p.add_argument("--tokens", type=int, default=100, help="tokens to generate")
    p.add_argument("--temperature", type=float, default=0.8, help="0: the most likely token")
    p.add_argument("--seed", type=int, default=0)
    return p


def load(path):
    """(model in eval mode, tokenizer name) of a checkpoint. Errors are one line."""
    import torch

    import deltas
    from model import GPT
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        s = deltas.replaced(deltas.from_plain(saved["settings"]), "system.attention", "auto")  # trained on another device
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


def generate(model, ids, count, *, vocab_size, bos, temperature, seed, cached=True):
    """Continue `ids` by `count` tokens. Returns the new ids.

    The context is the last validation.seq_len tokens, seen through the windows of the final validation; the cache is
    rebuilt from half of them whenever it is full, since positions may not pass the trained length. bos: the token that
    begins documents. Padding classes are never drawn.
    """
    import torch

    import schedule
    s = model.settings
    seq_len, windows = s.validation.seq_len, schedule.validation_windows(s, s.schedule.steps)
    generator = torch.Generator().manual_seed(seed)
    ids, layers = list(ids), len(model.blocks)
    cache, new, held = None, [], []
    with torch.no_grad():
        for _ in range(count):
            fresh = not held or len(held) >= seq_len or not cached
            if fresh:
                held = ids[-(seq_len if len(ids) < seq_len else max(1, seq_len // 2)):]
                cache = [[None, None] for _ in range(layers)]
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
    return new


def main(argv=None):
    options = parser().parse_args(argv)
    try:
        if options.tokens < 1 or options.temperature < 0:
            raise UserError("--tokens must be at least 1 and --temperature not negative")
        model, tokenizer = load(options.checkpoint)
        from data import tokenizer as tokenizers
        encoding = tokenizers.load(tokenizer)
        ids = [encoding.eot_token, *encoding.encode_ordinary(options.prompt)]
        new = generate(model, ids, options.tokens, vocab_size=encoding.n_vocab, bos=encoding.eot_token,
                       temperature=options.temperature, seed=options.seed)
        print(options.prompt + encoding.decode([t for t in new if t != encoding.eot_token]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
