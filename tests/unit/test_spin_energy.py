"""Spin's style energy in float64: values against loops, gradients against finite differences, exact zeros, refusals."""

import math

import pytest
import torch
from semantic_style.attention.layers import feature_blocks
from semantic_style.paperland.model import Paperland
from semantic_style.paperland.unet import UNetConfig
from semantic_style.regions.adain import EPS
from semantic_style.samplers.features import Features, FeatureTap
from semantic_style.samplers.guidance import energy_gradient
from semantic_style.samplers.inversion import Inversion
from semantic_style.samplers.spin_energy import SpinStyleTerm, style_distance
from semantic_style.samplers.terms import Resampled, Stream


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def soft_mask(*shape, seed=5):
    """With places inside, outside and between."""
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (2 * mask - 0.5).clamp(0, 1)


def box(h=8, w=12, rows=1):
    mask = torch.zeros(rows, h, w, dtype=torch.float64)
    mask[:, 2:6, 4:10] = 1
    return mask


def stream(rows=1, size=(8, 12)):
    sigmas = torch.tensor([2.0, 0.5, 0.0])
    trajectory = random(3, rows, 4, *size)
    return Stream(Inversion(kind="ddim", clean=trajectory[-1], trajectory=trajectory, sigmas=sigmas))


def weighted(values, weights):
    """Mean and standard deviation of numbers."""
    total = sum(weights)
    mean = sum(v * w for v, w in zip(values, weights, strict=True)) / total
    variance = sum(w * (v - mean) ** 2 for v, w in zip(values, weights, strict=True)) / total
    return mean, math.sqrt(variance + EPS)


@pytest.mark.parametrize("backgrounds", [1, 3])
@pytest.mark.parametrize("masks", [1, 3])
def test_the_distance_is_that_of_weighted_moments(backgrounds, masks):
    out, background, mask = random(3, 5, 4, 3), random(backgrounds, 5, 4, 3, seed=1), soft_mask(masks, 4, 3)
    distance = style_distance(out, background, mask)
    assert distance.shape == (3,)
    for b in range(3):
        inside = [float(v) for v in mask[min(b, masks - 1)].flatten()]
        outside = [1 - v for v in inside]
        total = 0.0
        for c in range(5):
            mu_in, sd_in = weighted(out[b, c].flatten().tolist(), inside)
            mu_bg, sd_bg = weighted(background[min(b, backgrounds - 1), c].flatten().tolist(), outside)
            total += ((mu_in - mu_bg) ** 2 + (sd_in - sd_bg) ** 2) / sd_bg**2
        assert distance[b].item() == pytest.approx(total / 5, rel=1e-12)


def test_the_energy_is_the_mean_over_stages_of_distances_times_places_inside():
    mask = box(8, 12)
    term = SpinStyleTerm(stream(), 1.0, mask=mask)
    out = Features((random(2, 6, 4, 6, seed=1), random(2, 3, 8, 12, seed=2)))
    background = Features((random(1, 6, 4, 6, seed=3), random(1, 3, 8, 12, seed=4)))
    coarse = torch.zeros(1, 4, 6, dtype=torch.float64)
    coarse[:, 1:3, 2:5] = 1
    parts = [
        style_distance(out.stages[0], background.stages[0], coarse) * 6,
        style_distance(out.stages[1], background.stages[1], mask) * 24,
    ]
    torch.testing.assert_close(term.value(out, background, None, Resampled()), (parts[0] + parts[1]) / 2)


def test_frames_of_a_window_have_their_own_masks():
    masks = soft_mask(4, 8, 12)
    term = SpinStyleTerm(stream(4), 1.0, mask=masks)
    out, background = (Features((random(2, 6, 4, 6, seed=s), random(2, 3, 8, 12, seed=s + 1))) for s in (1, 3))
    together = term.value(out, background, (3, 1), Resampled())
    for row, frame in enumerate((3, 1)):
        alone = SpinStyleTerm(stream(), 1.0, mask=masks[frame : frame + 1])
        torch.testing.assert_close(
            together[row : row + 1],
            alone.value(out.rows([row]), background.rows([row]), None, Resampled()),
            rtol=1e-12,
            atol=0,
        )


def test_gradients_are_those_of_finite_differences_and_only_of_the_inside():
    out, background, mask = random(2, 3, 4, 5).requires_grad_(), random(2, 3, 4, 5, seed=1), soft_mask(1, 4, 5)
    assert torch.autograd.gradcheck(lambda f: style_distance(f, background, mask), (out,))
    background.requires_grad_()
    (gradient, of_background) = torch.autograd.grad(
        style_distance(out, background, mask).sum(), (out, background), allow_unused=True
    )
    assert of_background is None
    outside = (mask == 0).expand(2, -1, -1)[:, None].expand_as(gradient)
    assert outside.any()
    assert torch.equal(gradient[outside], torch.zeros_like(gradient[outside]))
    assert gradient[~outside].abs().min() > 0


