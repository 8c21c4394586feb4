"""Moving Paperland: what stands still, what moves and how far, and the still scene that a clip starts from."""

import pytest
import torch
from semantic_style.paperland import scenes
from semantic_style.paperland.motion import SUN_SPEED, clip

FRAMES = 8
MOVING = (scenes.SKY, scenes.SUN, scenes.WATER)


def styled(textures, seed=0):
    """A style seed whose sky and water have these textures."""
    return next(
        seed
        for seed in range(seed, 500)
        if (found := scenes.sample_styles(1, scenes.seeded(seed)).texture[0])[scenes.SKY] == textures[0]
        and found[scenes.WATER] == textures[1]
    )


def with_all(start=0):
    """A layout seed with everything that moves, well inside the picture."""
    return next(
        seed
        for seed in range(start, 500)
        if {*MOVING, scenes.MOUNTAIN} <= set(scenes.scene(seed, 0).labels.unique().tolist())
    )


@pytest.fixture(scope="module")
def windy():
    return clip(with_all(), styled((scenes.DOTTED, scenes.WAVY)), FRAMES)


def alone(labels, regions):
    """Where no other region is within two pixels in any frame: no edge runs through."""
    inside = torch.isin(labels, torch.tensor(regions)).all(dim=0)
    return torch.nn.functional.max_pool2d((~inside).float()[None], 5, 1, 2)[0] == 0


@pytest.mark.parametrize("seeds", [(0, 0), (3, 7), (12, 5)])
def test_the_first_frame_is_the_still_scene(seeds):
    moved, still = clip(*seeds, 3), scenes.scene(*seeds)
    assert torch.equal(moved.images[:1], still.images)
    assert torch.equal(moved.labels[:1], still.labels)


def test_shapes_and_ranges(windy):
    assert windy.images.shape == (FRAMES, 128, 128, 3)
    assert windy.labels.shape == (FRAMES, 128, 128)
    assert not windy.labels.is_floating_point()
    assert windy.images.min() >= 0
    assert windy.images.max() <= 1


def test_what_stands_still_is_bit_equal(windy):
    standing = [r for r in range(len(scenes.REGIONS)) if r not in MOVING]
    where = alone(windy.labels, standing)
    assert where.float().mean() > 0.2
    assert torch.equal(windy.images[:, where], windy.images[:1, where].expand(FRAMES, -1, -1))
    changed = windy.labels != windy.labels[:1]
    assert set(windy.labels[changed.any(dim=0).expand(FRAMES, -1, -1)].tolist()) == {scenes.SKY, scenes.SUN}


@pytest.mark.parametrize("region", [scenes.SKY, scenes.WATER])
def test_textures_drift(windy, region):
    where = alone(windy.labels, [region])
    steps = (windy.images[1:] - windy.images[:-1])[:, where].abs()
    assert (steps.mean(dim=(1, 2)) > 0.005).all(), "stands still"
    assert steps.mean(dim=(1, 2)).std() < 0.3 * steps.mean(), "moves in jerks"


def test_a_clear_sky_and_calm_water_stand_still():
    calm = clip(with_all(), styled((scenes.SHADED, scenes.SHADED)), FRAMES)
    where = alone(calm.labels, [scenes.SKY]) | alone(calm.labels, [scenes.WATER])
    assert where.any()
    assert torch.equal(calm.images[:, where], calm.images[:1, where].expand(FRAMES, -1, -1))


def center(mask):
    y, x = (t.float() for t in torch.nonzero(mask, as_tuple=True))
    return torch.stack([x.mean(), y.mean()])


def open_sun():
    """A layout seed whose sun is over no mountain for a while, and left of the middle."""
    for seed in range(500):
        sun = scenes.sample_layouts(1, scenes.seeded(seed))
        x, y, radius = sun.sun[0].tolist()
        if sun.has_sun and not sun.has_mountain and 0.15 < x < 0.3 and y + radius < 0.45:
            return seed
    raise AssertionError("no such layout")


def test_the_sun_moves_along_an_arc():
    moved = clip(open_sun(), 1, 13, (128, 128))
    path = torch.stack([center(labels == scenes.SUN) for labels in moved.labels]) / 128
    steps = path.diff(dim=0)
    assert torch.allclose(steps.norm(dim=1), torch.full((12,), SUN_SPEED), atol=2e-3)
    assert (steps[:, 0] > 0).all(), "towards the middle"
    rise = -steps[:, 1]
    assert rise[:4].mean() > 0.001
    assert rise[:4].mean() > rise[-4:].mean() + 5e-4, "the path bends"


@pytest.mark.parametrize("texture", range(len(scenes.TEXTURES)), ids=scenes.TEXTURES)
def test_the_sun_takes_its_texture_along(texture):
    """Around the sun's middle is the same picture wherever it is: its mean, and its mean in each half."""
    style = next(s for s in range(99) if scenes.sample_styles(1, scenes.seeded(s)).texture[0, scenes.SUN] == texture)
    moved = clip(open_sun(), style, 9, (256, 256))
    crops = []
    for i in (0, 8):
        x, y = center(moved.labels[i] == scenes.SUN).round().long().tolist()
        crops.append(moved.images[i, y - 8 : y + 9, x - 8 : x + 9])
    for half in (slice(None), slice(0, 8), slice(9, None)):
        for axis in (0, 1):
            means = [crop[(slice(None),) * axis + (half,)].mean(dim=(0, 1)) for crop in crops]
            assert (means[0] - means[1]).abs().max() < 0.05


def test_more_frames_go_on_from_the_shorter_clip():
    long, short = clip(2, 3, 6), clip(2, 3, 3)
    assert torch.equal(long.images[:3], short.images)
    assert torch.equal(long.labels[:3], short.labels)


def test_speed_counts_frames():
    fast, slow = clip(2, 3, 3, speed=2.0), clip(2, 3, 5)
    assert torch.equal(fast.images, slow.images[::2])
    still = clip(2, 3, 3, speed=0.0)
    assert torch.equal(still.images, still.images[:1].expand_as(still.images))


@pytest.mark.parametrize("size", [(64, 96), (33, 47)])
def test_any_size(size):
    moved = clip(1, 1, 2, size)
    assert moved.images.shape == (2, *size, 3)
    assert torch.isfinite(moved.images).all()


def test_the_caption_names_all_that_is_seen_in_any_frame(windy):
    named = {phrase.split()[-1] for phrase in windy.caption.split(", ")}
    assert named == {scenes.REGIONS[i] for i in windy.labels.unique().tolist()}


def test_refusals():
    with pytest.raises(ValueError, match="at least 1 frame, got 0"):
        clip(0, 0, 0)
    for speed in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="speed must be 0"):
            clip(0, 0, 2, speed=speed)
