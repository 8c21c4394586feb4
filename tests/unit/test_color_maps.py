"""Regions of colour-coded pictures: drawn ones, antialiased and compressed, and the hand-made maps of real pairs."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from semantic_style.regions.color_maps import regions_from_colors

PALETTES = {
    "primary": [(0, 0, 230), (0, 230, 0), (230, 0, 0), (230, 230, 0), (230, 0, 230)],
    # The second lies between the first and the third, as their antialiased border does.
    "grey": [(0, 0, 0), (128, 128, 128), (255, 255, 255)],
    "close": [(204, 5, 255), (224, 5, 255), (120, 120, 80), (140, 140, 140)],
    "dark": [(20, 20, 30), (60, 20, 20), (20, 50, 20), (40, 40, 80)],
    "two": [(255, 255, 255), (0, 0, 0)],
}
FINER = 4


def draw(colors, size, mirrored):
    """A picture with smooth borders, and which colour every pixel has most of: ellipses and bars on a ground."""
    w, h = (FINER * side for side in size)
    picture, truth = Image.new("RGB", (w, h), colors[0]), Image.new("L", (w, h), 0)
    for i, color in enumerate(colors[1:]):
        x, y = (0.06 + 0.24 * i) * w, (0.1 + 0.13 * i) * h
        box = (x, y, x + 0.22 * w, y + 0.35 * h)
        bar = (x, 0.8 * h, x + 0.3 * w, 0.8 * h + 0.15 * h)
        for canvas, fill in ((picture, color), (truth, i + 1)):
            ImageDraw.Draw(canvas).ellipse(box, fill)
            ImageDraw.Draw(canvas).polygon([bar[:2], (bar[2], bar[1] + 0.05 * h), bar[2:], (x, bar[3])], fill)
    if mirrored:
        picture, truth = (x.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for x in (picture, truth))
    return picture.resize(size, Image.Resampling.LANCZOS), np.array(truth.resize(size, Image.Resampling.NEAREST))


def compressed(picture, quality):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, subsampling=2)
    return Image.open(file).convert("RGB")


def tensor(*pictures):
    return torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures]).float() / 255


def agreement(labels, truth, colors, found):
    """Share of the places with the right colour; `found` are the colours of the labels."""
    nearest = torch.cdist(found, torch.tensor(colors) / 255).argmin(dim=1)
    assert len(set(nearest.tolist())) == len(found)
    return (nearest[labels - 1] == torch.from_numpy(truth)).float().mean().item()


@pytest.mark.parametrize("quality", [None, 90, 60, 30])
@pytest.mark.parametrize("palette", PALETTES)
def test_borders_and_compression_make_no_regions(palette, quality):
    colors = PALETTES[palette]
    (content, truth_c), (style, truth_s) = draw(colors, (256, 200), False), draw(colors, (180, 240), True)
    if quality:
        content, style = compressed(content, quality), compressed(style, quality)
    found = regions_from_colors(tensor(content), tensor(style))
    assert len(found.colors) == len(colors)
    # Compression moves colours near borders by as much as the colours of these palettes lie apart.
    alike = palette in ("close", "dark") and quality in (60, 30)
    least = 0.9 if alike else 0.99
    for labels, truth in ((found.regions.content[0], truth_c), (found.regions.style[0], truth_s)):
        assert agreement(labels, truth, colors, found.colors) > least


def test_a_large_compressed_map_keeps_its_size():
    colors = PALETTES["primary"]
    picture, truth = draw(colors, (1301, 1003), False)
    found = regions_from_colors(tensor(compressed(picture, 60)), tensor(picture)[:, ::4, ::4])
    assert found.regions.content.shape == (1, 1003, 1301)
    assert found.regions.style.shape == (1, 251, 326)
    assert agreement(found.regions.content[0], truth, colors, found.colors) > 0.99


def test_noise_makes_no_regions():
    colors = PALETTES["primary"]
    picture, truth = draw(colors, (256, 200), False)
    noisy = tensor(picture) + 8 / 255 * torch.randn(1, 200, 256, 3, generator=torch.Generator().manual_seed(0))
    found = regions_from_colors(noisy.clamp(0, 1), tensor(picture))
    assert len(found.colors) == len(colors)
    assert agreement(found.regions.content[0], truth, colors, found.colors) > 0.99


def test_clean_maps_are_taken_to_the_last_pixel():
    picture = torch.zeros(1, 60, 70, 3)
    picture[:, 20:] = torch.tensor([0.0, 0.5, 1.0])
    picture[:, 30:50, 40:60] = torch.tensor([1.0, 0.2, 0.0])
    picture[:, 5, 3:50] = torch.tensor([0.0, 0.5, 1.0])  # a line of one pixel
    expected = torch.full((1, 60, 70), 1)
    expected[picture[..., 2] < 0.5] = 2
    expected[picture[..., 0] > 0.5] = 3
    found = regions_from_colors(picture, picture[:, ::2, ::2])
    assert torch.equal(found.regions.content, expected)
    assert torch.equal(found.regions.style, expected[:, ::2, ::2])
    torch.testing.assert_close(found.colors, torch.tensor([[0.0, 0.5, 1.0], [0, 0, 0], [1.0, 0.2, 0.0]]))


def test_colours_are_joint_and_may_be_on_one_side_only():
    content, style = torch.zeros(1, 40, 40, 3), torch.zeros(1, 40, 40, 3)
    content[:, :, 20:] = torch.tensor([1.0, 0.0, 0.0])
    style[:, :, 20:] = torch.tensor([0.0, 1.0, 0.0])
    style[:, :8, 20:] = torch.tensor([1.0, 0.01, 0.02])
    found = regions_from_colors(content, style)
    assert len(found.colors) == 3
    assert found.regions.content.unique().tolist() == [1, 2]
    assert found.regions.style.unique().tolist() == [1, 2, 3]
    assert (found.regions.style[0, :8, 20:] == found.regions.content[0, 0, -1]).all()


def stripes(*colors, size=64):
    """A picture of vertical stripes of these bytes."""
    columns = torch.tensor(colors).repeat_interleave(size // len(colors), 0).float() / 255
    return columns.expand(1, size, -1, -1).clone()


@pytest.mark.parametrize("number", [0, 2])
def test_flat_colours_that_hardly_differ_stay_apart(number):
    """Two of ADE20K's: #787846 and #787850."""
    picture = stripes((0x78, 0x78, 0x46), (0x78, 0x78, 0x50))
    found = regions_from_colors(picture, picture.flip(2), number)
    assert found.regions.content[0, 0, [0, -1]].tolist() == found.regions.style[0, 0, [-1, 0]].tolist()
    assert len(found.colors) == len(found.regions.content.unique()) == 2


