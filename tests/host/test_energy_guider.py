"""The energy guider in the host, on a small random UNet shaped like SD1.5."""

import logging
from dataclasses import replace

import comfy.controlnet
import comfy.model_management
import comfy.samplers
import comfy.utils
import pytest
import torch
from newer_hosts import FORMATS, context_handler, dynamic, quantised
from semantic_style.attention.layers import feature_blocks
from semantic_style.benchmarks.random_models import (
    ReportingGuider,
    conditioning,
    pooled_conditioning,
    small_sd15,
    small_sdxl,
)
from semantic_style.host.conditioning import REFERENCE
from semantic_style.host.energy_guider import summary, why_nothing
from semantic_style.host.fingerprint import fingerprint
from semantic_style.host.invert import InversionTask, invert_ddpm
from semantic_style.host.reference_cache import ReferenceCache
from semantic_style.host.replay_sampler import ReplayNoise, ReplaySampler
from semantic_style.host.versions import values_of
from semantic_style.regions.semantic_map import SemanticMap
from semantic_style.samplers import finite
from semantic_style.samplers.guidance import LIMIT
from semantic_style.samplers.spin_energy import SpinStyleTerm
from semantic_style.samplers.terms import Energy, SemanticTerm, SpatialTerm, Stream, StyleTerm

pytestmark = pytest.mark.usefixtures("one_thread", "as_the_host_runs_nodes")

POSITIVE, NEGATIVE, EMPTY = conditioning(1), conditioning(2), conditioning(3)
STEPS, CFG = 4, 3.5


@pytest.fixture(scope="module")
def model():
    return small_sd15()


def latent(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 0.18215


def invert(model, image, positive=POSITIVE, cfg=CFG, seed=1):
    return invert_ddpm(InversionTask(model, positive, NEGATIVE, image, STEPS, "normal", cfg, seed))


@pytest.fixture(scope="module")
def context(model):
    with torch.inference_mode():
        return invert(model, latent(1, 4, 16, 8))


@pytest.fixture(scope="module")
def reference(model):
    with torch.inference_mode():
        return invert(model, latent(1, 4, 8, 16, seed=5), EMPTY, 1.0, seed=2)


def semantix(context, reference, weights=(3.0, 0.9, 1.0), **settings):
    style, kept = Stream(reference, EMPTY), Stream(context)
    terms = (StyleTerm(style, weights[0], **settings), SpatialTerm(kept, weights[1], **settings))
    return Energy((*terms, SemanticTerm(kept, weights[2], **settings)))


def guider_of(model, energy, *, positive=POSITIVE, cfg=CFG, cache=None, **settings):
    return ReportingGuider(model, positive, NEGATIVE, cfg, energy, cache=cache, **settings)


def run(guider, context):
    image = context.to_outer(context.clean)
    noise = ReplayNoise(context).generate_noise({"samples": image})
    return guider.sample(noise, image, ReplaySampler(context), context.sigmas, disable_pbar=True, seed=0)


def stock(model, seed=3):
    """A run of the host's own KSampler."""
    empty = torch.zeros(1, 4, 16, 8)
    noise = torch.randn(empty.shape, generator=torch.Generator().manual_seed(seed))
    sampler = comfy.samplers.KSampler(model, 3, model.load_device, "euler", "normal", 1.0, model.model_options)
    return sampler.sample(noise, POSITIVE, NEGATIVE, CFG, latent_image=empty, disable_pbar=True, seed=seed)


class Levels(comfy.samplers.Sampler):
    """A sampler that asks for one prediction and keeps it."""

    def __init__(self, sigma, rows=1):
        self.sigma, self.rows = sigma, rows

    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=0):
        self.x = noise
        self.denoised = guider(self.x, torch.full((len(noise),), self.sigma), **extra_args)
        return noise


def predict(guider, x, sigma):
    asked = Levels(sigma)
    guider.sample(x, torch.zeros_like(x), asked, torch.tensor([sigma, 0.0]), disable_pbar=True, seed=0)
    return asked.denoised


