"""Inversion and replay through the host's own guider and sampler nodes, on a small random UNet shaped like SD1.5."""

import comfy.latent_formats
import comfy.model_management
import comfy.samplers
import comfy.utils
import pytest
import torch
from comfy_extras.nodes_custom_sampler import (
    CFGGuider,
    Noise_EmptyNoise,
    Noise_RandomNoise,
    SamplerCustom,
    SamplerCustomAdvanced,
)
from semantic_style.benchmarks.random_models import conditioning, small_sd15
from semantic_style.host.invert import make_sigmas
from semantic_style.nodes.nodes_inversion import DDIMInversion, DDPMInversion, InversionLatent, Replay
from semantic_style.samplers import finite

pytestmark = pytest.mark.usefixtures("one_thread", "as_the_host_runs_nodes")

POSITIVE, NEGATIVE, OTHER = conditioning(1), conditioning(2), conditioning(3)
CFG = 3.5
SD15_SCALE = 0.18215


@pytest.fixture(scope="module")
def model():
    return small_sd15()


@pytest.fixture
def evaluations(model):
    """Rows that the network was evaluated on, one entry per call. Any hook of the host would end batching."""
    rows = []
    handle = model.model.diffusion_model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    yield rows
    handle.remove()


@pytest.fixture
def progress(monkeypatch):
    """What the host's progress hook was told: (value, total, preview). Its function `react` may be replaced."""
    # Newer hosts report ten times a second at most.
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0.0, raising=False)

    class Progress(list):
        def react(self, value):
            """Called on every report."""

    seen = Progress()

    def hook(value, total, preview, **_):
        seen.append((value, total, preview))
        seen.react(value)

    comfy.utils.set_progress_bar_global_hook(hook)
    yield seen
    comfy.utils.set_progress_bar_global_hook(None)
    comfy.model_management.interrupt_current_processing(False)


def latent(*shape, seed=0, scale=1 / SD15_SCALE):
    return {"samples": scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))}


def ddpm(
    model, image, steps=6, positive=POSITIVE, scheduler="normal", cfg=CFG, seed=7, batch_steps=0, negative=NEGATIVE
):
    return DDPMInversion.execute(model, positive, negative, image, steps, scheduler, cfg, seed, batch_steps).args[0]


def resample(model, inversion, positive=POSITIVE, cfg=CFG, mask=None, change=None, **settings):
    """What a user's graph does: Replay, CFGGuider, SamplerCustomAdvanced."""
    noise, sampler, sigmas, image = Replay.execute(inversion, **{"skip": 0, "exact": True, **settings}).args
    if mask is not None:
        image = {**image, "noise_mask": mask}
    if change is not None:
        sigmas, image = change(sigmas, image)
    (guider,) = CFGGuider().get_guider(model, positive, NEGATIVE, cfg)
    return SamplerCustomAdvanced().sample(noise, guider, sampler, sigmas, image)[0]["samples"]


def error(out, image, scale=SD15_SCALE):
    """Largest difference in the model's coordinates."""
    return float((out - image["samples"]).abs().max() * scale)


@pytest.mark.parametrize(("model_type", "steps", "worst"), [("EPS", 60, 1e-4), ("V_PREDICTION", 12, 1e-5)])
def test_reconstruction_in_float32(model_type, steps, worst):
    image, random = latent(1, 4, 8, 8), small_sd15(model_type=model_type)
    inversion = ddpm(random, image, steps)
    assert inversion.steps == steps
    assert error(resample(random, inversion), image) < worst


@pytest.mark.parametrize(("dtype", "worst"), [(torch.float16, 0.1), (torch.bfloat16, 0.2)])
def test_reconstruction_in_half_precision_keeps_float32_latents(dtype, worst):
    """Measured at CFG 3.5: 1.3e-2 (float16, 20 steps) and 1.8e-2 (bfloat16, 60 steps)."""
    image, half = latent(1, 4, 8, 8), small_sd15(dtype=dtype)
    inversion = ddpm(half, image, 8)
    assert inversion.noise_maps.dtype == inversion.trajectory.dtype == torch.float32
    assert error(resample(half, inversion), image) < worst


