"""What a VAE crops away is cropped of masks and originals too, as the host does it."""

import pytest
import torch
from semantic_style.regions.crops import as_decoded, as_encoded, encoded_size, in_picture
from semantic_style.regions.map_pictures import draw_map
from semantic_style.regions.masks import keep_outside, mask_on_grid
from semantic_style.regions.semantic_map import SemanticMap, resample_labels

# Height and width of a picture, the factor of the VAE.
SIZES = [(130, 130, 8), (135, 71, 8), (129, 131, 4), (512, 519, 8), (70, 95, 32), (90, 94, 16), (128, 64, 8)]


def cropped_by_the_host(pixels, factor):
    """ComfyUI's `VAE.vae_encode_crop_pixels`."""
    for axis in (1, 2):
        side = pixels.shape[axis]
        pixels = pixels.narrow(axis, side % factor // 2, side // factor * factor)
    return pixels


@pytest.mark.parametrize(("height", "width", "factor"), SIZES)
def test_the_part_is_the_hosts(height, width, factor):
    pixels = torch.rand(2, height, width, 3)
    expected = cropped_by_the_host(pixels, factor)
    grid = height // factor, width // factor
    assert encoded_size((height, width), grid) == expected.shape[1:3]
    assert torch.equal(as_encoded(pixels, grid), expected)
    assert torch.equal(as_decoded(pixels, tuple(expected.shape[1:3])), expected)
    inside = torch.rand(2, *expected.shape[1:3])
    assert torch.equal(as_encoded(in_picture(inside, (height, width)), grid), inside)


@pytest.mark.parametrize("size", [(100, 100), (190, 128), (64, 64), (16, 16)])
def test_other_sizes_stay_whole(size):
    pixels = torch.rand(1, *size, 3)
    assert torch.equal(as_decoded(pixels, (128, 128)), pixels)
    assert torch.equal(as_encoded(pixels, (16, 15)), pixels)


@pytest.mark.parametrize("size", [130, 135, 133])
def test_keep_background_aligns_the_original_and_its_mask(size):
    original = torch.rand(1, size, size, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, size, size)
    mask[:, 40:80, 40:80] = 1
    seen, where = (cropped_by_the_host(x, 8) for x in (original, mask))
    image = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(1))
    out = keep_outside(image, original, mask)
    assert torch.equal(out, torch.where(where[..., None] > 0, image, seen))
    assert torch.equal(keep_outside(seen, original, where), seen)
    with pytest.raises(ValueError, match="same height, width"):
        keep_outside(image, torch.rand(1, 190, 128, 3), mask)


@pytest.mark.parametrize("grid", [(16, 18), (8, 9)])
def test_a_semantic_map_of_the_whole_picture_is_cropped_with_it(grid):
    """The latent of 16x18 places, and what coarser levels of the network make of it."""
    labels = torch.randint(0, 3, (1, 5, 5), generator=torch.Generator().manual_seed(0))
    labels = labels.repeat_interleave(27, 1).repeat_interleave(30, 2)
    part = cropped_by_the_host(labels, 8)
    assert labels.shape[1:] == (135, 150)
    assert part.shape[1:] == (128, 144)
    regions = SemanticMap(labels, labels.clone())
    at = regions.at(grid, (16, 18))
    assert torch.equal(at.content, resample_labels(part, grid))
    assert torch.equal(at.style, resample_labels(part, (16, 18)))
    drawn = draw_map(regions, (128, 144), (128, 144))
    for one, other in zip(drawn, draw_map(SemanticMap(part, part.clone())), strict=True):
        assert torch.equal(one, other)


def test_a_mask_at_a_latents_grid_is_that_of_its_part():
    mask = torch.zeros(1, 135, 135)
    mask[:, 3 + 8 * 4 : 3 + 8 * 9, 3 + 8 * 2 : 3 + 8 * 12] = 1
    on_grid = mask_on_grid(as_encoded(mask, (16, 16)), (16, 16))
    expected = torch.zeros(1, 16, 16)
    expected[:, 4:9, 2:12] = 1
    assert torch.equal(on_grid, expected)