def test_guidance_is_the_clamped_gradient_below_the_guided_prediction(model, context, reference):
    sigma, x = 1.2, context.at(1.2) + 0.3 * latent(1, 4, 16, 8, seed=9) * 0.18215
    plain = comfy.samplers.CFGGuider(model)
    plain.set_conds(POSITIVE, NEGATIVE)
    plain.set_cfg(CFG)
    guider = guider_of(model, semantix(context, reference))
    g = (predict(plain, x, sigma) - predict(guider, x, sigma)) / sigma

    # The energy's slope, by differences of what a run reports: weight and places times the mean over one picture.
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    h, values = 3e-3, []
    for sign in (1, -1):
        predict(guider, x + sign * h * direction, sigma)
        table = guider.report.table()
        values.append(table["spatial"][0] + table["semantic"][0])
    slope = (values[0] - values[1]) / (2 * h)
    only = guider_of(model, semantix(context, reference, (0.0, 0.9, 1.0)))
    g_kept = (predict(plain, x, sigma) - predict(only, x, sigma)) / sigma
    assert g_kept.abs().max() < LIMIT, "the comparison needs a gradient that is not clamped"
    assert float((g_kept * direction).sum()) == pytest.approx((1 + sigma**2) ** 0.5 * slope, rel=0.02)
    assert not torch.allclose(g, g_kept, atol=1e-3), "the style term has to pull as well"


def test_a_run_counts_its_evaluations_and_reuses_references(model, context, reference):
    cache = ReferenceCache(10**8)
    guider = guider_of(model, semantix(context, reference), cache=cache)
    calls = []
    handle = model.model.diffusion_model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    first = run(guider, context)
    # Gradient forward, forward without, and the references: one call each.
    assert calls == [1, 1, 1, 1] * STEPS
    report = guider.report
    assert (report.gradient_forwards, report.backwards, report.plain_forwards) == (STEPS,) * 3
    assert (report.reference_forwards, report.reference_reused) == (2 * STEPS, 0)
    calls.clear()
    second = run(guider, context)
    handle.remove()
    assert calls == [1, 1] * STEPS
    assert (guider.report.reference_forwards, guider.report.reference_reused) == (0, 2 * STEPS)
    assert guider.report.graph_bytes == report.graph_bytes > 0
    assert torch.equal(first, second)
    assert torch.equal(first, run(guider_of(model, semantix(context, reference)), context)), "cached or not"
    assert (first - context.to_outer(context.clean)).abs().max() > 1.0, "guidance has to change the picture"
    assert "4 guided steps" in summary(report)
    assert "reused" in summary(report)


class TwoLevels(comfy.samplers.Sampler):
    """A sampler that asks for predictions of one latent at the levels of its schedule, and keeps them."""

    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=0):
        self.denoised = [guider(noise, sigma.expand(len(noise)), **extra_args) for sigma in sigmas[:-1]]
        return noise