@pytest.mark.parametrize("shape", [(3, 4, 9, 7), (1, 4, 5, 16)])
def test_batches_and_odd_sizes(model, shape):
    image = latent(*shape)
    assert error(resample(model, ddpm(model, image)), image) < 1e-4


def test_one_conditioning_for_each_image(model):
    image, positive = latent(2, 4, 8, 8), conditioning(5, batch=2)
    one = ddpm(model, image, positive=positive, batch_steps=1)
    many = ddpm(model, image, positive=positive, batch_steps=6)
    torch.testing.assert_close(one.noise_maps, many.noise_maps, rtol=0, atol=1e-4)
    single = ddpm(model, {"samples": image["samples"][1:]}, positive=[[positive[0][0][1:], {}]], batch_steps=6)
    noise = (many.trajectory - many.clean)[:, 1:]
    assert not torch.allclose(single.trajectory - single.clean, noise)
    assert error(resample(model, many, positive), image) < 1e-4


@pytest.mark.parametrize(("cfg", "branches"), [(1.0, 1), (CFG, 2)])
@pytest.mark.parametrize("batch_steps", [0, 1, 4])
def test_every_level_is_evaluated_once(model, evaluations, cfg, branches, batch_steps):
    inversion = ddpm(model, latent(2, 4, 8, 8), 6, cfg=cfg, batch_steps=batch_steps)
    assert sum(evaluations) == 6 * 2 * branches
    if batch_steps == 4:
        assert len(evaluations) == 2
    evaluations.clear()
    resample(model, inversion, cfg=cfg)
    assert sum(evaluations) == 6 * 2 * branches


def with_wrapper(model):
    m = model.clone()
    m.add_wrapper_with_key("diffusion_model", "test", lambda executor, *args, **kwargs: executor(*args, **kwargs))
    return m


def with_patch(model):
    m = model.clone()
    m.set_model_attn1_patch(lambda q, k, v, options: (q, k, v))
    return m


def with_cfg_function(model):
    m = model.clone()
    m.set_model_sampler_post_cfg_function(lambda args: args["denoised"])
    return m


@pytest.mark.parametrize("patch", [with_wrapper, with_patch, with_cfg_function])
def test_patched_models_run_one_level_at_a_time(model, evaluations, patch):
    ddpm(patch(model), latent(1, 4, 8, 8), 4, batch_steps=4)
    assert evaluations == [2, 2, 2, 2]


@pytest.mark.parametrize("options", [{"start_percent": 0.5}, {"mask": torch.ones(2, 8, 8)}])
def test_conditioning_that_looks_at_level_or_batch_runs_one_level_at_a_time(model, evaluations, options):
    ddpm(model, latent(1, 4, 8, 8), 4, positive=[[POSITIVE[0][0], options]], batch_steps=4, cfg=1.0)
    assert set(evaluations) == {1}


def test_areas_and_masks_reconstruct(model):
    area = [[POSITIVE[0][0], {"area": (4, 8, 0, 0), "strength": 0.7}], [OTHER[0][0], {"mask": torch.rand(1, 8, 8)}]]
    image = latent(1, 4, 8, 8)
    assert error(resample(model, ddpm(model, image, positive=area, batch_steps=6), positive=area), image) < 1e-4


def test_the_empty_latent_and_a_latent_format_with_a_shift():
    shifted = small_sd15(latent_format=comfy.latent_formats.SDXL_Playground_2_5())
    image = latent(1, 4, 8, 8, scale=4.0)
    inversion = ddpm(shifted, image, 3)
    given_back = Replay.execute(inversion, 0, True).args[3]["samples"]
    torch.testing.assert_close(given_back, image["samples"], rtol=1e-5, atol=1e-5)
    assert error(resample(shifted, inversion), image, scale=0.1) < 1e-3
    empty = {"samples": torch.zeros(1, 4, 8, 8)}
    assert ddpm(shifted, empty, 2).clean.abs().max() == 0


def test_an_edit_changes_the_picture_and_the_residual_is_a_switch(model):
    image = latent(1, 4, 8, 8)
    inversion = ddpm(model, image)
    edit = resample(model, inversion, positive=OTHER, cfg=7.5)
    assert error(edit, image) > 0.01
    later = resample(model, inversion, positive=OTHER, cfg=7.5, skip=4)
    assert error(later, image) < error(edit, image)
    assert 1e-3 < error(resample(model, inversion, exact=False), image) < 1.0


