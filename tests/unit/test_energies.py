"""Semantix's energies in float64: values against explicit loops, gradients against finite differences, exact zeros."""

import math

import pytest
import torch
from semantic_style.samplers.energies import (
    EPS,
    semantic_distance,
    spatial_feature_energy,
    style_feature_energy,
    unit,
)


def random(*shape, seed=0, grad=False):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.requires_grad_(grad)


def indices(*shape, below, seed=0):
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed))


def one_minus_cosine(u, v):
    """Of two vectors, channel by channel, without any eps."""
    dot = sum(float(a) * float(b) for a, b in zip(u, v, strict=True))
    return 1 - dot / math.sqrt(sum(float(a) ** 2 for a in u) * sum(float(b) ** 2 for b in v))


@pytest.mark.parametrize("references", [1, 3])
def test_style_energy_is_the_sum_over_places(references):
    # Not square, and the reference has another resolution and aspect ratio.
    out, reference = random(3, 5, 4, 3), random(references, 5, 2, 7, seed=1)
    matches = indices(3, 12, below=14)
    energy = style_feature_energy(out, reference, matches)
    assert energy.shape == (3,)
    for b in range(3):
        total = 0.0
        for i in range(12):
            j = int(matches[b, i])
            f_ref = reference[min(b, references - 1), :, j // 7, j % 7]
            total += one_minus_cosine(out[b, :, i // 3, i % 3], f_ref)
        # eps 1e-4 in the length of vectors of about 2: 1e-8 of each place.
        assert energy[b].item() == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("masks", [1, 3])
def test_a_mask_weighs_the_places_of_the_style_energy(masks):
    out, reference = random(3, 5, 4, 3), random(1, 5, 2, 7, seed=1)
    matches, mask = indices(3, 12, below=14), random(masks, 4, 3, seed=2).sigmoid()
    energy = style_feature_energy(out, reference, matches, mask)
    for b in range(3):
        total = 0.0
        for i in range(12):
            f_ref = reference[0, :, int(matches[b, i]) // 7, int(matches[b, i]) % 7]
            weight = float(mask[min(b, masks - 1), i // 3, i % 3])
            total += weight * one_minus_cosine(out[b, :, i // 3, i % 3], f_ref)
        assert energy[b].item() == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("contexts", [1, 3])
def test_spatial_energy_is_the_sum_over_places(contexts):
    out, context = random(3, 6, 2, 5), random(contexts, 6, 2, 5, seed=1)
    energy = spatial_feature_energy(out, context)
    for b in range(3):
        total = sum(
            one_minus_cosine(out[b, :, y, x], context[min(b, contexts - 1), :, y, x])
            for y in range(2)
            for x in range(5)
        )
        assert energy[b].item() == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("contexts", [1, 3])
def test_semantic_distance_is_the_sum_over_places_without_the_first_token(contexts):
    out, context = random(3, 6, 4), random(contexts, 6, 4, seed=1)
    energy = semantic_distance(out, context)
    for b in range(3):
        total = 0.0
        for i in range(6):
            for t in range(1, 4):
                total += float(out[b, i, t] - context[min(b, contexts - 1), i, t]) ** 2
        assert energy[b].item() == pytest.approx(total, rel=1e-12)
    out[..., 0] += 5
    torch.testing.assert_close(semantic_distance(out, context), energy, rtol=0, atol=0)


def test_gradients_match_finite_differences():
    out, other = random(2, 4, 3, 2, grad=True), random(1, 4, 2, 5, seed=1)
    matches = indices(2, 6, below=10)
    assert torch.autograd.gradcheck(lambda x: style_feature_energy(x, other, matches), (out,))
    context = random(2, 4, 3, 2, seed=2)
    assert torch.autograd.gradcheck(lambda x: spatial_feature_energy(x, context), (out,))
    a, a_c = random(2, 6, 5, grad=True), random(1, 6, 5, seed=3)
    assert torch.autograd.gradcheck(lambda x: semantic_distance(x, a_c), (a,))
    assert torch.autograd.gradcheck(lambda x: unit(x, eps=0.3), (out,))


def test_gradient_flows_to_out_only():
    out, other = random(2, 4, 3, 2, grad=True), random(2, 4, 3, 2, seed=1, grad=True)
    a, a_c = random(2, 6, 5, grad=True), random(2, 6, 5, seed=2, grad=True)
    total = style_feature_energy(out, other, indices(2, 6, below=6)) + spatial_feature_energy(out, other)
    (total + semantic_distance(a, a_c)).sum().backward()
    assert (out.grad != 0).any()
    assert (a.grad != 0).any()
    assert other.grad is None
    assert a_c.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_exactly_zero_where_out_is_the_context(dtype):
    out = random(2, 4, 3, 5).to(dtype)
    out[0, :, 1, 1] = 0  # a zero vector, too
    out.requires_grad_()
    a = random(2, 6, 5).to(dtype).requires_grad_()
    energy = spatial_feature_energy(out, out) + semantic_distance(a, a)
    energy.sum().backward()
    assert torch.equal(energy, torch.zeros(2, dtype=energy.dtype))
    assert torch.equal(out.grad, torch.zeros_like(out))
    assert torch.equal(a.grad, torch.zeros_like(a))


def test_exactly_zero_where_out_has_the_features_of_its_matches():
    reference, matches = random(1, 4, 2, 7), indices(3, 15, below=14)
    out = reference.flatten(2)[0][:, matches].transpose(0, 1).unflatten(2, (3, 5)).clone().requires_grad_()
    energy = style_feature_energy(out, reference, matches)
    energy.sum().backward()
    assert torch.equal(energy, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(out.grad, torch.zeros_like(out))


def test_the_length_of_a_feature_does_not_count():
    out, context = random(1, 4, 3, 3), random(1, 4, 3, 3, seed=1)
    torch.testing.assert_close(
        spatial_feature_energy(7 * out, context), spatial_feature_energy(out, context / 3), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_zero_feature_vector_gives_finite_values_and_bounded_gradients(dtype):
    out = random(1, 4, 2, 2, seed=1).to(dtype)
    out[..., 0, 0] = 0
    out.requires_grad_()
    other = random(1, 4, 2, 2, seed=2).to(dtype)
    other[..., 1, 1] = 0
    energy = style_feature_energy(out, other, torch.arange(4)[None]) + spatial_feature_energy(out, other)
    energy.sum().backward()
    assert torch.isfinite(energy).all()
    assert torch.isfinite(out.grad).all()
    # Two energies, each with a derivative of the unit vector of at most 1/eps.
    assert out.grad.float().norm() <= 2 / EPS * 1.01


def test_unit_is_smooth_at_zero():
    assert torch.equal(unit(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))
    f = random(2, 3, 4)
    expected = torch.stack([v / math.sqrt(float(v.square().sum()) + EPS**2) for v in f.movedim(1, -1).reshape(-1, 3)])
    torch.testing.assert_close(unit(f).movedim(1, -1).reshape(-1, 3), expected)


def test_half_precision_is_computed_in_float32():
    # 300^2 is more than half precision holds.
    out, context = (300 * random(1, 8, 3, 3, seed=s) for s in range(2))
    expected = spatial_feature_energy(out, context)
    for dtype, error in ((torch.float16, 1e-3), (torch.bfloat16, 1e-2)):
        energy = spatial_feature_energy(out.to(dtype), context.to(dtype))
        assert energy.dtype == torch.float32
        torch.testing.assert_close(energy.double(), expected, rtol=error, atol=0)
        assert semantic_distance(out[0].to(dtype), context[0].to(dtype)).dtype == torch.float32


def test_arguments_are_left_as_they_are():
    out, other, matches = random(1, 4, 3, 3), random(1, 4, 3, 3, seed=1), indices(1, 9, below=9)
    copies = [t.clone() for t in (out, other, matches)]
    style_feature_energy(out, other, matches)
    spatial_feature_energy(out, other)
    semantic_distance(out[0], other[0])
    assert all(torch.equal(a, b) for a, b in zip((out, other, matches), copies, strict=True))


@pytest.mark.parametrize(
    ("out", "other", "message"),
    [
        ((1, 4, 3, 3), (1, 8, 3, 3), "4 channels and context 8"),
        ((1, 4, 3, 3), (1, 4, 3, 4), "same grid"),
        ((3, 4, 3, 3), (2, 4, 3, 3), "3 images and 2"),
        ((4, 3, 3), (1, 4, 3, 3), "features of out"),
        ((1, 4, 3, 3), (1, 4, 0, 3), "features of context"),
    ],
)
def test_spatial_energy_refuses_what_does_not_fit(out, other, message):
    with pytest.raises(ValueError, match=message):
        spatial_feature_energy(torch.zeros(out), torch.zeros(other))


@pytest.mark.parametrize(
    ("matches", "message"),
    [
        (torch.zeros(1, 8, dtype=torch.int64), r"int64 \[1, 9\]"),
        (torch.zeros(2, 9, dtype=torch.int64), r"int64 \[1, 9\]"),
        (torch.zeros(1, 9), "float32"),
    ],
)
def test_style_energy_refuses_matches_of_something_else(matches, message):
    with pytest.raises(ValueError, match=message):
        style_feature_energy(torch.zeros(1, 4, 3, 3), torch.zeros(1, 4, 2, 2), matches)


def test_style_energy_refuses_another_models_features():
    with pytest.raises(ValueError, match="4 channels and reference 8"):
        style_feature_energy(torch.zeros(1, 4, 3, 3), torch.zeros(1, 8, 3, 3), torch.zeros(1, 9, dtype=torch.int64))


@pytest.mark.parametrize(
    ("out", "context", "message"),
    [
        ((1, 6, 77), (1, 6, 154), "77 tokens and that of context over 154"),
        ((1, 6, 77), (1, 8, 77), "6 positions and that of context 8"),
        ((3, 6, 5), (2, 6, 5), "3 images and 2"),
        ((1, 6, 1), (1, 6, 1), "have no other"),
        ((6, 5), (6, 5), "positions, tokens"),
    ],
)
def test_semantic_distance_refuses_what_does_not_fit(out, context, message):
    with pytest.raises(ValueError, match=message):
        semantic_distance(torch.zeros(out), torch.zeros(context))
