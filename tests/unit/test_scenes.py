"""Paperland's drawing: what seeds mean, labels against pixels, captions against styles."""

import pytest
import torch
from semantic_style.paperland import scenes

COUNT = 24


@pytest.fixture(scope="module")
def parts():
    g = scenes.seeded(7)
    return scenes.sample_layouts(COUNT, g), scenes.sample_styles(COUNT, g)


@pytest.fixture(scope="module")
def drawn(parts):
    return scenes.draw(*parts)


def test_shapes_and_ranges(drawn):
    assert drawn.images.shape == (COUNT, 128, 128, 3)
    assert drawn.images.min() >= 0
    assert drawn.images.max() <= 1
    assert drawn.labels.shape == (COUNT, 128, 128)
    assert set(drawn.labels.unique().tolist()) == set(range(len(scenes.REGIONS)))


def test_seeds_are_independent():
    a, b = scenes.scene(3, 10), scenes.scene(3, 11)
    assert torch.equal(a.labels, b.labels)
    assert (a.images - b.images).abs().mean() > 0.05
    other = scenes.scene(4, 10)
    assert (other.labels != a.labels).float().mean() > 0.05
    assert torch.equal(scenes.scene(3, 10).images, a.images)


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    scenes.scene(1, 2)
    assert torch.equal(torch.rand(3), expected)


def test_one_style_for_all_layouts_and_the_reverse(parts):
    layouts, _ = parts
    styles = scenes.sample_styles(1, scenes.seeded(0))
    repeated = scenes.Styles(
        *(getattr(styles, f).expand(COUNT, *[-1] * (getattr(styles, f).ndim - 1)) for f in vars(styles))
    )
    same_style = scenes.draw(layouts, repeated)
    sky = same_style.labels == scenes.SKY
    if styles.texture[0, scenes.SKY] != scenes.SHADED:  # a shaded sky depends on how much of it is visible
        both = sky[0] & sky[1]
        assert (same_style.images[0] - same_style.images[1])[both].abs().mean() < 0.02


def test_regions_show_the_colours_of_their_style(parts, drawn):
    """Every pixel well inside a region lies on the line between the region's two colours."""
    _, styles = parts
    labels = drawn.labels
    inner = torch.ones_like(labels, dtype=torch.bool)
    for shift in (1, -1, 2, -2):
        inner &= (labels == labels.roll(shift, 1)) & (labels == labels.roll(shift, 2))
    for region in range(len(scenes.REGIONS)):
        where = (labels == region) & inner
        a, b = (c[:, region, None, None].expand_as(drawn.images)[where] for c in (styles.color_a, styles.color_b))
        pixels = drawn.images[where]
        share = (((pixels - a) * (b - a)).sum(-1) / (b - a).square().sum(-1)).clamp(0, 1)[:, None]
        off = (pixels - torch.lerp(a, b, share)).abs().amax(dim=-1)
        assert (off < 0.02).float().mean() > 0.97, scenes.REGIONS[region]


def test_textures_differ(parts):
    layouts, styles = parts
    spread = []
    for texture in range(len(scenes.TEXTURES)):
        values = {**vars(styles), "texture": torch.full_like(styles.texture, texture)}
        images = scenes.draw(layouts, scenes.Styles(**values)).images
        spread.append((images - images.roll(1, 1)).abs().mean().item())
    shaded, striped, dotted, wavy = spread
    assert shaded < 0.5 * min(striped, dotted, wavy)


def test_caption_names_what_is_visible(parts, drawn):
    _, styles = parts
    for i, caption in enumerate(drawn.captions):
        phrases = caption.split(", ")
        regions = [p.split()[-1] for p in phrases]
        assert regions == [scenes.REGIONS[r] for r in drawn.labels[i].unique().tolist()]
        for phrase, region in zip(phrases, regions, strict=True):
            r = scenes.REGIONS.index(region)
            first, _, second, texture, _ = phrase.split()
            assert (
                torch.tensor(scenes.COLORS[first]) / 255 - styles.color_a[i, r]
            ).abs().max() <= scenes.COLOR_JITTER + 1e-6
            assert (
                torch.tensor(scenes.COLORS[second]) / 255 - styles.color_b[i, r]
            ).abs().max() <= scenes.COLOR_JITTER + 1e-6
            assert scenes.TEXTURES.index(texture) == styles.texture[i, r]


def test_main_colours_of_a_scene_differ(parts):
    _, styles = parts
    assert all(len(set(names)) == len(scenes.REGIONS) for names in styles.name_a.tolist())


@pytest.mark.parametrize("size", [(64, 96), (200, 120), (33, 47)])
def test_any_size(size):
    drawn = scenes.scene(1, 1, size)
    assert drawn.images.shape == (1, *size, 3)
    assert torch.isfinite(drawn.images).all()


def test_larger_pictures_show_the_same_scene():
    small, large = scenes.scene(5, 5), scenes.scene(5, 5, (256, 256))
    agree = (large.labels[:, ::2, ::2] == small.labels).float().mean()
    assert agree > 0.97


def test_layouts_and_styles_must_match(parts):
    layouts, _ = parts
    with pytest.raises(ValueError, match="24 layouts and 2 styles"):
        scenes.draw(layouts, scenes.sample_styles(2, scenes.seeded(0)))


def test_label_image_has_one_colour_per_region(drawn):
    picture = scenes.label_image(drawn.labels)
    colors = (picture * 255).round().long()
    key = (colors * torch.tensor([65536, 256, 1])).sum(-1)
    assert len(torch.stack([key.flatten(), drawn.labels.flatten()]).unique(dim=1).T) == len(scenes.REGIONS)


@pytest.mark.parametrize("kind", scenes.OBJECTS)
@pytest.mark.parametrize("seed", range(6))
def test_a_single_object_is_alone_and_whole(kind, seed):
    drawn = scenes.single(kind, seed, seed + 1)
    seen = {scenes.REGIONS[r] for r in drawn.labels.unique().tolist()}
    assert seen == {"sky", "hill", kind} | ({"roof"} if kind == "house" else set())
    mask = scenes.object_mask(drawn.labels)
    assert 0.01 < mask.mean() < 0.2
    assert not mask[:, :, [0, -1]].any()
    assert not mask[:, [0, -1]].any()
    assert torch.equal(mask.bool(), drawn.labels.ge(scenes.SUN) & (drawn.labels != scenes.HILL))


def test_a_single_object_is_that_of_the_whole_scene():
    """Layout 7 has a house away from the sides: it stands and looks the same."""
    whole, alone = scenes.scene(7, 8), scenes.single("house", 7, 8)
    house = whole.labels == scenes.HOUSE
    assert house.any()
    assert (alone.labels == scenes.HOUSE)[house].all()
    assert (alone.images - whole.images)[house].abs().mean() < 0.01  # edges are mixed with what is behind


def test_chosen_scenes():
    assert torch.equal(scenes.chosen("everything", 1, 2).images, scenes.scene(1, 2).images)
    assert torch.equal(scenes.chosen("one tree", 1, 2, (64, 48)).images, scenes.single("tree", 1, 2, (64, 48)).images)
    with pytest.raises(ValueError, match="'one cat' cannot be drawn; choose one of everything, one sun"):
        scenes.chosen("one cat", 1, 2)
    with pytest.raises(ValueError, match="no object 'cat'"):
        scenes.single("cat", 1, 2)


def test_object_mask_of_a_landscape(drawn):
    wanted = sum((drawn.labels == r) for r in (scenes.SUN, scenes.TREE, scenes.HOUSE, scenes.ROOF))
    assert torch.equal(scenes.object_mask(drawn.labels), wanted.float())