def test_a_mask_keeps_the_picture_outside(model):
    image = latent(1, 4, 8, 8)
    inversion = ddpm(model, image)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1.0
    out = resample(model, inversion, positive=OTHER, cfg=7.5, mask=mask)
    outside = {"samples": image["samples"][..., :4]}
    assert error(out[..., :4], outside) < 1e-5
    assert error(out, image) > 0.01
    assert error(resample(model, inversion, mask=mask), image) < 1e-4


def test_differential_masks_work(model):
    from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion

    image = latent(1, 4, 8, 8)
    m = DifferentialDiffusion.execute(model).args[0]
    inversion = ddpm(model, image)
    mask = torch.linspace(0, 1, 8).expand(1, 1, 8, 8)
    assert error(resample(m, inversion, mask=mask), image) < 1e-4
    out = resample(m, inversion, positive=OTHER, cfg=7.5, mask=mask)
    # That node frees a place the later the darker its mask is; black ones at the last step.
    kept, free = ({"samples": image["samples"][..., at]} for at in (slice(0, 1), slice(6, 8)))
    assert error(out[..., :1], kept) < 0.3 * error(out[..., 6:], free)


def test_a_start_latent_replaces_the_stored_one(model):
    inversion = ddpm(model, latent(1, 4, 8, 8))
    stored = InversionLatent.execute(inversion, 2).args[0]
    same = resample(model, inversion, skip=2, start=stored)
    torch.testing.assert_close(same, resample(model, inversion, skip=2), rtol=0, atol=1e-4)
    moved = {"samples": stored["samples"].flip(-1)}
    assert error(resample(model, inversion, skip=2, start=moved), {"samples": same}) > 0.1
    clean = InversionLatent.execute(inversion, inversion.steps).args[0]
    torch.testing.assert_close(clean["samples"], latent(1, 4, 8, 8)["samples"])


@pytest.mark.parametrize("invert", ["ddpm", "ddim"])
@pytest.mark.parametrize("skip", [0, 4])
def test_another_start_than_the_inversions_is_refused(model, evaluations, invert, skip):
    """Its picture would be wrong without a word."""
    image = latent(1, 4, 8, 8)
    if invert == "ddpm":
        inversion = ddpm(model, image)
    else:
        inversion = DDIMInversion.execute(model, POSITIVE, NEGATIVE, image, 6, "normal", CFG, 0).args[0]
    noise, sampler, sigmas, own = Replay.execute(inversion, skip, True).args
    (guider,) = CFGGuider().get_guider(model, POSITIVE, NEGATIVE, CFG)
    start = InversionLatent.execute(inversion, skip).args[0]
    moved = {"samples": start["samples"].flip(-1)}
    told_to, _, _, _ = Replay.execute(inversion, skip, True, moved).args
    evaluations.clear()
    for other, given in (
        (Noise_RandomNoise(0), own),
        (Noise_EmptyNoise(), own),
        (noise, latent(1, 4, 8, 8, seed=1)),
        (told_to, own),
    ):
        with pytest.raises(ValueError, match=r"another latent than the inversion's .* node's start"):
            SamplerCustomAdvanced().sample(other, guider, sampler, sigmas, given)
    with pytest.raises(ValueError, match="Replay node's NOISE and LATENT"):
        SamplerCustom().sample(model, True, 0, CFG, POSITIVE, NEGATIVE, sampler, sigmas, own)
    assert not evaluations


@pytest.mark.parametrize("skip", [0, 4])
def test_the_inversions_start_is_taken_however_it_comes(model, skip):
    inversion = ddpm(model, latent(1, 4, 8, 8))
    # Without guidance, which makes the start's rounding many times as large.
    expected = resample(model, inversion, cfg=1.0, skip=skip)
    noise, sampler, sigmas, own = Replay.execute(inversion, skip, True).args
    start = InversionLatent.execute(inversion, skip).args[0]
    out = SamplerCustom().sample(model, False, 0, 1.0, POSITIVE, NEGATIVE, sampler, sigmas, start)[0]["samples"]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)
    (guider,) = CFGGuider().get_guider(model, POSITIVE, NEGATIVE, 1.0)
    for dtype, worst in ((torch.float16, 0.01), (torch.bfloat16, 0.1)):
        rounded = {"samples": own["samples"].to(dtype)}
        out = SamplerCustomAdvanced().sample(noise, guider, sampler, sigmas, rounded)[0]["samples"]
        assert error(out.float(), {"samples": expected}) < worst