def test_a_step_without_a_gradient_asks_the_model_for_nothing_more_and_takes_the_last_one(model, context, reference):
    calls = []
    handle = model.model.diffusion_model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    guider = guider_of(model, semantix(context, reference), every=2)
    run(guider, context)
    # Forward with gradient, forward without and two references; prompts together in one call.
    assert calls == [1, 1, 1, 1, 2] * (STEPS // 2)
    report = guider.report
    assert (report.gradient_forwards, report.backwards, len(report.steps), report.held) == (2, 2, 2, 2)
    assert "2 calls guided by the gradient of a step before" in summary(report)
    calls.clear()
    late = guider_of(model, semantix(context, reference, start=0.5), every=3)
    run(late, context)
    handle.remove()
    assert calls == [2, 2, 1, 1, 1, 1, 2], "counted from the first step at which the energy acts"

    x, sigmas = context.at(1.2) + 0.3 * latent(1, 4, 16, 8, seed=9) * 0.18215, torch.tensor([1.2, 0.9, 0.0])
    plain = comfy.samplers.CFGGuider(model)
    plain.set_conds(POSITIVE, NEGATIVE)
    plain.set_cfg(CFG)
    of = {}
    for name, asking in (("plain", plain), ("guided", guider)):
        asked = TwoLevels()
        asking.sample(x, torch.zeros_like(x), asked, sigmas, disable_pbar=True, seed=0)
        of[name] = asked.denoised
    g, same = ((of["plain"][i] - of["guided"][i]) / sigmas[i] for i in (0, 1))
    assert g.abs().max() > 0.1
    torch.testing.assert_close(same, g, rtol=1e-4, atol=1e-5)


def test_a_sampler_that_asks_several_times_in_a_step(model, context, reference):
    """heun's second call is at the next step's level, which decides."""
    guider = guider_of(model, semantix(context, reference), every=2)
    x = latent(1, 4, 16, 8, seed=3)
    sampler = comfy.samplers.sampler_object("heun")
    guider.sample(x, torch.zeros_like(x), sampler, context.sigmas, disable_pbar=True, seed=0)
    assert [s.sigma for s in guider.report.steps] == pytest.approx(context.sigmas[[0, 2, 2]].tolist())
    assert guider.report.held == 4


def test_what_a_user_turns_keeps_the_cache_and_what_features_depend_on_does_not(model, context, reference):
    cache = ReferenceCache(10**8)

    def forwards(model=model, energy=None, **settings):
        guider = guider_of(model, energy or semantix(context, reference), cache=cache, **settings)
        run(guider, context)
        return guider.report.reference_forwards

    assert forwards() == 2 * STEPS
    assert forwards(energy=semantix(context, reference, (6.0, 0.1, 0.0), end=0.7)) == 0
    assert forwards(energy=semantix(context, reference, (0.0, 0.9, 1.0)), cfg=1.0) == 0
    assert forwards(positive=[[POSITIVE[0][0].clone(), {}]]) == 0, "the same prompt, encoded again"
    assert forwards(positive=conditioning(8)) == STEPS, "the context's prompt is the positive one"
    changed = model.clone()
    key = "diffusion_model.output_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
    changed.add_patches({key: ("diff", (torch.ones(128, 128),))}, 0.05)
    assert forwards(model=changed) == 2 * STEPS
    same = invert(model, latent(1, 4, 16, 8))
    assert forwards(energy=semantix(same, reference)) == STEPS, "another inversion, though of the same picture"


def test_a_cache_that_is_too_small_keeps_what_fits(model, context, reference):
    whole = ReferenceCache(10**8)
    run(guider_of(model, semantix(context, reference), cache=whole), context)
    small = ReferenceCache(whole.bytes // 2)
    guider = guider_of(model, semantix(context, reference), cache=small)
    first = run(guider, context)
    assert 0 < small.bytes <= whole.bytes // 2
    kept = len(small)
    assert torch.equal(first, run(guider, context))
    assert guider.report.reference_reused == kept == len(small)
    other = invert(model, latent(1, 4, 16, 8, seed=11))
    run(guider_of(model, semantix(other, reference), cache=small), other)
    assert small.bytes <= whole.bytes // 2
    assert len(small) > 0
    whole.clear()
    assert (whole.bytes, len(whole)) == (0, 0)


def test_windows_of_a_clip_are_guided_as_the_whole_clip(model, reference):
    """No motion model: frames do not depend on each other, so windows, and what leads into them, change nothing."""
    frames, sigma = 5, 1.2
    clip = invert(model, latent(frames, 4, 16, 8))
    masks, regions = torch.zeros(frames, 16, 8), torch.zeros(frames, 16, 8, dtype=torch.long)
    for i in range(frames):
        masks[i, 2 * i : 2 * i + 6] = 1
        regions[i, :, i:] = 1
    one_of_style = (torch.arange(16) // 8).expand(1, 8, 16)
    energy = semantix(clip, reference)
    style = replace(energy.terms[0], regions=SemanticMap(regions, one_of_style))
    energy = Energy((style, *energy.terms[1:], SpinStyleTerm(Stream(clip, EMPTY), 1.0, mask=masks)))
    x = clip.at(sigma) + 0.3 * latent(frames, 4, 16, 8, seed=9) * 0.18215

    def predicted(m):
        """In a run whose levels are as many as its frames, which the host's windows compare with each other."""
        guider, asked = guider_of(m, energy), Levels(sigma)
        guider.sample(x, torch.zeros_like(x), asked, torch.tensor([sigma]), disable_pbar=True, seed=0)
        return asked.denoised, guider.report

    (whole, once), windowed = predicted(model), model.clone()
    windowed.model_options["context_handler"] = context_handler(3, 1)
    seen, report = predicted(windowed)
    assert (once.gradient_forwards, report.gradient_forwards) == (1, 2)
    torch.testing.assert_close(seen, whole, rtol=1e-4, atol=1e-4)
    plain = comfy.samplers.CFGGuider(model)
    plain.set_conds(POSITIVE, NEGATIVE)
    plain.set_cfg(CFG)
    assert (whole - predict(plain, x, sigma)).abs().amax(dim=(1, 2, 3)).min() > 0.1


def test_where_weights_memory_is_used_again_the_gradient_is_checkpointed_and_the_same(model, context, reference):
    plain = guider_of(model, semantix(context, reference))
    expected = run(plain, context)
    assert "checkpointed" not in summary(plain.report)
    lent = guider_of(dynamic(small_sd15(), inference=False), semantix(context, reference))
    assert torch.allclose(run(lent, context), expected, atol=2e-2)
    assert "checkpointed" in summary(lent.report)
    weights = sum(p.numel() * p.element_size() for p in model.model.diffusion_model.parameters())
    assert lent.report.graph_bytes < weights / 4, "the graph keeps copies of few of the weights"


@pytest.mark.parametrize("kind", FORMATS)
def test_quantised_weights_guide_as_the_numbers_that_they_stand_for(context, reference, kind):
    """The inversions are the full-precision checkpoint's."""
    twin, plain = quantised(small_sd15(), kind), small_sd15()
    stored = dict(twin.model.diffusion_model.named_parameters())
    with torch.no_grad():
        for name, number in plain.model.diffusion_model.named_parameters():
            number.copy_(values_of(stored[name]))
    energy, x = semantix(context, reference), context.at(1.2) + 0.3 * latent(1, 4, 16, 8, seed=9) * 0.18215
    expected = predict(guider_of(plain, energy, allow_other_model=True), x, 1.2)
    for checkpointing in (False, True):
        guider = guider_of(twin, energy, checkpointing=checkpointing)
        # In int8 hosts round what goes into a layer, too.
        near = 0.1 if kind == "int8_tensorwise" else 1e-3
        torch.testing.assert_close(predict(guider, x, 1.2), expected, rtol=0, atol=near)
        assert guider.report.graph_bytes > 0


def test_attention_patches_act_on_the_picture_being_made_only(model, context, reference):
    seen = []

    def watch(q, context_, value, extra):
        seen.append(REFERENCE in extra)
        return q, context_, value

    def half(q, k, v, extra):
        seen.append(REFERENCE in extra)
        return 0.5 * comfy.ldm.modules.attention.optimized_attention(q, k, v, extra["n_heads"])

    patched = model.clone()
    patched.set_model_attn1_patch(watch)
    patched.set_model_attn2_replace(half, "output", 4)
    cache = ReferenceCache(10**8)
    out = run(guider_of(patched, semantix(context, reference), cache=cache), context)
    assert seen
    assert not any(seen)
    plain = guider_of(model, semantix(context, reference), cache=cache)
    assert not torch.equal(out, run(plain, context))
    assert plain.report.reference_forwards == 0, "the references are those of the patched run"


def test_a_stock_run_is_the_same_before_and_after_also_when_a_guided_run_fails_or_is_cancelled(
    model, context, reference
):
    before = stock(model)
    guided = run(guider_of(model, semantix(context, reference)), context)
    assert torch.equal(before, stock(model))

    seen = []

    def hook(value, *_, **__):
        seen.append(value)
        comfy.model_management.interrupt_current_processing()

    guider = guider_of(model, semantix(context, reference))
    image = context.to_outer(context.clean)
    noise = ReplayNoise(context).generate_noise({"samples": image})
    comfy.utils.set_progress_bar_global_hook(hook)
    bar = comfy.utils.ProgressBar(STEPS)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            guider.sample(
                noise, image, ReplaySampler(context), context.sigmas, callback=lambda *_: bar.update(1), seed=0
            )
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        comfy.model_management.interrupt_current_processing(False)
    assert len(seen) == 1, "cancelled within a step"
    assert torch.equal(before, stock(model))
    assert torch.equal(guided, run(guider, context)), "the same guider goes on as if nothing had happened"


@pytest.mark.parametrize("behind", [False, True])
def test_a_gradient_that_is_not_finite_stops_the_run(model, context, reference, behind, monkeypatch):
    broken = model.clone()
    if behind:  # as a device is whose results are not known when the next step begins
        monkeypatch.setattr(finite, "is_known", lambda *_: False)

    def infinite(h, skip, options):
        return (h * float("inf") if torch.is_grad_enabled() else h), skip

    broken.set_model_output_block_patch(infinite)
    before = stock(model)
    with pytest.raises(FloatingPointError, match=r"step 0, sigma 14\.6.*torch\.float32"):
        run(guider_of(broken, semantix(context, reference)), context)
    assert torch.equal(before, stock(model))


def test_any_sampler_of_the_host_can_be_guided(model, context, reference):
    image = torch.zeros(1, 4, 16, 8)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(3))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", 3)
    for name in ("euler", "dpmpp_2m", "heun"):
        sampler = comfy.samplers.sampler_object(name)
        guider = guider_of(model, semantix(context, reference))
        out = guider.sample(noise, image, sampler, sigmas, disable_pbar=True, seed=0)
        assert torch.isfinite(out).all()
        assert len(guider.report.steps) == (5 if name == "heun" else 3)


def test_one_level_per_call(model, context, reference):
    class Mixed(Levels):
        def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, bar=0):
            return guider(noise, torch.tensor([1.0, 2.0]), **extra_args)

    x = torch.zeros(2, 4, 16, 8)
    with pytest.raises(ValueError, match="one noise level per call"):
        guider_of(model, semantix(context, reference)).sample(
            x, x, Mixed(1.0), torch.tensor([2.0, 0.0]), disable_pbar=True, seed=0
        )


def test_several_pictures_at_once_are_each_guided_as_alone(model, reference):
    images = latent(2, 4, 16, 8, seed=20)
    both = invert(model, images)
    alone = [
        type(both)(**{**vars(both), **{k: v[..., i : i + 1, :, :, :] for k, v in vars(both).items()
                                       if k in ("clean", "trajectory", "noise_maps", "residual")}})
        for i in range(2)
    ]  # fmt: skip
    together = run(guider_of(model, semantix(both, reference)), both)
    for i, one in enumerate(alone):
        separate = run(guider_of(model, semantix(one, reference)), one)
        assert torch.allclose(together[i : i + 1], separate, atol=0.05), (together[i : i + 1] - separate).abs().max()


def test_controls_stay_in_effect(model, context, reference):
    class Control(comfy.controlnet.ControlBase):
        """Adds a constant to the skips, as a ControlNet adds what it computes."""

        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            assert not x_noisy.requires_grad
            return {"input": [], "middle": [], "output": [None] * 3 + [torch.full((1, 1, 1, 1), 0.3)] * 3}

        def copy(self):
            return self

        def get_models(self):
            return []

        def pre_run(self, model, percent_to_timestep_function):
            pass

    control = Control()
    controlled = [[POSITIVE[0][0], {"control": control, "control_apply_to_uncond": True}]]
    plain = run(guider_of(model, semantix(context, reference)), context)
    guider = guider_of(model, semantix(context, reference), positive=controlled)
    out = run(guider, context)
    assert not torch.allclose(plain, out, atol=1e-2)
    assert torch.equal(out, run(guider, context))


def test_guidance_methods_that_make_calls_of_their_own_still_work(model, context, reference):
    calls = []

    def perturbed(args):
        """As perturbed-attention guidance does: another call of the conditional branch after CFG."""
        options, x, sigma = args["model_options"], args["input"], args["sigma"]
        (other,) = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], x, sigma, options)
        calls.append(other)
        return args["denoised"] + 0.1 * (args["cond_denoised"] - other)

    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(perturbed)
    guider = guider_of(patched, semantix(context, reference))
    plain = run(guider_of(model, semantix(context, reference)), context)
    out = run(guider, context)
    assert len(calls) == STEPS
    assert len(guider.report.steps) == STEPS
    assert torch.allclose(out, plain, atol=0.5), "the same branch twice differs by rounding only"


