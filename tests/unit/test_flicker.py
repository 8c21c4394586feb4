"""The flicker measure against clips whose flicker is known."""

import pytest
import torch
from semantic_style.paperland.motion import clip
from semantic_style.pictures.flicker import flicker, moving


@pytest.fixture(scope="module")
def moved():
    return clip(5, 5, 5, (64, 64))


def still_clip(frames=4, size=(12, 20)):
    return torch.rand(1, *size, 3, generator=torch.Generator().manual_seed(0)).expand(frames, -1, -1, -1)


def test_the_clip_itself_has_no_excess(moved):
    result = flicker(moved.images, moved.images, moved.labels)
    assert result.excess == 0
    assert result.context == 0
    assert 0.1 < result.share < 0.9


def test_another_still_painting_of_a_still_clip_does_not_flicker():
    context = still_clip()
    assert flicker(1 - context, context).out == 0


def test_flicker_of_known_amplitude():
    context = still_clip(5)
    up_and_down = torch.tensor([0.25, -0.25, 0.25, -0.25, 0.25])[:, None, None, None]
    result = flicker(context + up_and_down, context)
    assert result.out == pytest.approx(0.5)
    assert result.context == 0
    assert result.excess == pytest.approx(0.5)
    assert result.share == 1


def test_noise_of_known_amplitude():
    """The difference of two independent normal numbers has mean absolute value 2 sigma / sqrt(pi)."""
    context = still_clip(9, (64, 64)).double()
    noise = torch.randn(context.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    result = flicker(context + 0.1 * noise, context)
    assert result.excess == pytest.approx(0.2 / torch.pi**0.5, rel=0.01)


def test_a_noisy_context_is_reported_and_taken_off():
    context = still_clip(4) + torch.tensor([0.0, 0.01, 0.0, 0.01])[:, None, None, None]
    result = flicker(context + torch.tensor([0.0, 0.02, 0.0, 0.02])[:, None, None, None], context)
    assert result.context == pytest.approx(0.01, abs=1e-6)
    assert result.out == pytest.approx(0.03, abs=1e-6)
    assert result.excess == pytest.approx(0.02, abs=1e-6)


def test_what_moves_in_the_context_may_move(moved):
    """A clip recoloured region by region, as restyling does: its moving parts change by other amounts."""
    repainted = moved.images.flip(-1) * 0.5
    assert flicker(repainted, moved.images, moved.labels).out == 0
    assert (repainted[1:] - repainted[:-1]).abs().mean() > 0.01


def test_labels_mask_what_moves_without_a_change_of_colour():
    context, labels = still_clip(2), torch.zeros(2, 12, 20, dtype=torch.long)
    labels[1, 5, 7] = 1
    out = context.clone()
    out[1, 5, 7] += 0.5
    assert flicker(out, context, labels, margin=0).out == 0
    assert flicker(out, context, margin=0).out == pytest.approx(0.5 / (12 * 20), rel=1e-5)


@pytest.mark.parametrize("margin", [0, 1, 3])
def test_the_margin_in_pixels(margin):
    context = torch.zeros(3, 15, 17, 3)
    context[1, 7, 8] = 1
    expected = torch.zeros(2, 15, 17, dtype=torch.bool)
    expected[:, 7 - margin : 8 + margin, 8 - margin : 9 + margin] = True
    assert torch.equal(moving(context, margin=margin), expected)


def test_more_flicker_counts_more():
    context = still_clip(6)
    noise = torch.randn(context.shape, generator=torch.Generator().manual_seed(2))
    values = [flicker(context + a * noise, context).excess for a in (0.0, 0.05, 0.1)]
    assert values[0] == 0
    assert values[2] == pytest.approx(2 * values[1], rel=1e-4)


def test_it_says_what_it_measured():
    result = flicker(still_clip() + torch.tensor([0.0, 0.5, 0.0, 0.5])[:, None, None, None], still_clip())
    assert str(result) == "flicker 0.5000, context 0.0000, excess +0.5000 on 100% of pixels"


def test_refusals(moved):
    images = moved.images
    with pytest.raises(ValueError, match="at least two frames"):
        flicker(images[:1], images[:1])
    with pytest.raises(ValueError, match="same frames and size"):
        flicker(images[:-1], images)
    with pytest.raises(ValueError, match="must agree"):
        flicker(images, images, moved.labels[1:])
    with pytest.raises(ValueError, match=r"moves everywhere.*raise `still`"):
        flicker(images, torch.rand_like(images))