def test_ddim_and_its_refinement(model, evaluations):
    image, errors = latent(2, 4, 8, 8, seed=4), []
    for refine in (0, 2):
        evaluations.clear()
        inversion = DDIMInversion.execute(model, POSITIVE, NEGATIVE, image, 6, "ddim_uniform", 1.0, 0, refine).args[0]
        assert inversion.kind == "ddim"
        assert sum(evaluations) == 2 * inversion.steps * (1 + refine)
        errors.append(error(resample(model, inversion, cfg=1.0), image))
    assert errors[1] < 0.7 * errors[0]


def test_refinement_with_guidance_warns(model, caplog):
    DDIMInversion.execute(model, POSITIVE, NEGATIVE, latent(1, 4, 8, 8), 1, "normal", CFG, 0, 1)
    assert "does not converge" in caplog.text


def test_same_seed_same_inversion_and_no_trace_in_the_global_generator(model):
    image = latent(1, 4, 8, 8)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = ddpm(model, image, 2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(ddpm(model, image, 2).noise_maps, first.noise_maps)
    assert not torch.equal(ddpm(model, image, 2, seed=8).trajectory, first.trajectory)


def test_the_value_is_ordinary_and_the_inputs_are_untouched(model):
    image = latent(1, 4, 8, 8)
    before = image["samples"].clone()
    weights = {name: value.clone() for name, value in model.model.state_dict().items()}
    inversion = ddpm(model, image, 2)
    for name in ("clean", "trajectory", "noise_maps", "residual", "scale", "shift"):
        assert not getattr(inversion, name).is_inference(), name
    assert inversion.positive is POSITIVE
    assert (inversion.cfg, inversion.seed, inversion.latent_format) == (CFG, 7, "SD15")
    resample(model, inversion)
    assert torch.equal(image["samples"], before)
    assert all(torch.equal(value, weights[name]) for name, value in model.model.state_dict().items())
    assert model.model_options == {"transformer_options": {}}


def test_progress_and_previews(model, progress, monkeypatch):
    import latent_preview

    monkeypatch.setattr(latent_preview.args, "preview_method", latent_preview.LatentPreviewMethod.Latent2RGB)
    inversion = ddpm(model, latent(1, 4, 8, 8), 4, batch_steps=1)
    assert [(value, total) for value, total, _ in progress] == [(i, 4) for i in (1, 2, 3, 4)]
    assert all(preview[0] == "JPEG" for _, _, preview in progress)
    progress.clear()
    ddpm(model, latent(1, 4, 8, 8), 4, batch_steps=3)
    assert [value for value, _, _ in progress] == [3, 4]
    progress.clear()
    resample(model, inversion)
    assert [(value, total) for value, total, _ in progress] == [(i, 4) for i in (1, 2, 3, 4)]
    progress.clear()
    DDIMInversion.execute(model, POSITIVE, NEGATIVE, latent(1, 4, 8, 8), 2, "normal", 1.0, 0, 1)
    assert [(value, total) for value, total, _ in progress] == [(i, 4) for i in (1, 2, 3, 4)]


def run_inversion(model, inversion):
    return ddpm(model, latent(1, 4, 8, 8), batch_steps=1).noise_maps


def run_ddim(model, inversion):
    return DDIMInversion.execute(model, POSITIVE, NEGATIVE, latent(1, 4, 8, 8), 6, "normal", 1.0, 0).args[0].trajectory


def run_replay(model, inversion):
    return resample(model, inversion)


@pytest.mark.parametrize("run", [run_inversion, run_ddim, run_replay])
def test_cancel_stops_within_a_step_and_leaves_nothing_behind(model, evaluations, progress, run):
    inversion = ddpm(model, latent(1, 4, 8, 8))
    expected = run(model, inversion)
    evaluations.clear()
    progress.react = lambda value: comfy.model_management.interrupt_current_processing(value == 2)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(model, inversion)
    assert len(evaluations) == 2
    progress.react = lambda value: None
    assert torch.equal(run(model, inversion), expected)


def test_a_failing_patch_leaves_nothing_behind(model):
    inversion = ddpm(model, latent(1, 4, 8, 8))
    expected = resample(model, inversion)

    def fail(args):
        raise RuntimeError("a patch of somebody else")

    broken = model.clone()
    broken.set_model_sampler_post_cfg_function(fail)
    for run in (run_inversion, run_replay):
        with pytest.raises(RuntimeError, match="somebody else"):
            run(broken, inversion)
    assert torch.equal(resample(model, inversion), expected)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("run", [run_inversion, run_replay])
def test_a_prediction_that_is_not_finite_is_named(model, run, behind, monkeypatch):
    inversion = ddpm(model, latent(1, 4, 8, 8))
    if behind:  # as a device is whose results are not known when the next step begins
        monkeypatch.setattr(finite, "is_known", lambda *_: False)

    def overflow(args):
        return args["denoised"] * (torch.inf if args["sigma"][0] <= inversion.sigmas[3] else 1.0)

    broken = model.clone()
    broken.set_model_sampler_post_cfg_function(overflow)
    with pytest.raises(FloatingPointError, match=rf"step 3, sigma {float(inversion.sigmas[3]):.4g}, .*float32"):
        run(broken, inversion)


def test_a_latent_that_is_not_finite_is_refused(model, evaluations):
    with pytest.raises(ValueError, match="1 NaN or infinite"):
        ddpm(
            model, {"samples": torch.nn.functional.pad(torch.full((1, 4, 1, 1), torch.nan)[:, :1], (0, 7, 0, 7, 0, 3))}
        )
    assert not evaluations


@pytest.mark.parametrize(("calls_that_fit", "levels"), [(2.5, [2, 2, 2]), (100, [6]), (0.5, [1] * 6)])
def test_levels_per_call_follow_the_free_memory(model, evaluations, monkeypatch, calls_that_fit, levels):
    free = calls_that_fit * 1.5 * model.model.memory_required([1, 4, 8, 8])
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_: free)
    ddpm(model, latent(1, 4, 8, 8), 6, cfg=1.0)
    assert evaluations == levels


