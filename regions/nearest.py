"""Give pixels without a label that of the nearest pixel which has one."""

import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor


def fill_nearest(labels: Tensor, known: Tensor) -> Tensor:
    """Labels of the nearest known pixel (Euclidean, exact) wherever none is known.

    Args:
        labels: integers [B, H, W].
        known: [B, H, W], True where a label stands; at least one pixel of every image.
    Returns:
        integers [B, H, W], on the labels' device.
    """
    result = []
    for one, there in zip(labels, known, strict=True):
        row, column = distance_transform_edt(~there.cpu().numpy(), return_distances=False, return_indices=True)
        result.append(one[torch.from_numpy(row).to(one.device), torch.from_numpy(column).to(one.device)])
    return torch.stack(result)
