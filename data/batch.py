"""A step's tokens on their way to the device, and what the host can count in them before that without waiting
for a GPU."""

from typing import NamedTuple

import numpy as np
import torch


class Documents(NamedTuple):
    """What attention is told of the documents in some rows, counted on the CPU to avoid a GPU sync."""
    number: int
    longest: int  # tokens
    targets: np.ndarray | None = None  # (B,) the ids to predict, for the candidates of a sampled softmax


def to_rows(batch: np.ndarray, seq_len: int, device: torch.device, bos: int,
            segment: int | None = None) -> tuple[torch.Tensor, torch.Tensor, list[Documents]]:
    """Inputs and targets of one step on the device, and the documents among the inputs of each rank.

    Args:
        batch: (ranks, B + 1) int32, as Stream.next() gives it.
        seq_len: T, tokens of a row.
        bos: token with which a document begins; so does every row.
        segment: tokens after which attention cuts a document (model.attn.segment).
    Returns:
        inputs (ranks, B / T, T) int64, targets of the same shape, Documents by rank.
    """
    documents = [
        count_documents(rank[:-1].reshape(-1, seq_len), bos, segment)._replace(targets=rank[1:])
        for rank in batch
    ]
    batch = torch.from_numpy(batch)
    if device.type == "cuda":
        batch = batch.pin_memory().to(device, non_blocking=True)
    batch = batch.long()
    inputs = batch[:, :-1].reshape(len(batch), -1, seq_len)
    targets = batch[:, 1:].reshape(len(batch), -1, seq_len)
    return inputs, targets, documents


def loss_weights(weights: tuple[float, ...], device: torch.device) -> torch.Tensor | None:
    """Loss weights of the next tokens (StepPlan.target_weights) on the device, float64; None for ().

    A tensor, so that a compiled graph does not depend on their values.
    """
    if not weights:
        return None
    found = torch.tensor(weights, dtype=torch.float64)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found


def count_documents(rows: np.ndarray, bos: int, segment: int | None = None) -> Documents:
    """The documents in rows (R, T) of ids on the host; each begins with `bos` or a row.

    segment: the longest; longer documents are cut at every multiple of it, as in model.segments.
    """
    first = rows == bos
    first[:, 0] = True
    starts = np.flatnonzero(first)
    lengths = np.diff(starts, append=first.size)
    if segment is None:
        return Documents(len(starts), int(lengths.max()))
    return Documents(int((-(-lengths // segment)).sum()), min(int(lengths.max()), segment))
