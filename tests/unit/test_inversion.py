"""DDPM and DDIM inversion and replay on an exact model, and against the authors' golden runs.

The exact model: data ~ N(mean, std^2) for every element, so `denoised = (std^2 x + s^2 mean) / (std^2 + s^2)`, and the
probability-flow ODE has the closed solution `x(s) = mean + (x(0) - mean) sqrt(1 + s^2/std^2)`.
"""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from semantic_style.samplers.ddim_inversion import ddim_inversion
from semantic_style.samplers.ddpm_inversion import ddpm_inversion, noised_path
from semantic_style.samplers.inversion import Inversion
from semantic_style.samplers.replay import replay

MEAN, STD = 0.3, 0.8


class Gaussian:
    """The exact denoiser with classifier-free guidance; counts evaluated rows and calls."""

    def __init__(self, shift=0.0, cfg=1.0):
        self.shift, self.cfg = shift, cfg
        self.rows, self.calls = 0, 0

    def __call__(self, x, sigma):
        self.rows, self.calls = self.rows + len(x), self.calls + 1
        s2 = sigma.reshape(-1, *[1] * (x.ndim - 1)).square()
        prompt, empty = ((STD**2 * x + s2 * (MEAN + d)) / (STD**2 + s2) for d in (self.shift, 0.0))
        return empty + self.cfg * (prompt - empty)


def latent(*shape, seed=3, dtype=torch.float32):
    return MEAN + STD * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def schedule(n, high=14.6, low=0.03):
    return torch.cat([torch.logspace(torch.tensor(high).log10(), torch.tensor(low).log10(), n), torch.zeros(1)])


