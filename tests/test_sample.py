"""Laws of sample.py: what is drawn, what the model sees of a prompt, what is printed while it is generated,
and bad checkpoints."""

import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sample
from data import tokenizer
from model import GPT
from settings import deltas, schema

ROOT = Path(__file__).parent.parent
CONTEXT = 64
BOS = 1256


@pytest.fixture(scope="module")
def model():
    """Record 11 at micro with a context of 64 tokens and random weights."""
    s = deltas.resolve(
        "short/11", scale="micro", sets=[f"validation.seq_len={CONTEXT}", "validation.tokens=512"]
    ).settings
    made = GPT(s)
    made.initialise(0)
    for p in made.parameters():
        p.data += 0.05 * torch.randn(
            p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype
        )
    return made.eval()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("sample") / "checkpoint.pt"
    torch.save(
        {"model": model.full_state_dict(), "settings": schema.plain(model.settings),
         "tokenizer": "sample"}, path
    )
    return path


def text(capsys, *args):
    """(stdout, stderr) of sample.py in this process."""
    sample.main([str(x) for x in args])
    return capsys.readouterr()


# ----- drawing ----------------------------------------------------------------------------------------------

def brute_force(logits, top_k, top_p):
    """Indices that may be drawn, by definition: the shortest head of the sorted list that holds top_p of the
    first top_k."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top_k]
    p = torch.tensor([logits[i] for i in order], dtype=torch.float64).softmax(0).tolist()
    kept, mass = [], 0.0
    for i, share in zip(order, p):
        if kept and mass >= top_p:
            break
        kept.append(i)
        mass += share
    return set(kept)


@pytest.mark.parametrize("top_k", [1, 2, 7, 40, 1000])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.5, 0.95, 1.0])
def test_top_k_and_top_p_keep_what_their_definition_says(top_k, top_p):
    generator = torch.Generator().manual_seed(top_k)
    for case in range(20):
        logits = 3 * torch.randn(50, generator=generator)
        if case % 4 == 0:
            logits = logits.round()  # ties
        if case % 5 == 0:
            logits[:] = logits[0]  # all equal
        kept = {i for i, x in enumerate(sample.allowed(logits, top_k, top_p)) if x > -torch.inf}
        assert kept == brute_force(logits.tolist(), top_k, top_p)


def test_drawn_tokens_have_the_shares_of_what_is_kept():
    logits, generator = torch.tensor([2.0, 1.0, 0.0, -1.0]), torch.Generator().manual_seed(0)
    drawn = [sample.draw(logits, 0.7, 3, 0.9, generator) for _ in range(4000)]
    p = (logits[:2] / 0.7).softmax(0)  # these two hold 0.97 of the first three
    assert set(drawn) == {0, 1} and abs(drawn.count(0) / 4000 - float(p[0])) < 0.03


def tokens(model, count=20, **options):
    asked = dict(vocab_size=BOS + 1, bos=BOS, temperature=0.8, seed=3) | options
    return sample.generate(model, [BOS, 5, 9], count, **asked)[0]


def test_one_likeliest_token_is_greedy_and_a_seed_gives_one_text(model):
    greedy = tokens(model, temperature=0)
    assert tokens(model, top_k=1) == tokens(model, top_p=1e-12) == tokens(model, temperature=1e-300) == greedy
    assert tokens(model) == tokens(model) != tokens(model, seed=4)
    assert tokens(model, top_k=10 ** 9, top_p=1.0) == tokens(model)  # nothing is cut


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.5}, {"temperature": 0}])
def test_the_cache_changes_no_token_over_several_contexts(model, options):
    assert tokens(model, 150, **options) == tokens(model, 150, cached=False, **options)


# ----- what the model sees ----------------------------------------------------------------------------------

def seen(model, length, count=3):
    """Tokens that each forward pass read of a prompt, and contexts that each had, as (tokens read, context
    length)."""
    sizes, contexts = [], []

    class Watched:
        settings, new_cache, update_yarn = model.settings, model.new_cache, model.update_yarn

        def context(self, tokens, *args, **kwargs):
            contexts.append(tokens[0].tolist())
            return model.context(tokens, *args, **kwargs)

        def __call__(self, tokens, **kwargs):
            sizes.append(tokens.size(1))
            return model(tokens, **kwargs)

    ids = list(range(length))
    sample.generate(Watched(), ids, count, vocab_size=BOS + 1, bos=BOS, temperature=0, seed=0)
    return sizes, contexts, ids


@pytest.mark.parametrize("length", [1, CONTEXT - 1, CONTEXT, CONTEXT + 1, 5 * CONTEXT])
def test_a_prompt_keeps_as_much_as_the_context_holds(model, length):
    sizes, contexts, ids = seen(model, length)
    assert contexts[0] == ids[-CONTEXT:] and sizes[0] == min(length, CONTEXT)
    assert max(map(len, contexts)) <= CONTEXT
    if length >= CONTEXT:
        assert len(contexts[1]) == CONTEXT // 2  # full: the context begins anew with its last half
    else:
        assert contexts[1][:length] == ids and sizes[1] == 1


def test_a_longer_prompt_is_said_and_one_of_the_context_is_not(saved, capsys):
    encoding = tokenizer.load("sample")
    word = next(w for w in (" the", " of", " and") if len(encoding.encode_ordinary(w * 2)) == 2)
    short, long = (
        text(capsys, saved, "--prompt", word * n, "--tokens", 2).err for n in (CONTEXT, CONTEXT + 1)
    )
    assert "prompt:" not in short
    assert (
        long.splitlines()[0]
        == f"prompt: {CONTEXT + 1} tokens, the model sees the last {CONTEXT}, its context"
    )


# ----- what is printed --------------------------------------------------------------------------------------

def test_text_comes_character_by_whole_character_and_documents_end_visibly():
    encoding = tokenizer.load("sample")
    words = "Grüße, 世界 🙂!"
    ids = [encoding.encode_single_token(bytes([b])) for b in words.encode()]  # a token for each byte
    writer = sample.Writer(encoding)
    parts = [writer.text(t) for t in ids]
    assert "".join(parts) == words and "\ufffd" not in "".join(parts)
    assert parts[words.encode().index("世".encode())] == ""  # waits for the other two bytes
    cut = sample.Writer(encoding)
    assert cut.text(encoding.encode_single_token("世".encode()[:1])) == ""
    # a character that never came is shown as such
    assert cut.text(encoding.eot_token) == "\ufffd<|endoftext|>\n"


def test_tokens_are_shown_one_by_one(model, capsys):
    """Each token's text is on stdout before the next token is computed."""
    encoding, lengths = tokenizer.load("sample"), []
    writer, new = sample.Writer(encoding), []
    for token in sample.Generation(model, [BOS], 12, vocab_size=BOS, bos=BOS, temperature=0.8, seed=1):
        writer.write(token)
        new.append(token)
        lengths.append(len(capsys.readouterr().out))
    assert sum(lengths) >= len(encoding.decode(new)) - 2 and sum(n > 0 for n in lengths) > 6


