"""The measures on drawn pictures, where the ideal result can be drawn: the context's layout, the reference's style."""

import math

import pytest
import torch
import torch.nn.functional as F
from semantic_style.benchmarks import measure
from semantic_style.paperland import scenes
from semantic_style.regions.adain import adain

COUNT = 5
TWO = 2  # regions of the pictures put together by hand


@pytest.fixture(scope="module")
def pair():
    """Contexts, references and ideals."""
    layouts = [scenes.sample_layouts(COUNT, scenes.seeded(s)) for s in (21, 22)]
    styles = [scenes.sample_styles(COUNT, scenes.seeded(s)) for s in (23, 24)]
    return (
        scenes.draw(layouts[0], styles[0]),
        scenes.draw(layouts[1], styles[1]),
        scenes.draw(layouts[0], styles[1]),
    )


@pytest.fixture(scope="module")
def score(pair):
    """Style [B], structure [B] and combined score [B] of pictures made for the pairs."""
    context, reference, ideal = pair

    def distance(images):
        found = measure.style_distance(images, context.labels, reference.images, reference.labels)
        return found.by_area(found.both)

    untouched, best = distance(context.images), distance(ideal.images)

    def of(images):
        style = measure.style_score(distance(images), untouched, best)
        kept = measure.structure(images, context.images, context.labels).both
        return style, kept, measure.combined_score(style, kept)

    return of


