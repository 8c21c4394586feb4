"""Nearest known places against all distances."""

import pytest
import torch
from semantic_style.regions.nearest import fill_nearest


def by_all_distances(labels, known):
    """Of equally near places that in the nearest column, of those the left, then the upper."""
    out = labels.clone()
    for b in range(len(labels)):
        for y, x in (~known[b]).nonzero().tolist():
            places = known[b].nonzero().tolist()
            key = [((v - y) ** 2 + (u - x) ** 2, abs(u - x), u, v) for v, u in places]
            _, _, u, v = min(key)
            out[b, y, x] = labels[b, v, u]
    return out


@pytest.mark.parametrize("share", [0.02, 0.2, 0.9])
@pytest.mark.parametrize("size", [(9, 13), (1, 12), (12, 1), (20, 7)])
def test_labels_are_those_of_the_nearest_place(share, size):
    generator = torch.Generator().manual_seed(int(100 * share))
    labels = torch.arange(2 * size[0] * size[1]).reshape(2, *size)
    known = torch.rand(2, *size, generator=generator) < share
    known[:, -1, size[1] // 2] = True
    assert torch.equal(fill_nearest(labels, known), by_all_distances(labels, known))


def test_what_is_known_stays_and_the_argument_too():
    labels = torch.tensor([[[1, 2, 3]]])
    assert torch.equal(fill_nearest(labels, labels > 0), labels)
    filled = fill_nearest(labels, labels == 3)
    assert filled.tolist() == [[[3, 3, 3]]]
    assert labels.tolist() == [[[1, 2, 3]]]
