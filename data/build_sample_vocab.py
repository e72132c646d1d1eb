"""Rebuild sample/vocab.bpe: `python -m data.build_sample_vocab` (needs the dev extra `tokenizers`).

A byte-level BPE of 1,000 merges on the training part of the embedded corpus, with GPT-2's pre-tokenisation.
"""

from common import environment  # first: refuses a Python that is too old

from collections.abc import Iterable

if __name__ == "__main__":
    environment.require("numpy", "tokenizers")

from common import console, files
from data.corpus import source_documents
from data.tokenizer import FILES


def merges(texts: Iterable[str], count: int) -> list[str]:
    """The first `count` merges as lines `left right` in GPT-2's byte symbols."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=256 + count, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return [
        " ".join(m) if isinstance(m, list) else m for m in json.loads(tokenizer.to_str())["model"]["merges"]
    ]


def main() -> None:
    """Write the merges of the sample tokenizer."""
    path, count = FILES["sample"]
    _, train = source_documents()
    files.write(path, "#version: speedrun sample v1\n" + "\n".join(merges(train, count)) + "\n")
    print(f"{path}: {count} merges")


if __name__ == "__main__":
    console.program(main)