def blurred(images, spread):
    kernel = torch.exp(-(torch.arange(-12, 13) ** 2) / (2 * spread**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    x = F.pad(images.movedim(-1, 1), [12] * 4, mode="replicate")
    return F.conv2d(F.conv2d(x, kernel, groups=3), kernel.transpose(2, 3), groups=3).movedim(1, -1)


def noisy(images, spread):
    return (images + spread * torch.randn(images.shape, generator=torch.Generator().manual_seed(5))).clamp(0, 1)


def scrambled(images):
    order = torch.randperm(images[0, ..., 0].numel(), generator=torch.Generator().manual_seed(5))
    return images.flatten(1, 2)[:, order].view_as(images)


def halves(left, right):
    """One picture [1, 64, 64, 3] of two textures side by side, and its labels."""
    labels = torch.zeros(1, 64, 64, dtype=torch.long)
    labels[:, :, 32:] = 1
    return torch.cat([left, right], dim=2), labels


def stripes(period, angle, low=0.2, high=0.8, size=(64, 32)):
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    wave = torch.sin(2 * math.pi * (x * math.cos(angle) + y * math.sin(angle)) / period)
    return (low + (high - low) * (wave + 1) / 2)[None, ..., None].expand(-1, -1, -1, 3)


def test_oklab_of_known_colors():
    """Figures of Ottosson's page on OKLab (to its three digits)."""
    known = {
        (1.0, 1.0, 1.0): (1.000, 0.000, 0.000),
        (1.0, 0.0, 0.0): (0.628, 0.225, 0.126),
        (0.0, 1.0, 0.0): (0.866, -0.234, 0.179),
        (0.0, 0.0, 1.0): (0.452, -0.032, -0.312),
        (0.0, 0.0, 0.0): (0.0, 0.0, 0.0),
    }
    found = measure.oklab(torch.tensor(list(known)))
    assert torch.allclose(found, torch.tensor(list(known.values())), atol=2e-3)


def test_color_distance_of_flat_pictures_is_that_of_their_colors():
    a, b = torch.tensor([0.8, 0.3, 0.2]), torch.tensor([0.2, 0.4, 0.7])
    labels = torch.zeros(1, 32, 32, dtype=torch.long)
    images, others = (c.expand(1, 32, 32, 3) for c in (a, b))
    found = measure.style_distance(images, labels, others, labels, 1)
    expected = (measure.oklab(a) - measure.oklab(b)).norm().item()
    assert found.color.item() == pytest.approx(expected, rel=0.03)
    assert found.texture.item() == pytest.approx(0, abs=1e-5)


def test_color_distance_sees_spread_where_the_mean_is_the_same():
    labels = torch.zeros(1, 64, 32, dtype=torch.long)
    strong, weak = stripes(8, 0.0, 0.2, 0.8), stripes(8, 0.0, 0.45, 0.55)
    assert measure.style_distance(strong, labels, weak, labels, 1).color.item() > 0.1


def test_texture_tells_scale_and_direction_but_not_place_or_color():
    labels = torch.zeros(1, 128, 128, dtype=torch.long)
    base = stripes(12, 0.0, size=(128, 128))

    def texture(other):
        return measure.style_distance(base, labels, other, labels, 1).texture.item()

    assert texture(base.roll(5, 2)) < 0.05
    assert texture(base * torch.tensor([0.9, 0.7, 0.5])) < 0.1
    assert texture(stripes(24, 0.0, size=(128, 128))) > 0.7
    assert texture(stripes(12, math.pi / 2, size=(128, 128))) > 0.7
    assert texture(torch.full_like(base, 0.5)) > 0.7


def test_texture_does_not_see_the_shape_of_the_region():
    """The same stripes through a disc and through a square, on different grounds."""
    y, x = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")
    disc = (torch.hypot(x - 64.0, y - 64.0) < 30).long()[None]
    square = ((x > 10) & (x < 90) & (y > 60) & (y < 120)).long()[None]
    wave = stripes(12, 0.5, size=(128, 128))
    images = [torch.where(m[..., None] > 0, wave, g) for m, g in ((disc, 0.0), (square, 1.0))]
    assert measure.style_distance(images[0], disc, images[1], square, TWO).texture[0, 1] < 0.15


def test_autocorrelation_counts_pairs():
    values = torch.rand(1, 30, 41, generator=torch.Generator().manual_seed(1))
    found = measure._autocorrelation(values)[0]
    for dy, dx in ((0, 0), (3, 5), (-4, 2), (24, -24)):
        h, w = 30 - abs(dy), 41 - abs(dx)
        a = values[0, max(0, -dy) :][:h, max(0, -dx) :][:, :w]
        b = values[0, max(0, dy) :][:h, max(0, dx) :][:, :w]
        assert found[measure.LAG + dy, measure.LAG + dx].item() == pytest.approx((a * b).sum().item(), abs=1e-3)


def test_bands_divide_the_variance():
    bank = measure._bank()
    lag = measure.LAG
    assert len(bank) == (2 * lag + 1) ** 2
    whole = bank.sum(dim=1).view(2 * lag + 1, -1)
    expected = torch.zeros_like(whole)
    expected[lag, lag] = 1
    assert torch.allclose(whole, expected, atol=1e-5)


def test_a_picture_is_its_own_reference(pair):
    _, reference, _ = pair
    found = measure.style_distance(reference.images, reference.labels, reference.images, reference.labels)
    assert found.both.abs().max() < 1e-5


def test_the_ideal_is_far_nearer_than_the_context(pair):
    context, reference, ideal = pair
    near, far = (
        measure.style_distance(s.images, context.labels, reference.images, reference.labels) for s in (ideal, context)
    )
    assert (near.by_area(near.color) < 0.2 * far.by_area(far.color)).all()
    assert (near.by_area(near.both) < 0.5 * far.by_area(far.both)).all()
    assert near.by_region(near.both).mean() < 0.3 * far.by_region(far.both).mean()


def test_the_ideal_keeps_the_structure_and_scores_best(pair, score):
    context, reference, ideal = pair
    style, kept, combined = score(ideal.images)
    assert torch.allclose(style, torch.ones(COUNT))
    assert kept.mean() > 0.9
    matched = adain(context.images.movedim(-1, 1), reference.images.movedim(-1, 1)).movedim(1, -1).clamp(0, 1)
    moved = score(matched)
    assert moved[1].mean() > 0.9
    assert (combined > moved[2] + 0.3).all()
    untouched = score(context.images)
    assert torch.allclose(untouched[0], torch.zeros(COUNT), atol=1e-6)
    assert torch.equal(untouched[1], torch.ones(COUNT))
    assert untouched[2].abs().max() < 1e-3


def test_the_reference_has_no_structure_of_the_context(pair, score):
    _, reference, ideal = pair
    _, kept, combined = score(reference.images)
    assert (kept < 0.7).all()
    assert kept.mean() < 0.5
    assert combined.mean() < score(ideal.images)[2].mean() - 0.3


def test_layout_of_the_reference_that_leaks_in_costs_structure(pair, score):
    _, reference, ideal = pair
    shares = (0.0, 0.3, 0.5, 0.7)
    kept = [score(torch.lerp(ideal.images, reference.images, s))[1].mean().item() for s in shares]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] - kept[2] > 0.1
    assert kept[0] - kept[3] > 0.25


@pytest.mark.parametrize(
    ("spoil", "most"),
    [
        (scrambled, 0.1),
        (lambda images: blurred(images, 5.0), 0.87),
        (lambda images: noisy(images, 0.3), 0.5),
        (lambda images: images.roll(4, 1), 0.65),
        (lambda images: images.mean(dim=(1, 2), keepdim=True).expand_as(images), 0.05),
    ],
    ids=["scrambled", "blurred", "noisy", "shifted", "gray"],
)
def test_spoilt_pictures_lose_structure_and_score(pair, score, spoil, most):
    ideal = pair[2]
    _, kept, combined = score(spoil(ideal.images))
    _, whole, best = score(ideal.images)
    assert kept.mean() < most
    assert kept.mean() < whole.mean() - 0.1
    assert combined.mean() < best.mean() - 0.2


def test_another_style_keeps_the_structure_but_is_no_nearer(score):
    layouts = scenes.sample_layouts(COUNT, scenes.seeded(21))
    other = scenes.draw(layouts, scenes.sample_styles(COUNT, scenes.seeded(99)))
    style, kept, _ = score(other.images)
    assert style.mean() < 0.2
    assert kept.mean() > 0.9


def test_swapped_styles_of_two_regions_are_seen(pair):
    """Two halves exchanged: the colours of the whole picture stay exactly the same."""
    left, right = stripes(8, 0.0) * torch.tensor([0.9, 0.5, 0.3]), stripes(8, 1.57) * torch.tensor([0.3, 0.6, 0.9])
    right_way, labels = halves(left, right)
    swapped, _ = halves(right, left)
    assert torch.equal(right_way.flatten(0, 2).sort(dim=0).values, swapped.flatten(0, 2).sort(dim=0).values)
    good, bad = (measure.style_distance(p, labels, right_way, labels, TWO) for p in (right_way, swapped))
    assert good.both.max() < 1e-5
    assert bad.both.min() > 0.7


def test_swapped_styles_in_a_scene(score):
    layouts, styles = scenes.sample_layouts(COUNT, scenes.seeded(21)), scenes.sample_styles(COUNT, scenes.seeded(24))
    order = list(range(len(scenes.REGIONS)))
    order[scenes.SKY], order[scenes.HILL] = scenes.HILL, scenes.SKY
    swapped = scenes.draw(layouts, scenes.Styles(**{name: value[:, order] for name, value in vars(styles).items()}))
    style, kept, _ = score(swapped.images)
    assert style.mean() < 0.5
    assert kept.mean() > 0.9


def test_regions_of_one_side_do_not_count(pair):
    context, reference, _ = pair
    only_sky = torch.full_like(reference.labels, scenes.SKY)
    found = measure.style_distance(context.images, context.labels, reference.images, only_sky)
    assert torch.equal(found.share > 0, F.one_hot(torch.zeros(COUNT, dtype=torch.long), len(scenes.REGIONS)).bool())
    assert (found.share.sum(dim=1) - 1).abs().max() < 1e-6
    assert (found.both[:, 1:] == 0).all()
    no_common = measure.style_distance(
        context.images, torch.full_like(context.labels, scenes.SUN), reference.images, only_sky
    )
    assert no_common.by_area(no_common.both).abs().max() == 0
    assert no_common.by_region(no_common.both).abs().max() == 0


def test_tiny_regions_do_not_count():
    images, labels = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 128, 128)
    labels = labels.long()
    labels[0, :9, :9] = 1
    assert measure.style_distance(images, labels, images, labels, TWO).share.tolist() == [[1.0, 0.0]]