def test_label_numbers_as_grey_are_regions():
    picture = stripes(*[(i, i, i) for i in range(4)])
    found = regions_from_colors(picture, picture)
    assert sorted((found.colors[:, 0] * 255).round().tolist()) == [0, 1, 2, 3]
    assert torch.equal((found.colors[found.regions.content - 1] * 255).round(), (picture * 255).round())


@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_thin_strip_beside_a_similar_colour_stays(width):
    picture = stripes((200, 50, 50), (40, 90, 160))
    picture[:, :, 20 : 20 + width] = torch.tensor([200, 60, 50]) / 255
    found = regions_from_colors(picture, picture)
    assert len(found.colors) == 3
    assert (found.regions.content[0, 0, 18 : 22 + width].diff() != 0).sum() == 2


def test_colours_between_two_others_are_their_border():
    """One line of the mean colour: what smoothing makes of an edge."""
    picture = stripes((200, 50, 50), (40, 90, 160))
    picture[:, :, 32] = torch.tensor([120, 70, 105]) / 255
    assert len(regions_from_colors(picture, picture).colors) == 2


def test_a_smooth_gradient_and_a_search_that_is_ended():
    y, x = torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij")
    gradient = torch.stack([x, y, (x + y) / 2], dim=-1)[None] / 95
    asked = []
    regions_from_colors(gradient, gradient, check=lambda: asked.append(1))
    assert len(asked) > 10

    def end():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regions_from_colors(gradient, gradient, check=end)


def spotted():
    """A ground, a large and a small region; the small one covers 1%."""
    picture = torch.zeros(1, 100, 100, 3)
    picture[:, 50:] = torch.tensor([0.0, 1.0, 0.0])
    picture[:, 70:80, 30:40] = torch.tensor([1.0, 0.0, 0.0])
    return picture


def test_small_spots_go_to_their_surroundings():
    picture = spotted()
    assert len(regions_from_colors(picture, picture, min_share=0.009).colors) == 3
    found = regions_from_colors(picture, picture, min_share=0.011)
    assert len(found.colors) == 2
    assert (found.regions.content[0, 50:] == found.regions.content[0, 99, 0]).all()
    # Large in one of the two is enough.
    assert len(regions_from_colors(picture, picture[:, 60:, :50], min_share=0.02).colors) == 3