def test_running_out_of_memory_halves_the_levels_per_call(model, evaluations, monkeypatch):
    real = model.model.apply_model

    def small(x, *args, **kwargs):
        if len(x) > 4:
            raise torch.cuda.OutOfMemoryError("too big")
        return real(x, *args, **kwargs)

    monkeypatch.setattr(model.model, "apply_model", small)
    image = latent(1, 4, 8, 8)
    inversion = ddpm(model, image, 6, batch_steps=6)
    # 6 levels with two branches, then 3, then 1.
    assert evaluations == [2] * 6
    monkeypatch.undo()
    assert error(resample(model, inversion), image) < 1e-4


def little_memory(model, monkeypatch, rows, error=None):
    """Calls of the network on more rows run out of memory."""
    real = model.model.apply_model

    def small(x, *args, **kwargs):
        if len(x) > rows:
            raise error or torch.cuda.OutOfMemoryError("too big")
        return real(x, *args, **kwargs)

    monkeypatch.setattr(model.model, "apply_model", small)


@pytest.mark.parametrize("invert", ["ddpm", "ddim"])
def test_running_out_of_memory_splits_the_frames(model, evaluations, monkeypatch, invert):
    frames = latent(7, 4, 8, 8)

    def inverted():
        if invert == "ddpm":
            return ddpm(model, frames, 2, cfg=1.0, batch_steps=2)
        return DDIMInversion.execute(model, POSITIVE, NEGATIVE, frames, 2, "ddim_uniform", 1.0, 0).args[0]

    expected = inverted()
    replayed = resample(model, expected, cfg=1.0)
    evaluations.clear()
    little_memory(model, monkeypatch, 3)
    inversion = inverted()
    # 14 rows of DDPM, then 7, then 3; 7 of DDIM, then 3. What one call has taught holds for the next.
    parts = [3, 3, 3, 3, 2] if invert == "ddpm" else [3, 3, 1] * expected.steps
    assert evaluations == parts
    torch.testing.assert_close(inversion.trajectory, expected.trajectory, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(resample(model, inversion, cfg=1.0), replayed, rtol=1e-4, atol=1e-3)


def test_a_row_of_prompt_for_each_frame_keeps_levels_whole(model, evaluations, monkeypatch):
    frames, positive = latent(3, 4, 8, 8), conditioning(5, batch=3)
    expected = ddpm(model, frames, 4, positive=positive, cfg=1.0)
    evaluations.clear()
    little_memory(model, monkeypatch, 5)
    inversion = ddpm(model, frames, 4, positive=positive, cfg=1.0, batch_steps=4)
    assert evaluations == [3] * 4
    torch.testing.assert_close(inversion.noise_maps, expected.noise_maps, rtol=0, atol=1e-4)


@pytest.mark.parametrize("patch", [with_wrapper, with_patch, with_cfg_function])
def test_frames_that_may_know_of_each_other_are_not_split(model, monkeypatch, patch):
    little_memory(model, monkeypatch, 2)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        ddpm(patch(model), latent(3, 4, 8, 8), 2, cfg=1.0)


def test_every_error_that_the_host_takes_for_out_of_memory_counts(model, monkeypatch):
    """And no other."""

    class AcceleratorError(RuntimeError):
        pass

    frames = latent(4, 4, 8, 8)
    little_memory(model, monkeypatch, 2, AcceleratorError("out of memory"))
    with pytest.raises(AcceleratorError):
        ddpm(model, frames, 2, cfg=1.0)
    known = lambda error: isinstance(error, AcceleratorError)  # noqa: E731
    monkeypatch.setattr(comfy.model_management, "is_oom", known, raising=False)
    ddpm(model, frames, 2, cfg=1.0)


def test_an_inversion_too_big_for_the_device_is_streamed(model, monkeypatch):
    image = latent(1, 4, 8, 8)
    expected = ddpm(model, image, batch_steps=2)
    out = resample(model, expected, positive=OTHER)
    followed = run_ddim(model, None)
    monkeypatch.setattr("semantic_style.host.invert.fits", lambda *_: False)
    monkeypatch.setattr("semantic_style.host.replay_sampler.fits", lambda *_: False)
    assert torch.equal(ddpm(model, image, batch_steps=2).noise_maps, expected.noise_maps)
    assert torch.equal(run_ddim(model, None), followed)
    assert torch.equal(resample(model, expected, positive=OTHER), out)


@pytest.mark.parametrize("scheduler", comfy.samplers.SCHEDULER_NAMES)
def test_every_scheduler_gives_levels_that_decrease(model, scheduler):
    for steps in (2, 7, 60, 1500):
        sigmas = make_sigmas(model, scheduler, steps)
        assert (sigmas.diff() < 0).all()
        assert sigmas[-1] == 0


def test_a_scheduler_with_another_number_of_steps(model):
    image = latent(1, 4, 8, 8)
    inversion = ddpm(model, image, 7, scheduler="ddim_uniform")
    assert inversion.steps == 8
    assert error(resample(model, inversion), image) < 1e-4


def test_bad_settings_are_refused_before_any_work(model, evaluations):
    image = latent(1, 4, 8, 8)
    inversion = ddpm(model, image, 2)
    evaluations.clear()
    for call, message in (
        (lambda: ddpm(model, image, scheduler="magic"), "no scheduler 'magic'"),
        (lambda: ddpm(model, image, steps=0), "steps must be"),
        (lambda: ddpm(model, image, steps=1, scheduler="kl_optimal"), "no usable noise levels"),
        (lambda: ddpm(model, image, batch_steps=-1), "batch_steps"),
        (lambda: ddpm(model, latent(1, 16, 8, 8)), "4 channels"),
        (lambda: ddpm(model, latent(1, 4, 3, 8, 8)), "2 further axes"),
        (lambda: DDIMInversion.execute(model, POSITIVE, NEGATIVE, image, 2, "normal", 1.0, 0, -1), "refine"),
        (lambda: Replay.execute(inversion, 2, True), "skip must be 0 to 1"),
        (lambda: Replay.execute(inversion, 0, True, latent(1, 4, 9, 8)), "the inversion holds a latent"),
        (lambda: InversionLatent.execute(inversion, 3), "step must be 0 to 2"),
        (
            lambda: resample(model, inversion, change=lambda s, i: (s, latent(1, 4, 16, 8))),
            "Use the LATENT of the Replay",
        ),
        (lambda: resample(model, inversion, change=lambda s, i: (s * 1.1, i)), "Use the SIGMAS of the Replay"),
        (lambda: resample(model, inversion, change=lambda s, i: (s[1:], i)), "set skip on the Replay node"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not evaluations


def test_frames_can_share_one_noise(model):
    frames = latent(3, 4, 8, 8, seed=4)
    settings = (model, POSITIVE, NEGATIVE, frames, 3, "normal", CFG, 7)
    shared = DDPMInversion.execute(*settings, same_noise=True).args[0]
    own = DDPMInversion.execute(*settings).args[0]
    noise = shared.noise_at(1)
    assert torch.allclose(noise[1:], noise[:1].expand(2, -1, -1, -1), atol=1e-4)
    assert not torch.allclose(own.noise_at(1)[1:], own.noise_at(1)[:1].expand(2, -1, -1, -1), atol=1e-1)
    alone = DDPMInversion.execute(*settings[:3], {"samples": frames["samples"][:1]}, *settings[4:]).args[0]
    assert torch.equal(alone.trajectory[:, 0], shared.trajectory[:, 0]), "one picture has the noise of its seed"
    out = resample(model, shared)
    assert error(out, frames) < 1e-3


def test_a_reference_asks_no_model(model, evaluations):
    image = latent(2, 4, 8, 6)
    whole = ddpm(model, image)
    evaluations.clear()
    for same_noise in (False, True):
        inputs = (model, POSITIVE, NEGATIVE, image, 6, "normal", CFG, 7, 0, same_noise)
        reference = DDPMInversion.execute(*inputs, noise_maps=False).args[0]
        assert evaluations == []
        compared = DDPMInversion.execute(*inputs).args[0] if same_noise else whole
        evaluations.clear()
        for name in ("clean", "trajectory", "sigmas", "scale", "shift"):
            assert torch.equal(getattr(reference, name), getattr(compared, name)), name
        assert (reference.model, reference.positive) == (compared.model, compared.positive)
        assert not reference.trajectory.is_inference()
    with pytest.raises(ValueError, match="no noise maps"):
        Replay.execute(reference, 0, True)
    empty = DDPMInversion.execute(
        model, POSITIVE, NEGATIVE, {"samples": torch.zeros(1, 4, 8, 8)}, 6, "normal", CFG, 7, noise_maps=False
    ).args[0]
    assert not empty.clean.any()


@pytest.mark.parametrize("node", [DDPMInversion, DDIMInversion])
def test_levels_that_no_run_visits_are_left_out(model, evaluations, node):
    image = latent(1, 4, 8, 6)
    inputs = (model, POSITIVE, NEGATIVE, image, 6, "normal", 1.0, 7)
    whole = node.execute(*inputs).args[0]
    evaluations.clear()
    part = node.execute(*inputs, skip=2).args[0]
    assert sum(evaluations) == 4
    expected = resample(model, whole, OTHER, cfg=1.0, skip=3)
    assert torch.equal(resample(model, part, OTHER, cfg=1.0, skip=3), expected)
    step_2 = InversionLatent.execute(whole, 2).args[0]["samples"]
    assert torch.equal(InversionLatent.execute(part, 2).args[0]["samples"], step_2)
    # AdaIN begins at the step that it begins at without.
    adain = {"skip": 2, "adain_reference": whole, "adain_start": 0.5}
    assert torch.equal(resample(model, part, OTHER, 1.0, **adain), resample(model, whole, OTHER, 1.0, **adain))
    with pytest.raises(ValueError, match="without the 2 noisiest of its 6 steps"):
        resample(model, part, skip=1)
    with pytest.raises(ValueError, match="step must be 2 to 6"):
        InversionLatent.execute(part, 1)
    evaluations.clear()
    with pytest.raises(ValueError, match="skip must be 0 to 5 for 6 steps"):
        node.execute(*inputs, skip=6)
    assert evaluations == []