def test_pictures_of_any_size():
    layout, styles = (
        scenes.sample_layouts(1, scenes.seeded(21)),
        [scenes.sample_styles(1, scenes.seeded(s)) for s in (23, 24)],
    )
    reference_layout = scenes.sample_layouts(1, scenes.seeded(22))
    small = scenes.draw(reference_layout, styles[1])
    large = scenes.draw(reference_layout, styles[1], (256, 200))
    for size in ((128, 128), (128, 176), (192, 160)):
        context, ideal = (scenes.draw(layout, s, size) for s in styles)
        for reference in (small, large):
            good, bad = (
                measure.style_distance(p.images, context.labels, reference.images, reference.labels)
                for p in (ideal, context)
            )
            assert good.by_area(good.both) < 0.3 * bad.by_area(bad.both)
        assert measure.structure(context.images, context.images, context.labels).both.item() == 1
        assert measure.structure(ideal.images, context.images, context.labels).both > 0.8
        assert measure.structure(scrambled(ideal.images), context.images, context.labels).both < 0.2


def test_the_measures_are_deterministic_and_leave_their_inputs_alone(pair):
    context, reference, ideal = pair
    before = ideal.images.clone()
    torch.manual_seed(3)
    first = measure.style_distance(ideal.images, context.labels, reference.images, reference.labels)
    kept = measure.structure(ideal.images, context.images, context.labels)
    torch.manual_seed(4)
    second = measure.style_distance(ideal.images, context.labels, reference.images, reference.labels)
    again = measure.structure(ideal.images, context.images, context.labels)
    assert torch.equal(first.both, second.both)
    assert torch.equal(kept.both, again.both)
    assert torch.equal(ideal.images, before)