def test_equal_statistics_are_exactly_zero():
    # The inside repeats the outside's values in another order.
    background = random(1, 4, 2, 6)
    mask = torch.zeros(1, 2, 6, dtype=torch.float64)
    mask[:, 1] = 1
    out = random(1, 4, 2, 6, seed=9)
    out[:, :, 1] = background[:, :, 0].flip(-1)
    out.requires_grad_()
    distance = style_distance(out, background, mask)
    assert distance.item() < 1e-28
    (gradient,) = torch.autograd.grad(distance.sum(), out)
    assert float(gradient.abs().max()) < 1e-14


def test_the_scale_of_a_channel_does_not_count_and_flat_ones_are_finite():
    out, background, mask = random(1, 3, 4, 5), random(1, 3, 4, 5, seed=1), soft_mask(1, 4, 5)
    scale = torch.tensor([1.0, 100.0, 1e4], dtype=torch.float64)[None, :, None, None]
    expected = style_distance(out, background, mask, eps=0)
    torch.testing.assert_close(style_distance(out * scale, background * scale, mask, eps=0), expected)
    flat = torch.zeros(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(style_distance(flat, flat, mask).sum(), flat)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    half = style_distance(out.half(), background.half(), mask)
    assert half.dtype == torch.float32


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(1, 8, 12), "is empty"),
        (torch.ones(1, 8, 12), "is full"),
        (torch.zeros(2, 8, 12), "is empty"),
        (torch.stack([torch.zeros(8, 12), torch.ones(8, 12)]), "number 2 of the 2 masks is full"),
        (torch.full((1, 8, 12), math.nan), "not finite"),
    ],
)
def test_masks_without_inside_or_outside_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        SpinStyleTerm(stream(), 1.0, mask=mask)
    with pytest.raises(ValueError, match="0 or more"):
        SpinStyleTerm(stream(), -1.0, mask=box())


def test_a_step_along_the_gradient_brings_the_inside_nearer():
    torch.manual_seed(0)
    config = UNetConfig(channels=32, multipliers=(1, 1, 2), context_channels=16, head_channels=16)
    model = Paperland(config).double().eval().requires_grad_(False)
    x, prompt, level = random(1, 48, 8, 12), random(1, 5, 16, seed=1), 0.7
    background = stream()
    term = SpinStyleTerm(background, 1.0, mask=box())
    tap = FeatureTap(feature_blocks(model.unet), cut=True)
    sigma = torch.tensor([level], dtype=torch.float64)

    def seen(x):
        model(x, sigma, prompt, tap.options())
        return tap.read((8, 12))[0]

    features = {background.key: {None: seen(random(1, 48, 8, 12, seed=2))}}
    _, gradient, before = energy_gradient(
        x, level, (term,), lambda x: model(x, sigma, prompt, tap.options()), tap, features
    )
    assert gradient.abs().max() > 0
    after = term.value(seen(x - 1e-3 * gradient), features[background.key][None], None, Resampled())
    assert float(after) < float(before["spin style"])


def test_pictures_with_an_empty_mask_are_left_out():
    masks = box(rows=3)
    masks[1] = 0
    term = SpinStyleTerm(stream(), 1.0, mask=masks)
    term.check_fits((3, 4, 8, 12))
    stages = [random(3, 5, 4, 6, seed=1).requires_grad_(), random(3, 5, 8, 12, seed=2).requires_grad_()]
    background = Features((random(1, 5, 4, 6, seed=3), random(1, 5, 8, 12, seed=4)), ())
    values = term.value(Features(tuple(stages), ()), background, None, Resampled())
    assert values[1].item() == 0.0
    alone = SpinStyleTerm(stream(), 1.0, mask=box())
    kept = Features(tuple(s[[0, 2]] for s in stages), ())
    torch.testing.assert_close(values[[0, 2]], alone.value(kept, background, None, Resampled()))
    for gradient in torch.autograd.grad(values.sum(), stages):
        assert torch.isfinite(gradient).all()
        assert not gradient[1].any()
        assert gradient[0].any()
    window = Features(tuple(s[[1]] for s in stages), ())
    assert term.value(window, background, (1,), Resampled()).item() == 0.0


def test_what_does_not_fit_is_refused_before_the_run():
    term = SpinStyleTerm(stream(), 1.0, mask=box())
    term.check_fits((3, 4, 8, 12))
    with pytest.raises(ValueError, match="must have the same size"):
        term.check_fits((1, 4, 8, 8))
    with pytest.raises(ValueError, match="2 masks for 3 pictures"):
        SpinStyleTerm(stream(), 1.0, mask=box(rows=2)).check_fits((3, 4, 8, 12))
    # 24 places of the latent are 6 of the coarse stage; 12 are 3.
    thin = torch.zeros(1, 8, 12)
    thin[:, 2:4, 4:10] = 1
    with pytest.raises(ValueError, match=r"inside covers 3\.0 of 4x6 .* enlarge"):
        SpinStyleTerm(stream(), 1.0, mask=thin).check_fits((1, 4, 8, 12))
    with pytest.raises(ValueError, match=r"outside has 3\.0 of 4x6 .* shrink"):
        SpinStyleTerm(stream(), 1.0, mask=1 - thin).check_fits((1, 4, 8, 12))