SHAPES = [(1, 4, 16, 16), (3, 4, 7, 5), (2, 48, 4, 9), (1, 4, 5, 6, 7)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cfg", [1.0, 3.5])
def test_replay_gives_the_clean_latent_back(shape, cfg):
    clean, model = latent(*shape), Gaussian(0.25, cfg)
    inversion = ddpm_inversion(model, clean, schedule(60), seed=5)
    out = replay(model, inversion.trajectory[0], inversion.sigmas, inversion=inversion)
    assert (out - clean).abs().max() < 2e-5


@pytest.mark.parametrize("skip", [1, 20, 58, 59])
def test_later_starts_are_exact_too(skip):
    model = Gaussian(0.25, 3.5)
    inversion = ddpm_inversion(model, latent(1, 4, 6, 6), schedule(60))
    out = replay(model, inversion.trajectory[skip], inversion.sigmas[skip:], inversion=inversion)
    assert (out - inversion.clean).abs().max() < 2e-5


def test_every_latent_of_the_way_is_the_trajectorys():
    model = Gaussian(0.25, 3.5)
    inversion = ddpm_inversion(model, latent(1, 4, 6, 6), schedule(30))
    seen = []
    replay(
        model, inversion.trajectory[0], inversion.sigmas, inversion=inversion, callback=lambda d: seen.append(d["x"])
    )
    assert (torch.stack(seen) - inversion.trajectory[:-1]).abs().max() < 2e-5


@pytest.mark.parametrize("skip", [1, 7, 19])
@pytest.mark.parametrize("kind", ["ddpm", "ddim", "noised"])
def test_levels_left_out_change_nothing_in_the_others_and_cost_nothing(kind, skip):
    def invert(model, **settings):
        if kind == "noised":
            return noised_path(latent(2, 4, 6, 6), schedule(20), seed=4, **settings)
        settings |= {"seed": 4, "batch_steps": 3} if kind == "ddpm" else {"refine": 1}
        steps = {"ddpm": ddpm_inversion, "ddim": ddim_inversion}
        return steps[kind](model, latent(2, 4, 6, 6), schedule(20), **settings)

    whole, model = invert(Gaussian(0.25, 3.5)), Gaussian(0.25, 3.5)
    part = invert(model, skip=skip)
    assert model.rows == {"ddpm": 1, "ddim": 2, "noised": 0}[kind] * 2 * (20 - skip)
    assert (part.skipped, part.steps, part.schedule_steps) == (skip, 20 - skip, 20)
    assert torch.equal(part.sigmas, whole.sigmas[skip:])
    assert torch.equal(part.trajectory, whole.trajectory[skip:])
    if kind == "ddpm":
        torch.testing.assert_close(part.noise_maps, whole.noise_maps[skip:], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(part.residual, whole.residual, rtol=1e-5, atol=1e-5)
        later = range(skip + 1, 20) if skip < 19 else ()
        for first in (skip, *later):
            start = part.trajectory[first - skip]
            steps = []

            def note(x, step, sigma, steps=steps):
                steps.append(step)
                return x

            out = replay(model, start, whole.sigmas[first:], inversion=part, after_step=note)
            assert (out - part.clean).abs().max() < 2e-5
            assert steps == list(range(first, 19)), "counted from the schedule's noisiest level"


@pytest.mark.parametrize("skip", [-1, 20])
def test_a_skip_that_leaves_no_step_is_refused(skip):
    clean = latent(1, 4, 3, 3)
    for invert in (ddpm_inversion, ddim_inversion):
        with pytest.raises(ValueError, match="skip must be 0 to 19 for 20 steps"):
            invert(Gaussian(), clean, schedule(20), skip=skip)


def test_what_cannot_be_replayed_says_why():
    part = ddpm_inversion(Gaussian(), latent(1, 4, 3, 3), schedule(20), skip=5)
    part.check_replay(5)
    part.check_replay(19)
    with pytest.raises(ValueError, match=r"without the 5 noisiest of its 20 steps.*skip 3.*5 or more, or .* skip 3"):
        part.check_replay(3)
    with pytest.raises(ValueError, match="skip must be 5 to 19"):
        part.check_replay(20)
    reference = noised_path(latent(1, 4, 3, 3), schedule(20))
    with pytest.raises(ValueError, match=r"no noise maps.*Invert again with noise_maps on"):
        replay(Gaussian(), reference.trajectory[0], reference.sigmas, inversion=reference)


def test_a_path_without_maps_is_that_of_the_inversion():
    clean = latent(2, 4, 6, 6)
    whole, path = ddpm_inversion(Gaussian(), clean, schedule(9), seed=2), noised_path(clean, schedule(9), seed=2)
    assert path.noise_maps is None
    assert path.residual is None
    assert torch.equal(path.trajectory, whole.trajectory)
    assert torch.equal(path.at(0.7), whole.at(0.7))


def test_two_halves_are_the_whole():
    model, edit = Gaussian(0.25, 3.5), Gaussian(-0.5, 2.0)
    inversion = ddpm_inversion(model, latent(1, 4, 6, 6), schedule(20))
    whole = replay(edit, inversion.trajectory[0], inversion.sigmas, inversion=inversion)
    half = replay(edit, inversion.trajectory[0], inversion.sigmas[:9], inversion=inversion)
    half = replay(edit, half, inversion.sigmas[8:], inversion=inversion)
    assert torch.equal(whole, half)


@pytest.mark.parametrize("batch_steps", [1, 4, 7, 60, 100])
def test_batches_of_steps_change_nothing_and_cost_no_more(batch_steps):
    clean = latent(3, 4, 5, 5)
    one, many = Gaussian(0.25, 3.5), Gaussian(0.25, 3.5)
    reference = ddpm_inversion(one, clean, schedule(60), seed=2)
    inversion = ddpm_inversion(many, clean, schedule(60), seed=2, batch_steps=batch_steps)
    torch.testing.assert_close(inversion.noise_maps, reference.noise_maps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inversion.residual, reference.residual, rtol=1e-5, atol=1e-5)
    assert one.rows == many.rows == 60 * 3
    assert many.calls == -(-60 // batch_steps)


def test_rows_of_one_level_follow_each_other():
    seen = []

    def model(x, sigma):
        seen.append((x, sigma))
        return x

    inversion = ddpm_inversion(model, latent(2, 4, 3, 3), schedule(4), batch_steps=2)
    x, sigma = seen[0]
    assert torch.equal(sigma, inversion.sigmas[[0, 0, 1, 1]])
    assert torch.equal(x, inversion.trajectory[:2].flatten(0, 1))


def test_noise_of_the_true_model_is_white():
    clean = latent(64, 4, 8, 8)
    inversion = ddpm_inversion(Gaussian(), clean, schedule(10))
    assert abs(float(inversion.trajectory[3].sub(clean).std() / inversion.sigmas[3]) - 1) < 0.02
    assert abs(float(inversion.noise_at(3).mean())) < 0.02


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    clean = latent(1, 4, 4, 4)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    a = ddpm_inversion(Gaussian(), clean, schedule(5), seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    b = ddpm_inversion(Gaussian(), clean, schedule(5), seed=7)
    c = ddpm_inversion(Gaussian(), clean, schedule(5), seed=8)
    assert torch.equal(a.trajectory, b.trajectory)
    assert torch.equal(a.noise_maps, b.noise_maps)
    assert not torch.equal(a.trajectory, c.trajectory)


def test_arguments_are_not_written_to():
    clean, sigmas = latent(1, 4, 4, 4), schedule(5)
    before = clean.clone(), sigmas.clone()
    inversion = ddpm_inversion(Gaussian(), clean, sigmas)
    start = inversion.trajectory[0].clone()
    replay(Gaussian(), inversion.trajectory[0], sigmas, inversion=inversion, mask=torch.zeros(1, 1, 4, 4))
    assert torch.equal(clean, before[0])
    assert torch.equal(sigmas, before[1])
    assert torch.equal(inversion.trajectory[0], start)


def test_half_precision_latents_are_inverted_in_float32():
    inversion = ddpm_inversion(Gaussian(), latent(1, 4, 4, 4).half(), schedule(5))
    assert inversion.clean.dtype == inversion.noise_maps.dtype == torch.float32


def test_without_the_residual_the_last_step_is_the_prediction():
    model = Gaussian()
    inversion = ddpm_inversion(model, latent(1, 4, 4, 4), schedule(5))
    rough = replay(model, inversion.trajectory[0], inversion.sigmas, inversion=inversion, exact=False)
    torch.testing.assert_close(rough + inversion.residual, inversion.clean)
    dropped = ddpm_inversion(model, latent(1, 4, 4, 4), schedule(5), keep_residual=False)
    assert dropped.residual is None
    torch.testing.assert_close(replay(model, dropped.trajectory[0], dropped.sigmas, inversion=dropped), rough)


def test_one_step():
    model = Gaussian()
    inversion = ddpm_inversion(model, latent(2, 4, 4, 4), torch.tensor([14.6, 0.0]))
    assert inversion.noise_maps.shape[0] == 0
    out = replay(model, inversion.trajectory[0], inversion.sigmas, inversion=inversion)
    torch.testing.assert_close(out, inversion.clean)


@pytest.mark.parametrize("resident", [True, False])
def test_mask_keeps_the_picture_outside(resident):
    model, edit = Gaussian(0.25, 3.5), Gaussian(2.0, 5.0)
    inversion = ddpm_inversion(model, latent(2, 4, 6, 6), schedule(20))
    mask = torch.zeros(1, 1, 6, 6)
    mask[..., 3:] = 1.0
    run = {"inversion": inversion, "mask": mask, "resident": resident}
    out = replay(edit, inversion.trajectory[0], inversion.sigmas, **run)
    assert torch.equal(out[..., :3], inversion.clean[..., :3])
    assert (out - inversion.clean)[..., 3:].abs().mean() > 0.5
    same = replay(model, inversion.trajectory[0], inversion.sigmas, **{**run, "mask": lambda s: mask * 0.5})
    torch.testing.assert_close(same, inversion.clean, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["a", "b"])
def test_golden_noise_maps_and_edit(shared, name):
    path = shared / "golden" / f"ddpm_inversion_{name}.safetensors"
    golden = load_file(path)
    with safe_open(path, "pt") as file:
        setting = file.metadata()
    assert (float(setting["data_mean"]), float(setting["data_std"])) == (MEAN, STD)
    alphas = golden["alphas_cumprod"].double()
    a = torch.cat([alphas[golden["timesteps"].long()], alphas[:1]])
    sigmas = ((1 - a) / a).sqrt().float()
    to_ve = a.rsqrt().float().reshape(-1, 1, 1, 1, 1)
    trajectory = golden["noisy"].flip(0)[:, None] * to_ve
    noise = (trajectory[:-1] - trajectory[-1]) / sigmas[:-1].reshape(-1, 1, 1, 1, 1)
    model = Gaussian(float(setting["cond_mean_shift"]), float(setting["cfg"]))

    inversion = ddpm_inversion(model, trajectory[-1], sigmas, noise=noise, batch_steps=8)

    expected = golden["noise_maps"].flip(0)[:-1, None]
    assert (inversion.noise_maps - expected).abs().max() < 1e-4
    for replayed, key in ((model, "reconstruction"), (Gaussian(), "edit_uncond_cfg1")):
        out = replay(replayed, inversion.trajectory[0], inversion.sigmas, inversion=inversion, exact=False)
        assert (out / to_ve[-1, 0] - golden[key]).abs().max() < 1e-4


def exact_noise(clean, sigma):
    return MEAN + (clean - MEAN) * (1 + sigma**2 / STD**2) ** 0.5


def round_trip(refine, cfg=1.0, n=50):
    model, clean = Gaussian(0.25, cfg), latent(2, 4, 8, 8, dtype=torch.float64)
    inversion = ddim_inversion(model, clean, schedule(n).double(), refine=refine)
    assert model.rows == 2 * n * (1 + refine)
    return float((replay(model, inversion.trajectory[0], inversion.sigmas, inversion=inversion) - clean).abs().max())


def test_ddim_refinement_cuts_the_error():
    errors = [round_trip(refine) for refine in range(4)]
    assert errors[1] < errors[0] / 3
    assert errors[2] < errors[1] / 3
    assert errors[3] < errors[2]
    assert errors[3] < 0.01


def test_ddim_follows_the_flow_of_the_exact_model():
    clean = latent(1, 4, 8, 8, dtype=torch.float64)
    errors = []
    for n in (100, 200, 400):
        inversion = ddim_inversion(Gaussian(), clean, schedule(n).double())
        errors.append(float((inversion.trajectory[0] - exact_noise(clean, 14.6)).abs().max()))
    # Euler's method is of first order: half the step, half the error.
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < 0.6 * errors[1]


def test_ddim_takes_a_batch_and_replays_with_plain_euler():
    inversion = ddim_inversion(Gaussian(), latent(4, 4, 3, 5), schedule(10))
    assert inversion.kind == "ddim"
    assert inversion.trajectory.shape == (11, 4, 4, 3, 5)
    assert torch.equal(inversion.trajectory[-1], inversion.clean)
    x = inversion.trajectory[0]
    for s, t in zip(inversion.sigmas[:-1], inversion.sigmas[1:], strict=True):
        x = x + (t - s) * (x - Gaussian()(x, s.expand(4))) / s
    torch.testing.assert_close(replay(Gaussian(), inversion.trajectory[0], inversion.sigmas, inversion=inversion), x)


def make(n=4, shape=(1, 4, 4, 4), **changes):
    inversion = ddpm_inversion(Gaussian(), latent(*shape), schedule(n))
    return Inversion(**{**vars(inversion), **changes})


def test_at_gives_stored_levels_and_scales_the_nearest_noise_between():
    inversion = make(6)
    assert torch.equal(inversion.at(inversion.sigmas[2]), inversion.trajectory[2])
    assert torch.equal(inversion.at(float(inversion.sigmas[2]) * (1 + 1e-7)), inversion.trajectory[2])
    assert torch.equal(inversion.at(0.0), inversion.clean)
    sigma = float(inversion.sigmas[2]) * 0.9
    expected = inversion.clean + sigma * (inversion.trajectory[2] - inversion.clean) / inversion.sigmas[2]
    torch.testing.assert_close(inversion.at(sigma), expected)
    beyond = inversion.at(1e3)
    torch.testing.assert_close(beyond, inversion.clean + 1e3 * inversion.noise_at(0))
    tiny = inversion.at(1e-4)
    torch.testing.assert_close(tiny, inversion.clean + 1e-4 * inversion.noise_at(5))
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="noise level"):
            inversion.at(bad)


def test_host_coordinates_and_back():
    inversion = make(scale=torch.tensor([2.0, 3.0, 4.0, 5.0]), shift=torch.arange(4.0))
    outer = inversion.to_outer(inversion.clean)
    torch.testing.assert_close(outer[:, 2], 4 * inversion.clean[:, 2] + 2)
    torch.testing.assert_close(inversion.to_inner(outer), inversion.clean)


def test_another_schedule_is_refused_with_a_way_out():
    inversion = make(6)
    with pytest.raises(ValueError, match="SIGMAS of the Replay node"):
        replay(Gaussian(), inversion.trajectory[0], schedule(7), inversion=inversion)
    with pytest.raises(ValueError, match="noise maps belong"):
        inversion.find(inversion.sigmas[1:] * 1.01)
    with pytest.raises(ValueError):
        inversion.find(inversion.sigmas[:0])


def test_another_latent_size_is_refused():
    inversion = make()
    with pytest.raises(ValueError, match=r"\[1, 4, 4, 4\].*\[1, 4, 8, 8\]"):
        replay(Gaussian(), torch.zeros(1, 4, 8, 8), inversion.sigmas, inversion=inversion)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "magic"}, "ddpm, ddim"),
        ({"trajectory": torch.zeros(5, 1, 16, 4, 4)}, "trajectory has the shape"),
        ({"noise_maps": torch.zeros(3, 1, 4, 8, 8)}, "noise_maps has the shape"),
        ({"noise_maps": None}, "needs noise maps"),
        ({"kind": "ddim"}, "has no noise maps"),
        ({"residual": torch.full((1, 4, 4, 4), torch.nan)}, "residual contains NaN"),
        ({"sigmas": torch.tensor([1.0, 1.0, 0.5, 0.2, 0.0])}, "decrease"),
    ],
)
def test_parts_that_do_not_belong_together(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_refusals_before_any_model_call():
    model = Gaussian()
    clean = latent(1, 4, 4, 4)
    for call, message in (
        (lambda: ddpm_inversion(model, clean, schedule(4), batch_steps=0), "batch_steps"),
        (lambda: ddpm_inversion(model, clean, schedule(4), noise=torch.zeros(3, 1, 4, 4, 4)), "one noise per step"),
        (lambda: ddpm_inversion(model, clean * torch.inf, schedule(4)), "NaN or infinite"),
        (lambda: ddim_inversion(model, clean, schedule(4), refine=-1), "refine"),
        (lambda: ddim_inversion(model, clean, torch.tensor([1.0, 1.0])), "decrease"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert model.calls == 0


def test_rows_of_a_batch_are_inversions_of_their_own() -> None:
    generator = torch.Generator().manual_seed(3)
    clean = torch.randn(3, 2, 4, 5, generator=generator, dtype=torch.float64)
    sigmas = torch.tensor([3.0, 1.0, 0.3, 0.0])
    noise = torch.randn(3, 3, 2, 4, 5, generator=generator, dtype=torch.float64)

    def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x / (1 + sigma.view(-1, 1, 1, 1) ** 2)

    both = ddpm_inversion(model, clean, sigmas, noise=noise)
    prompt = [[torch.arange(3.0).view(3, 1, 1), {}]]
    both = replace(both, positive=prompt, negative=[[torch.zeros(1, 1, 1), {"k": 1}]])
    part = both.rows(1, 2)
    alone = ddpm_inversion(model, clean[1:], sigmas, noise=noise[:, 1:])
    for name in ("clean", "trajectory", "noise_maps", "residual"):
        assert torch.allclose(getattr(part, name), getattr(alone, name), atol=1e-12), name
    assert part.positive is not None
    assert part.positive[0][0].flatten().tolist() == [1.0, 2.0]
    assert part.negative == both.negative
    assert len(both.clean) == 3
    assert ddim_inversion(model, clean, sigmas).rows(0).noise_maps is None


@pytest.mark.parametrize(("first", "count"), [(3, 1), (0, 4), (-1, 1), (0, 0), (2, 2)])
def test_rows_that_a_batch_lacks_are_refused(first: int, count: int) -> None:
    clean = torch.zeros(3, 2, 4, 4)
    inversion = Inversion("ddim", clean, torch.zeros(2, *clean.shape), torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=f"3 pictures, numbered from 0: there are no {count} from number {first}"):
        inversion.rows(first, count)
