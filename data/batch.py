"""A step's tokens on their way to the device, and what the host can count in them before that without waiting for a GPU."""

import numpy as np
import torch


def to_rows(batch: np.ndarray, seq_len: int, device: torch.device,
            bos: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Inputs and targets of one step on the device, and per rank an upper bound on its number of documents.

    Args:
        batch: (ranks, B + 1) int32, as Stream.next() gives it.
        seq_len: T, tokens of a row.
        bos: token with which a document begins; so does every row.
    Returns:
        inputs (ranks, B / T, T) int64, targets of the same shape, max_docs by rank.
    """
    documents = [int(n) + (batch.shape[1] - 1) // seq_len for n in (batch[:, :-1] == bos).sum(1)]
    batch = torch.from_numpy(batch)
    if device.type == "cuda":
        batch = batch.pin_memory().to(device, non_blocking=True)
    batch = batch.long()
    inputs = batch[:, :-1].reshape(len(batch), -1, seq_len)
    targets = batch[:, 1:].reshape(len(batch), -1, seq_len)
    return inputs, targets, documents


def count_documents(rows: np.ndarray, bos: int) -> int:
    """Documents in rows (R, T) of ids on the host, each of which begins with `bos` or a row."""
    return int((rows[:, 1:] == bos).sum()) + len(rows)


def longest_document(rows: np.ndarray, bos: int) -> int:
    """Tokens of the longest document in rows (R, T) of ids on the host, each of which begins with `bos` or a row."""
    first = rows == bos
    first[:, 0] = True
    return int(np.diff(np.flatnonzero(first), append=first.size).max())