def test_samples_have_seeds_of_their_own_and_each_can_be_had_alone(saved, capsys):
    both = text(capsys, saved, "--prompt", "The", "--tokens", 12, "--samples", 2, "--seed", 7).out
    alone = text(capsys, saved, "--prompt", "The", "--tokens", 12, "--seed", 8).out
    first, second = both.split("----- sample ")[1:]
    assert (
        first.startswith("1 of 2, seed 7\nThe") and second == "2 of 2, seed 8\n" + alone
        and first.split("\n", 1)[1] != alone
    )


def test_a_prompt_comes_from_a_file_or_stdin_as_it_stands(saved, capsys, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_bytes("\ufeffThe people \nof".encode())
    want = text(capsys, saved, "--prompt", "The people \nof", "--tokens", 5).out
    assert text(capsys, saved, "--prompt-file", tmp_path / "p.txt", "--tokens", 5).out == want
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"The people \nof")))
    assert text(capsys, saved, "--prompt-file", "-", "--tokens", 5).out == want


def test_stop_ends_a_sample_with_its_document(saved, capsys, monkeypatch):
    letters = [tokenizer.load("sample").encode_single_token(c) for c in "abcd"]
    drawn = [*letters[:2], BOS, *letters[2:]]

    def scripted():
        """Every Generation draws the same five tokens."""
        made = iter(())

        def draw(*args):
            nonlocal made
            try:
                return next(made)
            except StopIteration:
                made = iter(drawn)
                return next(made)
        return draw

    monkeypatch.setattr(sample, "generate", lambda *args, **options: None)  # the untimed tokens
    monkeypatch.setattr(sample, "draw", scripted())
    assert text(capsys, saved, "--tokens", 5).out == "ab<|endoftext|>\ncd\n"  # the next document goes on
    drawn = drawn[:3]
    monkeypatch.setattr(sample, "draw", scripted())
    assert text(capsys, saved, "--tokens", 5, "--stop", "--samples", 2).out.count("ab<|endoftext|>\n") == 2


