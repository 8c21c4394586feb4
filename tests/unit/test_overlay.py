"""The picture of a semantic map: what is where, and that the numbers stand on their regions."""

import pytest
import torch
from semantic_style.pictures.overlay import _middle, overlay_map, overlay_subject, region_colors
from semantic_style.regions.semantic_map import SemanticMap


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


def test_a_subject_stays_bright_and_the_rest_gets_dark():
    mask = torch.zeros(2, 12, 10)
    mask[0, 3:9, 2:8] = 1.0
    mask[1, :6] = 0.5
    image = torch.rand(1, 12, 10, 4, generator=torch.Generator().manual_seed(0))
    shown = overlay_subject(mask, image)
    assert shown.shape == (2, 12, 10, 3)
    assert torch.equal(shown[0, 5, 5], image[0, 5, 5, :3])
    assert torch.allclose(shown[0, 0, 0], 0.25 * image[0, 0, 0, :3])
    assert torch.allclose(shown[1, 0, 0], 0.625 * image[0, 0, 0, :3])
    assert (shown[0, 3, 4] == 1).all()
    assert overlay_subject(mask).shape == (2, 12, 10, 3)
