"""The arithmetic of one step, and the checks at its edge."""

import math

import pytest
import torch
from semantic_style.samplers.finite import FiniteWatch
from semantic_style.samplers.steps import (
    ancestral_noise,
    call_model,
    check_latent,
    check_schedule,
    noise_prediction,
    posterior_mean,
)


def test_ancestral_noise_keeps_the_total_variance():
    s = torch.tensor([14.6, 3.0, 1.0, 0.03], dtype=torch.float64)
    t = torch.tensor([9.0, 2.999999, 0.5, 0.0], dtype=torch.float64)
    down, up = ancestral_noise(s, t)
    torch.testing.assert_close(down**2 + up**2, t**2)
    torch.testing.assert_close(down, t**2 / s)
    torch.testing.assert_close(up**2, t**2 * (s**2 - t**2) / s**2)


def test_posterior_mean_is_bayes_rule():
    """x = clean + s e; given x and clean, the latent at s' < s has the mean clean + (s'/s)^2 (x - clean)."""
    x, clean = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.25])
    s, t = torch.tensor(2.0), torch.tensor(0.5)
    torch.testing.assert_close(posterior_mean(x, clean, s, t), clean + (0.25**2) * (x - clean))
    assert torch.equal(posterior_mean(x, clean, s, torch.tensor(0.0)), clean)
    torch.testing.assert_close(noise_prediction(clean + 2.0 * x, clean, s), x)


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([1.0], "at least two"),
        ([3.0, 2.0, 2.0, 0.0], "step 1 goes from 2 to 2"),
        ([1.0, 2.0], "decrease"),
        ([1.0, math.nan], "NaN"),
        ([1.0, -1.0], "negative"),
    ],
)
def test_unusable_schedules(sigmas, message):
    with pytest.raises(ValueError, match=message):
        check_schedule(torch.tensor(sigmas))


def test_unusable_latents():
    with pytest.raises(ValueError, match="1 NaN or infinite"):
        check_latent(torch.tensor([[[1.0, math.inf]]]))
    with pytest.raises(ValueError, match="floating-point"):
        check_latent(torch.zeros(1, 4, 8, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="empty"):
        check_latent(torch.zeros(0, 4, 8, 8))


def test_bad_prediction_is_blamed_on_step_level_and_dtype():
    class Model:
        dtype = torch.float16

        def __call__(self, x, sigma):
            return torch.where((sigma < 2.0)[:, None, None], torch.nan, x)

    x = torch.zeros(4, 1, 1)
    with pytest.raises(FloatingPointError, match=r"step 11, sigma 1, .*float16"):
        call_model(Model(), x, torch.tensor([3.0, 3.0, 1.0, 1.0]), 10, {}, FiniteWatch())


def test_prediction_of_another_shape():
    with pytest.raises(ValueError, match=r"\[1, 2, 3\]"):
        call_model(lambda x, s: x[:, :, :-1], torch.zeros(1, 2, 4), torch.ones(1), 0, {}, FiniteWatch())