def test_terms_act_in_their_part_of_the_run(model, context, reference):
    guider = guider_of(model, semantix(context, reference, start=0.0, end=0.5))
    run(guider, context)
    middle = model.get_model_object("model_sampling").percent_to_sigma(0.5)
    assert [s.sigma for s in guider.report.steps] == pytest.approx(
        [float(s) for s in context.sigmas[:-1] if s >= middle]
    )
    assert 0 < len(guider.report.steps) < STEPS


def test_a_run_that_changes_nothing_says_why(model, context, reference, caplog):
    for energy, reason in (
        (semantix(context, reference, (0.0, 0.0, 0.0)), "all weights are 0"),
        (semantix(context, reference, start=1.0, end=1.0), "start to end range"),
        (Energy((SpatialTerm(Stream(context), 1.0),)), ""),
    ):
        guider = guider_of(model, energy)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            out = run(guider, context)
        told = why_nothing(guider.report, energy)
        assert reason in told
        if reason:
            assert told in caplog.text
            assert torch.allclose(out, context.to_outer(context.clean), atol=1e-3)


@pytest.mark.parametrize("what", ["size", "batch", "channels", "model"])
def test_what_does_not_fit_is_refused_before_any_call(model, context, reference, what):
    small = latent(1, 4, 16, 8)
    if what == "model":
        other = invert(small_sd15(seed=3), small)
        energy, message = semantix(context, other), "another checkpoint"
    elif what == "batch":
        energy, message = semantix(context, invert(model, latent(2, 4, 8, 8))), r"\[2, 4, 8, 8\].*\[1, 4, 16, 8\]"
    elif what == "size":
        energy, message = semantix(invert(model, latent(1, 4, 8, 8)), reference), "same size"
    else:
        odd = type(reference)(**{**vars(reference), "model": None, **{
            k: getattr(reference, k).repeat_interleave(2, dim=-3) for k in
            ("clean", "trajectory", "noise_maps", "residual")}, "scale": None, "shift": None})  # fmt: skip
        energy, message = semantix(context, odd), "same channels"
    calls = []
    handle = model.model.diffusion_model.register_forward_pre_hook(lambda module, args: calls.append(1))
    try:
        with pytest.raises(ValueError, match=message):
            run(guider_of(model, energy), context)
    finally:
        handle.remove()
    assert calls == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    half = small_sd15(dtype=dtype)
    context = invert(half, latent(1, 4, 16, 8))
    reference = invert(half, latent(1, 4, 16, 8, seed=5), EMPTY, 1.0)
    guider = guider_of(half, semantix(context, reference))
    out = run(guider, context)
    assert torch.isfinite(out).all()
    assert max(guider.report.table()["gradient"]) > 1e-3
    assert torch.equal(out, run(guider, context))


