"""What is said about maps: areas and regions that a method cannot use."""

import torch
from semantic_style.regions.map_report import describe, region_shares, warnings
from semantic_style.regions.semantic_map import SemanticMap


def halves(left, right, size=(64, 64)):
    labels = torch.full((1, *size), left)
    labels[..., size[1] // 2 :] = right
    return labels


def test_areas_of_both_sides():
    regions = SemanticMap(halves(1, 2), torch.tensor([[[2, 2, 2, -5]]]))
    assert region_shares(regions) == {-5: (0.0, 0.25), 1: (0.5, 0.0), 2: (0.5, 0.75)}
    assert describe(regions, {2: "sky"}).splitlines() == [
        "3 regions",
        "-5: 0.0% of the content, 25.0% of the style",
        "1: 50.0% of the content, 0.0% of the style",
        "2 sky: 50.0% of the content, 75.0% of the style",
    ]
    assert describe(SemanticMap(halves(3, 3), halves(3, 3))).startswith("1 region\n")


def test_nothing_to_warn_of():
    assert warnings(SemanticMap(halves(1, 2), halves(2, 1, (50, 90)))) == ""


def test_regions_of_one_side():
    lines = warnings(SemanticMap(halves(1, 2), halves(1, 7))).splitlines()
    assert lines == [
        "Region 2 (50.0% of the content) is not in the style: it takes from the whole style.",
        "Region 7 (50.0% of the style) is not in the content: nothing takes from it.",
    ]


def test_regions_that_a_coarse_grid_loses():
    style = halves(1, 1, (128, 256))
    style[:, :16, :8] = 2  # two places of 8x8 pixels on a grid of 32x16
    assert "Region 2 is small in the style (0.4%): on a grid of 32x16 fewer than 4" in warnings(
        SemanticMap(halves(1, 2), style)
    )
    style[:, :16, :16] = 2
    assert warnings(SemanticMap(halves(1, 2), style)) == ""
