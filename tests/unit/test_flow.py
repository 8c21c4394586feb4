"""Inversion and replay of flow models, on an exact one in float64.

The exact model: data ~ N(MEAN, STD^2) for every element, latents `x = a clean + s e` with `a = 1 - s`, so `denoised =
(a STD^2 x + s^2 MEAN) / (a^2 STD^2 + s^2)`, and the probability-flow ODE has the closed solution `x(s) = a MEAN +
(x(0) - MEAN) sqrt(a^2 + s^2/STD^2)`. With `a = 1` that is the variance-exploding model of the same data.
"""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from semantic_style.files.inversion_file import load_inversion, save_inversion
from semantic_style.samplers.ddim_inversion import ddim_inversion
from semantic_style.samplers.ddpm_inversion import ddpm_inversion
from semantic_style.samplers.inversion import Inversion
from semantic_style.samplers.replay import replay
from semantic_style.samplers.step_adain import StepAdaIN
from semantic_style.samplers.steps import FLOW, VE, ancestral_noise, deterministic_step, noise_prediction

MEAN, STD = 0.3, 0.8


class Gaussian:
    """The exact denoiser on either path, with classifier-free guidance; counts its calls."""

    def __init__(self, path=FLOW, shift=0.0, cfg=1.0):
        self.path, self.shift, self.cfg, self.calls = path, shift, cfg, 0

    def __call__(self, x, sigma):
        self.calls += 1
        s = sigma.reshape(-1, *[1] * (x.ndim - 1))
        a = 1 - s if self.path == FLOW else torch.ones_like(s)
        prompt, empty = (
            (a * STD**2 * x + s.square() * (MEAN + d)) / ((a * STD).square() + s.square()) for d in (self.shift, 0.0)
        )
        return empty + self.cfg * (prompt - empty)


def latent(*shape, seed=3):
    return MEAN + STD * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def schedule(n, shift=3.0, high=1.0):
    """SD3's: evenly spaced times, moved towards noise."""
    t = torch.linspace(high, 0, n + 1, dtype=torch.float64)
    return shift * t / (1 + (shift - 1) * t)


@pytest.mark.parametrize("shape", [(1, 16, 8, 8), (3, 16, 7, 5), (2, 16, 3, 5, 6), (1, 128, 4, 4)])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_replay_gives_the_clean_latent_back(shape, cfg):
    clean, model = latent(*shape), Gaussian(shift=0.25, cfg=cfg)
    inversion = ddpm_inversion(model, clean, schedule(20), path=FLOW, batch_steps=3)
    assert inversion.path == FLOW
    for skip in (0, 1, 19):
        start = inversion.trajectory[skip]
        out = replay(model, start, inversion.sigmas[skip:], inversion=inversion)
        torch.testing.assert_close(out, clean, rtol=0, atol=1e-12)


def test_float32_is_exact_to_rounding():
    clean, model = latent(2, 16, 6, 6).float(), Gaussian(shift=0.25, cfg=4.0)
    inversion = ddpm_inversion(model, clean, schedule(50).float(), path=FLOW)
    out = replay(model, inversion.trajectory[0], inversion.sigmas, inversion=inversion)
    assert (out - clean).abs().max() < 1e-5


def test_the_first_step_from_pure_noise_forgets_it():
    s, t = torch.tensor([1.0, 0.6], dtype=torch.float64), torch.tensor([0.7, 0.0], dtype=torch.float64)
    down, up = ancestral_noise(s, t, FLOW)
    assert down.tolist() == [0.0, 0.0]
    torch.testing.assert_close(up, t)
    model = Gaussian()
    inversion = ddpm_inversion(model, latent(1, 4, 4, 4), schedule(6), path=FLOW)
    assert inversion.sigmas[0] == 1.0
    # Whatever the noise is, the mean of the step is what the model predicts; here that does not depend on it either.
    for start in (inversion.trajectory[0], torch.zeros_like(inversion.clean)):
        out = replay(model, start, inversion.sigmas, inversion=inversion)
        torch.testing.assert_close(out, inversion.clean, rtol=0, atol=1e-12)


def test_noise_keeps_its_variance_and_close_levels_their_difference():
    s = torch.tensor([0.999, 0.5, 0.3, 0.2], dtype=torch.float64)
    t = torch.tensor([0.99, 0.499999, 0.05, 1e-3], dtype=torch.float64)
    down, up = ancestral_noise(s, t, FLOW)
    torch.testing.assert_close(down**2 + up**2, t**2)
    r = (t / (1 - t)) / (s / (1 - s))
    torch.testing.assert_close(down, r * t)
    _, coarse = ancestral_noise(s.float(), t.float(), FLOW)
    torch.testing.assert_close(coarse.double(), up, rtol=1e-1, atol=0)