def test_a_prompt_s_own_mark_is_no_content():
    a = conditioning(1)
    assert fingerprint(a) == fingerprint([[a[0][0].clone(), {"uuid": 3}]])
    assert fingerprint([[a[0][0], {"strength": 0.5}]]) != fingerprint([[a[0][0], {"strength": 0.6}]])


def test_shapes_of_sdxl():
    sdxl, positive, empty = small_sdxl(), pooled_conditioning(1), pooled_conditioning(3)
    assert feature_blocks(sdxl.model.diffusion_model) == (3, 6)
    context = invert_ddpm(InversionTask(sdxl, positive, empty, latent(1, 4, 8, 12) * 0.18215, 2, "normal", CFG, 1))
    reference = invert_ddpm(
        InversionTask(sdxl, empty, empty, latent(1, 4, 8, 12, seed=2) * 0.18215, 2, "normal", 1.0, 2)
    )
    style, kept = Stream(reference, empty), Stream(context)
    energy = Energy((StyleTerm(style, 3.0), SpatialTerm(kept, 0.9), SemanticTerm(kept, 1.0)))
    guider = ReportingGuider(sdxl, positive, empty, CFG, energy, cache=None)
    out = run(guider, context)
    assert torch.isfinite(out).all()
    assert (out - context.to_outer(context.clean)).abs().max() > 0.1
    assert guider.report.reference_forwards == 4, "context and reference, each with its own pooled prompt"
    table = guider.report.table()
    assert min(table["style"]) > 0 < table["semantic"][-1]


def test_shapes_of_sd2():
    """Linear projections and v-prediction, as SD2.1 at 768 px."""
    sd2 = small_sd15(model_type="V_PREDICTION", linear=True)
    context = invert(sd2, latent(1, 4, 16, 8))
    reference = invert(sd2, latent(1, 4, 16, 8, seed=5), EMPTY, 1.0)
    guider = guider_of(sd2, semantix(context, reference))
    out = run(guider, context)
    assert (out - context.to_outer(context.clean)).abs().max() > 0.1
    assert len(guider.report.steps) == STEPS