# ----- bad input --------------------------------------------------------------------------------------------

def broken(kind, saved, folder):
    """Path of a checkpoint that is wrong in one way."""
    path, whole = folder / "checkpoint.pt", torch.load(saved, weights_only=True)
    if kind == "torn":
        path.write_bytes(saved.read_bytes()[:20_000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("The nation\n")
    elif kind == "folder":
        return folder
    elif kind == "code":
        torch.save({"model": sample.Writer(None)}, path)
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "tensor":
        torch.save(torch.zeros(2), path)
    elif kind == "no settings":
        torch.save({"model": whole["model"]}, path)
    elif kind == "other settings":
        torch.save({**whole, "settings": {**whole["settings"], "later": {}}}, path)
    elif kind == "settings of another type":
        torch.save({**whole, "settings": 3}, path)
    elif kind == "fewer weights":
        torch.save({**whole, "model": dict(list(whole["model"].items())[1:])}, path)
    elif kind == "other shapes":
        torch.save({**whole, "model": {k: v[:1] for k, v in whole["model"].items()}}, path)
    elif kind == "diverged":
        torch.save({**whole, "model": {k: v * float("nan") for k, v in whole["model"].items()}}, path)
    elif kind == "tokenizer":
        torch.save({**whole, "tokenizer": "other"}, path)
    elif kind == "large tokenizer":
        torch.save({**whole, "tokenizer": "gpt2"}, path)
    return path


@pytest.mark.parametrize(
    "kind, message",
    [
        ("missing", "no such checkpoint"), ("torn", "not a checkpoint of this program, or torn"),
        ("empty", "not a checkpoint"), ("text", "not a checkpoint"),
        ("folder", "a folder without checkpoint.pt"), ("code", "such code is not run"),
        ("list", "lacks everything"), ("tensor", "lacks everything"),
        ("no settings", "lacks settings, tokenizer"), ("other settings", "another version"),
        ("settings of another type", "another version"), ("fewer weights", "another version"),
        ("other shapes", "another version"), ("diverged", "not finite"),
        ("tokenizer", "unknown tokenizer 'other'"), ("large tokenizer", "has 50257 tokens, the model")
    ],
)
def test_a_bad_checkpoint_is_one_line(kind, message, saved, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        sample.main([str(broken(kind, saved, tmp_path))])
    got = capsys.readouterr()
    assert stopped.value.code == 2 and got.out == "" and got.err.count("\n") == 1, got.err
    assert got.err.startswith("error: ") and message in got.err


def test_a_run_s_folder_stands_for_its_checkpoint(saved, capsys):
    assert text(capsys, saved.parent, "--tokens", 3).out == text(capsys, saved, "--tokens", 3).out


@pytest.mark.parametrize(
    "args, message",
    [
        (["--temperature", "nan"], "number"), (["--temperature", "inf"], "number"),
        (["--temperature", "-1"], "0 or a number from 0.001 to 1000"), (["--temperature", "1e999"], "number"),
        (["--top-k", "0"], "from 1"), (["--top-k", "1.5"], "whole number"), (["--top-p", "0"], "above 0"),
        (["--top-p", "1.01"], "at most 1"), (["--top-p", "nan"], "number"), (["--tokens", "0"], "from 1"),
        (["--samples", "-2"], "from 1"), (["--seed", "-1"], "from 0"), (["--seed", str(2**63)], "from 0"),
        (["--seed", str(2**63 - 1)], "from 0"), (["--prompt", "a", "--prompt-file", "b"], "not allowed with"),
        (["--prompt-file", "/no/such"], "No such file"), (["--prompt-file", "/"], "directory"),
        (["--prompt-file", "LATIN"], "not UTF-8 text (byte 1)")
    ],
)
def test_bad_arguments_are_one_line(args, message, saved, tmp_path, capsys):
    (tmp_path / "latin").write_bytes(b"a\xff")
    with pytest.raises(SystemExit) as stopped:
        sample.main([str(saved), *[str(tmp_path / "latin") if x == "LATIN" else x for x in args]])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and message in err.splitlines()[-1], err


def test_a_reader_that_goes_away_ends_nothing(saved):
    command = f"{sys.executable} sample.py {saved} --tokens 40 | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 141 and "Traceback" not in done.stderr  # as a shell has it for a closed pipe
    assert "tokens/s" in done.stderr