def test_both_paths_are_the_same_for_the_same_model():
    """`x_flow = a x_ve` at `s_ve = s/a`: every latent, map and edit agrees."""
    clean, levels = latent(2, 4, 5, 5), schedule(12, high=0.98)
    noise = torch.randn(12, *clean.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    share = (1 - levels).reshape(-1, 1, 1, 1, 1)
    flow = ddpm_inversion(Gaussian(FLOW, 0.25, 3.0), clean, levels, path=FLOW, noise=noise)
    exploding = ddpm_inversion(Gaussian(VE, 0.25, 3.0), clean, levels / (1 - levels), noise=noise)
    torch.testing.assert_close(flow.trajectory, share * exploding.trajectory)
    torch.testing.assert_close(flow.noise_maps, exploding.noise_maps)
    torch.testing.assert_close(flow.residual, exploding.residual)
    torch.testing.assert_close(flow.noise_at(4), exploding.noise_at(4))
    torch.testing.assert_close(flow.at(float(levels[3])), flow.trajectory[3])
    near = float(levels[3]) * 1.001
    torch.testing.assert_close(flow.at(near), (1 - near) * exploding.at(near / (1 - near)))
    edits = [replay(Gaussian(i.path, -0.5, 2.0), i.trajectory[2], i.sigmas[2:], inversion=i) for i in (flow, exploding)]
    torch.testing.assert_close(*edits)
    flow = ddim_inversion(Gaussian(FLOW), clean, levels, path=FLOW)
    exploding = ddim_inversion(Gaussian(VE), clean, levels / (1 - levels))
    torch.testing.assert_close(flow.trajectory, share * exploding.trajectory)
    edits = [replay(Gaussian(i.path, 0.5), i.trajectory[0], i.sigmas, inversion=i) for i in (flow, exploding)]
    torch.testing.assert_close(*edits)


def test_the_deterministic_step_is_eulers_on_the_velocity():
    x, denoised = latent(1, 4, 3, 3), latent(1, 4, 3, 3, seed=4)
    s, t = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    eps = noise_prediction(x, denoised, s, FLOW)
    step = deterministic_step(x, denoised, eps, s, t, FLOW)
    torch.testing.assert_close(step, x + (t - s) * (x - denoised) / s)
    torch.testing.assert_close(step, (1 - t) * denoised + t * eps)


def test_ddim_follows_the_flow_up_to_pure_noise():
    clean, errors, trips = latent(1, 4, 8, 8), [], []
    for n in (50, 100, 200):
        inversion = ddim_inversion(Gaussian(), clean, schedule(n), path=FLOW)
        errors.append(float((inversion.trajectory[0] - (clean - MEAN) / STD).abs().max()))
        out = replay(Gaussian(), inversion.trajectory[0], inversion.sigmas, inversion=inversion)
        trips.append(float((out - clean).abs().max()))
    for row in (errors, trips):
        assert row[1] < 0.6 * row[0]
        assert row[2] < 0.6 * row[1]


def test_refinement_converges_to_an_exact_step_at_pure_noise_too():
    clean = latent(1, 4, 8, 8)
    errors = []
    for refine in (0, 2, 20):
        inversion = ddim_inversion(Gaussian(shift=0.25), clean, schedule(20), path=FLOW, refine=refine)
        out = replay(Gaussian(shift=0.25), inversion.trajectory[0], inversion.sigmas, inversion=inversion)
        errors.append(float((out - clean).abs().max()))
    assert errors[1] < errors[0] / 5
    assert errors[2] < 1e-6


@pytest.mark.parametrize("levels", [[1.0, 0.0], [0.4, 0.0], [1.0, 0.6, 0.2]])
@pytest.mark.parametrize("invert", [ddpm_inversion, ddim_inversion])
def test_one_step_and_a_clean_end_that_is_not_zero(levels, invert):
    clean, sigmas = latent(1, 4, 4, 4), torch.tensor(levels, dtype=torch.float64)
    inversion = invert(Gaussian(), clean, sigmas, path=FLOW)
    out = replay(Gaussian(), inversion.trajectory[0], sigmas, inversion=inversion)
    assert torch.isfinite(out).all()
    if inversion.kind == "ddpm":
        torch.testing.assert_close(out, clean, rtol=0, atol=1e-12)


def test_adain_along_the_replay_of_a_video_takes_a_pictures_statistics():
    video = ddpm_inversion(Gaussian(), latent(1, 4, 3, 6, 6), schedule(6), path=FLOW)
    picture = ddpm_inversion(Gaussian(), 2 + latent(1, 4, 1, 5, 5, seed=9), schedule(6), path=FLOW)
    adain = StepAdaIN(picture, video.steps, start=0.5)
    adain.check_fits(video.clean.shape)
    seen = []

    def watch(x, step, sigma):
        seen.append((sigma, adain(x, step, sigma)))
        return seen[-1][1]

    replay(Gaussian(), video.trajectory[0], video.sigmas, inversion=video, after_step=watch)
    sigma, x = seen[-1]
    torch.testing.assert_close(x.mean(dim=(2, 3, 4)), picture.at(sigma).mean(dim=(2, 3, 4)))


def test_levels_that_are_no_flows_are_refused():
    model, clean = Gaussian(), latent(1, 4, 4, 4)
    for invert in (ddpm_inversion, ddim_inversion):
        with pytest.raises(ValueError, match=r"end at 1.*14\.6"):
            invert(model, clean, torch.tensor([14.6, 1.0, 0.0]), path=FLOW)
        with pytest.raises(ValueError, match="ve, flow, got 'cosine'"):
            invert(model, clean, torch.tensor([1.0, 0.0]), path="cosine")
    assert model.calls == 0
    with pytest.raises(ValueError, match=r"1 at most, got 1\.5"):
        ddim_inversion(model, clean, schedule(2), path=FLOW).at(1.5)


def test_the_file_keeps_the_path(tmp_path):
    flow = ddpm_inversion(Gaussian(), latent(1, 16, 2, 4, 4), schedule(4), path=FLOW)
    exploding = Inversion(**{**vars(flow), "path": VE})
    for inversion, version in ((flow, "2"), (exploding, "1")):
        file = tmp_path / f"{inversion.path}.safetensors"
        save_inversion(file, inversion)
        with safe_open(file, framework="pt") as header:
            assert header.metadata()["version"] == version
        loaded = load_inversion(file)
        assert loaded.path == inversion.path
        assert torch.equal(loaded.trajectory, inversion.trajectory)
    assert replace(flow, seed=3).path == FLOW
