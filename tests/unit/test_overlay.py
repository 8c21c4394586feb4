"""The picture of a semantic map: what is where, and that the numbers stand on their regions."""

import pytest
import torch
from semantic_style.attention.regions import SemanticMap
from semantic_style.demo.overlay import _middle, overlay_map, region_colors


def share(picture, color):
    return (picture == torch.tensor(color) / 255).all(dim=-1).float().mean().item()


def test_areas_in_the_picture_are_those_of_the_regions():
    content, style = torch.full((1, 50, 50), 3), torch.full((1, 60, 40), 3)
    content[:, :, :20] = -2
    style[:, 45:] = 8
    colors = dict(zip((-2, 3, 8), region_colors(3), strict=True))
    picture = overlay_map(SemanticMap(content, style))[0]
    left, right = picture[:, : 14 + 512], picture[:, 14 + 512 :]
    whole = left.shape[0] * left.shape[1] / 512**2
    # Borders and letters take a little away, the legend adds a little.
    assert share(left, colors[-2]) * whole == pytest.approx(0.4, abs=0.02)
    assert share(left, colors[3]) * whole == pytest.approx(0.6, abs=0.02)
    assert share(left, colors[8]) < 0.005
    assert share(right, colors[8]) > 0.1
    assert share(right, colors[-2]) == 0


def test_colours_differ_for_many_regions():
    colors = torch.tensor(region_colors(24)).float()
    assert torch.pdist(colors).min() > 20


def test_an_image_shows_through_as_much_as_is_asked_and_stays_as_it_is():
    labels, image = torch.zeros(1, 8, 8, dtype=torch.int64), torch.full((1, 16, 16, 4), 0.5)
    (color,) = region_colors(1)
    picture = overlay_map(SemanticMap(labels, labels), image, opacity=0.25)[0]
    expected = 0.75 * 0.5 + 0.25 * torch.tensor(color) / 255
    near = ((picture - expected).abs() < 0.01).all(dim=-1)
    assert near[40 : 40 + 512, 14 : 14 + 512].float().mean() > 0.98
    assert (image == 0.5).all()


@pytest.mark.parametrize("shape", ["ring", "corner", "speck", "whole"])
def test_numbers_stand_inside_their_regions(shape):
    y, x = torch.meshgrid(torch.arange(200), torch.arange(300), indexing="ij")
    inside = {
        "ring": ((y - 100) ** 2 + (x - 150) ** 2).sqrt().sub(70).abs() < 20,
        "corner": (y < 40) & (x > 260),
        "speck": (y == 30) & (x < 3),
        "whole": y >= 0,
    }[shape]
    row, column = _middle(inside)
    assert inside[int(row), int(column)]


def test_one_picture_for_every_frame():
    frames = torch.arange(3)[:, None, None].expand(3, 4, 4)
    assert len(overlay_map(SemanticMap(frames, frames[:1]))) == 3
