"""Shards, the fixed stream of tokens, the embedded corpus, tokenizers and downloads. numpy only, no torch."""
