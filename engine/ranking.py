"""The best entries of score rows, ties to the lowest id, without sorting the whole vocabulary."""

import torch

EXTRA = 16  # more than this many equal values at the edge: sort the whole row


def best(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` best of each row, best first, ties by id.

    Args:
        scores: float32 [rows, vocab].
        count: at most vocab.

    Returns:
        (values, ids), both [rows, count].
    """
    vocab = scores.shape[-1]
    width = count + EXTRA
    if width >= vocab // 4:
        values, ids = torch.sort(scores, dim=-1, descending=True, stable=True)
        return values[:, :count], ids[:, :count]
    # Of equal values at its edge `topk` may take any; the edge is far enough behind `count` if it
    # has a lower value.
    values, ids = torch.topk(scores, width, dim=-1)
    ids, order = torch.sort(ids, dim=-1)
    values = values.gather(1, order)
    values, order = torch.sort(values, dim=-1, descending=True, stable=True)
    ids = ids.gather(1, order)
    values, ids, edge = values[:, :count], ids[:, :count], values[:, -1:]
    if count == 0:
        return values, ids
    torn = (values[:, -1:] == edge)[:, 0]
    if bool(torn.any()):
        full, full_ids = torch.sort(scores[torn], dim=-1, descending=True, stable=True)
        values, ids = values.clone(), ids.clone()
        values[torn], ids[torn] = full[:, :count], full_ids[:, :count]
    return values, ids
