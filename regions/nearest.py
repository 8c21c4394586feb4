"""Give places without a label that of the nearest place which has one."""

import torch
from torch import Tensor


def fill_nearest(labels: Tensor, known: Tensor) -> Tensor:
    """Labels of the nearest known place (Euclidean, exact) wherever none is known.

    Args:
        labels: integers [B, H, W].
        known: [B, H, W], True where a label stands; at least one place of every image.
    Returns:
        integers [B, H, W]. Of equally near places that in the nearest column counts, of those the left, then the upper.
    """
    _, h, w = labels.shape
    row = torch.arange(h, device=labels.device)[:, None]
    # Within its column every place finds the nearest known one; then other columns are looked at while they are nearer.
    above = torch.where(known, row, -h - w).cummax(dim=1).values
    below = torch.where(known, row, 2 * h + w).flip(1).cummin(dim=1).values.flip(1)
    nearest_row = torch.where(row - above <= below - row, above, below)
    squared = (row - nearest_row).square()
    b, y, x = (~known).nonzero().unbind(1)
    best, column = squared[b, y, x], x.clone()
    open_ = torch.arange(len(b), device=labels.device)
    for distance in range(1, w):
        open_ = open_[best[open_] > distance**2]
        if not len(open_):
            break
        for side in (-distance, distance):
            other = x[open_] + side
            inside = open_[(other >= 0) & (other < w)]
            other = x[inside] + side
            found = squared[b[inside], y[inside], other] + distance**2
            nearer = found < best[inside]
            best[inside[nearer]] = found[nearer]
            column[inside[nearer]] = other[nearer]
    result = labels.clone()
    result[b, y, x] = labels[b, nearest_row[b, y, column], column]
    return result