def test_a_row_does_not_depend_on_the_others(pair):
    context, reference, ideal = pair
    whole = measure.style_distance(ideal.images, context.labels, reference.images, reference.labels)
    one = measure.style_distance(ideal.images[3:4], context.labels[3:4], reference.images[3:4], reference.labels[3:4])
    assert torch.allclose(whole.both[3:4], one.both, atol=1e-5)


def test_combined_score_by_hand():
    style, kept = torch.tensor([0.64, 0.0, -0.3, 1.2]), torch.tensor([0.25, 1.0, 1.0, 0.81])
    assert torch.allclose(measure.combined_score(style, kept), torch.tensor([0.4, 0.0, 0.0, 0.9]))


def test_one_region_has_no_border_to_lose():
    images = scenes.scene(1, 1).images
    labels = torch.zeros(1, 128, 128, dtype=torch.long)
    kept = measure.structure(images, images, labels)
    assert torch.isfinite(kept.both).all()


UNLABELLED = {"edges": measure.edges_kept, "likeness": measure.likeness_kept}


@pytest.mark.parametrize("kept", UNLABELLED.values(), ids=list(UNLABELLED))
def test_what_is_kept_without_labels(pair, kept):
    """The context keeps all, another style of it much, another scene hardly anything, a flat picture nothing."""
    context, reference, ideal = pair
    assert torch.allclose(kept(context.images, context.images), torch.ones(COUNT), atol=1e-5)
    assert kept(ideal.images, context.images).mean() > kept(reference.images, context.images).mean() + 0.1
    assert kept(scrambled(context.images), context.images).abs().mean() < 0.25
    assert torch.equal(kept(torch.full_like(context.images, 0.5), context.images), torch.zeros(COUNT))
    darker = (context.images * 0.8).clamp(0, 1)
    assert (kept(darker, context.images) > 0.95).all(), "less contrast costs little"


@pytest.mark.parametrize("kept", UNLABELLED.values(), ids=list(UNLABELLED))
def test_more_damage_costs_more_without_labels(pair, kept):
    context, reference, _ = pair
    images = context.images
    damages = {
        "another scene": [torch.lerp(images, reference.images, share) for share in (0.0, 0.3, 0.6, 0.9)],
        "shifted": [images.roll(pixels, 1) for pixels in (0, 2, 6, 12)],
        "noisy": [noisy(images, spread) for spread in (0.0, 0.1, 0.3, 0.6)],
    }
    for name, spoilt in damages.items():
        found = [kept(one, images).mean().item() for one in spoilt]
        assert found == sorted(found, reverse=True), f"{name}: {found}"
        assert found[0] - found[-1] > 0.1, f"{name}: {found}"


def test_blur_costs_edges(pair):
    context, _, _ = pair
    found = [measure.edges_kept(blurred(context.images, spread), context.images).mean() for spread in (0.3, 2.0, 5.0)]
    assert found == sorted(found, reverse=True)
    assert found[2] < 0.7


def test_what_is_kept_without_labels_in_pictures_of_another_size(pair):
    large = F.interpolate(pair[0].images.movedim(-1, 1), scale_factor=2, mode="nearest").movedim(1, -1)
    for kept in UNLABELLED.values():
        assert torch.allclose(kept(large, large), torch.ones(COUNT), atol=1e-5)
        with pytest.raises(ValueError, match="of one shape"):
            kept(large, pair[0].images)


def test_refusals(pair):
    context, reference, _ = pair
    with pytest.raises(ValueError, match=r"image: expected a picture .* of its size"):
        measure.style_distance(context.images, context.labels[:, 1:], reference.images, reference.labels)
    with pytest.raises(ValueError, match="5 images and 1 references"):
        measure.style_distance(context.images, context.labels, reference.images[:1], reference.labels[:1])
    with pytest.raises(ValueError, match="labels: expected 0 to 2"):
        measure.structure(context.images, context.images, context.labels, 3)
    with pytest.raises(ValueError, match="context: expected a picture"):
        measure.structure(context.images, context.images[:, ::2], context.labels)
