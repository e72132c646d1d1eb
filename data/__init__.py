"""Shards, the fixed stream of tokens, the embedded corpus, tokenizers and downloads, with numpy only.

batch.py alone imports torch: it moves a step's tokens to the device.
"""
