"""Nearest known places against all distances."""

import pytest
import torch
from semantic_style.regions.nearest import fill_nearest


def farther_than_needed(chosen, known):
    """How much farther each chosen place (its number) is than the nearest known one, in squared distance [B, H, W]."""
    _, h, w = known.shape
    at = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), dim=-1).reshape(-1, 2)
    out = []
    for one, there in zip(chosen, known, strict=True):
        places = at[there.flatten()]
        least = (at[:, None] - places).square().sum(dim=-1).amin(dim=1)
        mine = at[one.flatten() % (h * w)]
        assert there.flatten()[one.flatten() % (h * w)].all(), "only what is known is taken"
        out.append((at - mine).square().sum(dim=-1) - least)
    return torch.stack(out)


@pytest.mark.parametrize("share", [0.02, 0.2, 0.9])
@pytest.mark.parametrize("size", [(9, 13), (1, 12), (12, 1), (20, 7)])
def test_labels_are_those_of_the_nearest_place(share, size):
    generator = torch.Generator().manual_seed(int(100 * share))
    labels = torch.arange(2 * size[0] * size[1]).reshape(2, *size)
    known = torch.rand(2, *size, generator=generator) < share
    known[:, -1, size[1] // 2] = True
    assert (farther_than_needed(fill_nearest(labels, known), known) == 0).all()


def test_what_is_known_stays_and_the_argument_too():
    labels = torch.tensor([[[1, 2, 3]]])
    assert torch.equal(fill_nearest(labels, labels > 0), labels)
    filled = fill_nearest(labels, labels == 3)
    assert filled.tolist() == [[[3, 3, 3]]]
    assert labels.tolist() == [[[1, 2, 3]]]