def test_a_given_number_joins_what_is_most_alike():
    picture = torch.zeros(1, 60, 60, 3)
    for i, color in enumerate([(0, 0, 0), (0, 0, 60), (250, 0, 0), (0, 250, 0)]):
        picture[:, 15 * i : 15 * (i + 1)] = torch.tensor(color) / 255
    assert len(regions_from_colors(picture, picture).colors) == 4
    found = regions_from_colors(picture, picture, number=3)
    rows = found.regions.content[0, ::15, 0].tolist()
    assert rows[0] == rows[1]
    assert len(set(rows)) == 3
    assert regions_from_colors(picture, picture, number=1).regions.content.unique().tolist() == [1]
    # A number finds what a share would drop.
    assert len(regions_from_colors(spotted(), spotted(), number=3, min_share=0.5).colors) == 3


def test_strongly_compressed_maps_with_a_given_number():
    colors = PALETTES["primary"]
    (content, truth), (style, _) = draw(colors, (256, 200), False), draw(colors, (180, 240), True)
    found = regions_from_colors(tensor(compressed(content, 10)), tensor(compressed(style, 10)), number=5)
    assert agreement(found.regions.content[0], truth, colors, found.colors) > 0.98


def test_frames_share_colours():
    colors = PALETTES["primary"]
    frames = [draw(colors, (256, 200), mirrored) for mirrored in (False, True, False)]
    found = regions_from_colors(tensor(*(picture for picture, _ in frames)), tensor(frames[1][0]))
    assert found.regions.content.shape == (3, 200, 256)
    for labels, (_, truth) in zip(found.regions.content, frames, strict=True):
        assert agreement(labels, truth, colors, found.colors) > 0.99


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 9)])
def test_pictures_of_few_pixels(size):
    picture = torch.zeros(1, *size, 3)
    picture[:, :, 0] = 1.0
    found = regions_from_colors(picture, picture)
    assert found.regions.content.shape == (1, *size)


def test_a_picture_of_specks_has_some_map():
    """No colour has an area or enough places: nothing to find, but a result."""
    picture = torch.rand(1, 30, 40, 3, generator=torch.Generator().manual_seed(0))
    found = regions_from_colors(picture, torch.zeros(1, 20, 20, 3))
    assert found.regions.content.min() >= 1
    assert found.regions.content.max() <= len(found.colors)


def test_a_frame_of_nothing_but_a_dropped_spot_takes_the_nearest_colour():
    frames = torch.cat([spotted()] * 9)
    frames[8] = torch.tensor([0.1, 0.6, 0.1])
    found = regions_from_colors(frames, spotted(), min_share=0.2)
    assert len(found.colors) == 2
    assert (found.regions.content[8] == found.regions.content[0, 99, 0]).all()


def test_arguments_stay_as_they_are():
    picture = spotted()
    regions_from_colors(picture, picture)
    assert torch.equal(picture, spotted())


@pytest.mark.parametrize(("name", "number"), [("3", 4), ("10", 2), ("33", 5), ("41", 3)])
@pytest.mark.parametrize("quality", [None, 30])
def test_the_maps_of_real_pairs(shared, name, number, quality):
    """Counted by eye. The first has black seams between its regions."""
    pictures = [Image.open(shared / "data" / "pairs" / f"{name}{end}.png") for end in ("_sem", "_paint_sem")]
    pictures = [picture.convert("RGB") for picture in pictures]
    exact = tensor(*pictures)
    if quality:
        pictures = [compressed(picture, quality) for picture in pictures]
    content, style = tensor(*pictures).split(1)
    found = regions_from_colors(content, style)
    assert len(found.colors) == number
    for labels, picture in zip((found.regions.content, found.regions.style), exact, strict=True):
        wrong = (found.colors[labels[0] - 1] - picture).norm(dim=-1) > 0.1
        assert wrong.float().mean() < (0.002 if quality is None else 0.01)


GOOD = torch.zeros(1, 8, 8, 3)


@pytest.mark.parametrize(
    ("content", "style", "message"),
    [
        (GOOD[0], GOOD, r"content colours must be a picture \[B, H, W, 3\], got \[8, 8, 3\]"),
        (GOOD, GOOD[..., :1], r"style colours must be a picture \[B, H, W, 3\], got \[1, 8, 8, 1\]"),
        (GOOD, [GOOD], "got list"),
        (GOOD.byte(), GOOD, "divide bytes by 255"),
        (GOOD / 0, GOOD, "not finite"),
    ],
)
def test_refused_pictures(content, style, message):
    with pytest.raises(ValueError, match=message):
        regions_from_colors(content, style)


def test_refused_settings():
    with pytest.raises(ValueError, match="number of regions must be 0"):
        regions_from_colors(GOOD, GOOD, number=-1)
    with pytest.raises(ValueError, match=r"5 regions were asked for.*only 3 colours with an area: #.*at most 3"):
        regions_from_colors(spotted(), spotted(), number=5)
    with pytest.raises(ValueError, match="at least 0 and below 1, got 50"):
        regions_from_colors(GOOD, GOOD, min_share=50)
