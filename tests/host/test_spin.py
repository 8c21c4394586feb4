"""Spin's injection and style energy in the host, on small random UNets and on the demo model."""

import logging
from contextlib import contextmanager
from types import SimpleNamespace

import comfy.controlnet
import comfy.model_management
import comfy.patcher_extension
import comfy.samplers
import node_helpers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import BasicGuider, DualCFGGuider, SamplerCustom, SamplerCustomAdvanced
from newer_hosts import context_handler
from semantic_style.attention.layers import all_cross_attention
from semantic_style.attention.scsa_attention import ScsaSettings
from semantic_style.benchmarks.random_models import (
    ReportingGuider,
    conditioning,
    pooled_conditioning,
    small_sd15,
    small_sdxl,
)
from semantic_style.host.apply_scsa import Patch, Pictures, apply_scsa
from semantic_style.host.apply_spin import KEY, apply_spin, spin_energy
from semantic_style.host.invert import InversionTask, invert_ddim, invert_ddpm
from semantic_style.host.reference_cache import ReferenceCache
from semantic_style.host.replay_sampler import ReplayNoise, ReplaySampler
from semantic_style.host.small_model import unet_model
from semantic_style.nodes.nodes_spin import ApplySpin, KeepBackground, SpinStyleEnergy
from semantic_style.paperland import model as paperland
from semantic_style.regions.masks import mask_on_grid
from semantic_style.regions.semantic_map import SemanticMap
from semantic_style.samplers.semantix_energy import semantix_energy
from semantic_style.samplers.terms import Energy, SemanticTerm, SpatialTerm, Stream

pytestmark = pytest.mark.usefixtures("one_thread", "as_the_host_runs_nodes")

POSITIVE, NEGATIVE, EMPTY = conditioning(1), conditioning(2), conditioning(3)
REFERENCE = conditioning(4, tokens=11)
STEPS, CFG, SIZE = 2, 3.5, (16, 8)
SD15_SCALE = 0.18215


@pytest.fixture(scope="module")
def model():
    return small_sd15()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def right(rows=1, size=SIZE):
    """A MASK in pixels: white from a column on that differs from picture to picture."""
    mask = torch.zeros(rows, 8 * size[0], 8 * size[1])
    for i in range(rows):
        mask[i, :, 8 * (4 - i) :] = 1
    return mask


@pytest.fixture(scope="module")
def spun(model):
    with torch.inference_mode():
        return apply_spin(model, REFERENCE, right())


def cfg_guider(model, positive=POSITIVE, negative=NEGATIVE, cfg=CFG):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


class Once(comfy.samplers.Sampler):
    """A sampler that asks for one prediction and keeps it."""

    def __init__(self, sigma):
        self.sigma = sigma

    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=0):
        self.denoised = guider(noise, torch.full((len(noise),), self.sigma), **extra_args)
        return noise


def predict(guider, x=None, sigma=1.3):
    x = random(1, 4, *SIZE, seed=9) if x is None else x
    asked = Once(sigma)
    guider.sample(x, torch.zeros_like(x), asked, torch.tensor([sigma, 0.0]), disable_pbar=True, seed=0)
    return asked.denoised


def branches(model, x=None, positive=POSITIVE, negative=NEGATIVE):
    """What the positive and the negative prompt predict in one CFG call."""
    seen = {}

    def keep(args):
        seen.update(args)
        return args["input"] - args["cond_denoised"]

    watched = model.clone()
    watched.set_model_sampler_cfg_function(keep)
    predict(cfg_guider(watched, positive, negative), x)
    return seen["cond_denoised"], seen["uncond_denoised"]


def stock(model, sampler="euler", steps=STEPS, cfg=CFG, positive=POSITIVE, rows=1, size=SIZE, channels=4, **settings):
    """A run of the host's own KSampler."""
    empty = torch.zeros(rows, channels, *size)
    sampler = comfy.samplers.KSampler(model, steps, model.load_device, sampler, "normal", 1.0, model.model_options)
    noise = random(*empty.shape, seed=9)
    given = {"latent_image": empty, "disable_pbar": True, "seed": 1, **settings}
    return sampler.sample(noise, positive, NEGATIVE, cfg, **given)


def replayed(guider, inversion):
    image = inversion.to_outer(inversion.clean)
    noise = ReplayNoise(inversion).generate_noise({"samples": image})
    return guider.sample(noise, image, ReplaySampler(inversion), inversion.sigmas, disable_pbar=True, seed=0)


def outputs(node, *inputs):
    """Of a node of the host, in its old or new form."""
    result = node.execute(*inputs) if hasattr(node, "execute") else getattr(node(), node.FUNCTION)(*inputs)
    return tuple(getattr(result, "result", result))


def task(model, seed, prompt=EMPTY, channels=4, rows=1, size=SIZE):
    return InversionTask(
        model, prompt, NEGATIVE, random(rows, channels, *size, seed=seed) / SD15_SCALE, STEPS, "normal", 1.0, 0
    )


@contextmanager
def attention_of(model):
    """Queries and outcome of every cross-attention of the last call, by module."""
    seen, handles = {}, []
    for attn2 in all_cross_attention(model.model.diffusion_model).values():
        handles.append(attn2.to_q.register_forward_hook(lambda m, args, q, at=attn2: seen.update({at: (q,)})))
        handles.append(
            attn2.to_out.register_forward_pre_hook(lambda m, args, at=attn2: seen.update({at: (*seen[at], args[0])}))
        )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def case(name):
    """Model, conditionings (positive, negative, reference of another length), channels of its latents."""
    if name == "SDXL":
        return small_sdxl(), [pooled_conditioning(1), pooled_conditioning(2), pooled_conditioning(4, tokens=11)], 4
    if name == "Paperland":
        net = paperland.load()
        host = unet_model(
            "Paperland", net.unet.config.host(), net.unet.state_dict(), rgb_factors=paperland.preview_factors()
        )
        return host, [[[net.text([t]), {}]] for t in ("red and red shaded sky", "", "blue striped tree")], 48
    sd2 = {"model_type": "V_PREDICTION", "linear": True} if name == "SD2.x" else {}
    return small_sd15(**sd2), [POSITIVE, NEGATIVE, REFERENCE], 4


@pytest.mark.parametrize("name", ["SD1.x", "SD2.x", "SDXL", "Paperland"])
def test_inside_the_mask_it_is_the_references_prompt(name):
    model, (positive, negative, reference), channels = case(name)
    # Odd on purpose, with two pictures and a mask for each.
    x = random(2, channels, 15, 9, seed=9)
    plain, unconditional = branches(model, x, positive, negative)
    full, still = branches(apply_spin(model, reference, torch.ones(1, 30, 18)), x, positive, negative)
    # The pooled part of SDXL's prompts stays the background's.
    told = [[reference[0][0], positive[0][1]]]
    expected, _ = branches(model, x, told, negative)
    torch.testing.assert_close(full, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(still, unconditional)
    assert (full - plain).abs().max() > 0.01

    masks = right(2, (15, 9))
    with attention_of(model) as seen:
        half, still = branches(apply_spin(model, reference, masks), x, positive, negative)
    assert torch.equal(still, unconditional)
    for attn2, (q, out) in seen.items():
        h = next(h for h, w in ((15, 9), (8, 5), (4, 3), (2, 2)) if h * w == q.shape[1])
        weight = mask_on_grid(masks, (h, q.shape[1] // h)).flatten(1)[..., None]
        attend = comfy.ldm.modules.attention.optimized_attention
        expected = [
            attend(q, *(to(tokens.expand(4, -1, -1)) for to in (attn2.to_k, attn2.to_v)), attn2.heads)
            for ((tokens, _),) in (negative, positive, reference)
        ]
        rows = [i for i in range(4) if not torch.allclose(out[i], expected[0][i], rtol=1e-3, atol=1e-3)]
        assert rows in ([0, 1], [2, 3])
        blended = (1 - weight) * expected[1][rows] + weight * expected[2][rows]
        torch.testing.assert_close(out[rows], blended, rtol=1e-4, atol=1e-4)
    for i in range(2):
        alone, _ = branches(apply_spin(model, reference, masks[i : i + 1]), x[i : i + 1], positive, negative)
        torch.testing.assert_close(half[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_every_way_to_sample(model, spun):
    plain, out = stock(model), stock(spun)
    assert (plain - out).abs().max() > 0.01
    assert torch.equal(out, stock(spun)), "same seed, same picture"
    assert torch.equal(stock(model), plain), "the model is as it was"
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
    sampler, empty = comfy.samplers.sampler_object("euler"), {"samples": torch.zeros(1, 4, *SIZE)}
    noise = SimpleNamespace(seed=1, generate_noise=lambda latent: random(1, 4, *SIZE, seed=9))
    (advanced, _) = outputs(SamplerCustomAdvanced, noise, cfg_guider(spun), sampler, sigmas, empty)
    assert torch.equal(advanced["samples"], out)
    (custom, _) = outputs(SamplerCustom, spun, True, 1, CFG, POSITIVE, NEGATIVE, sampler, sigmas, empty)
    assert torch.isfinite(custom["samples"]).all()
    (basic,) = outputs(BasicGuider, spun, POSITIVE)
    (alone, _) = outputs(SamplerCustomAdvanced, noise, basic, sampler, sigmas, empty)
    assert torch.equal(alone["samples"], stock(spun, cfg=1.0))
    inversion = invert_ddpm(task(model, 1))
    assert (replayed(cfg_guider(spun), inversion) - replayed(cfg_guider(model), inversion)).abs().max() > 0.01
    for name in ("dpmpp_2m_sde", "heun"):
        assert torch.isfinite(stock(spun, sampler=name)).all()
    inpainting = {"latent_image": random(1, 4, *SIZE, seed=3), "denoise_mask": mask_on_grid(right(), SIZE)[:, None]}
    kept = stock(spun, **inpainting)
    torch.testing.assert_close(kept[..., :4], inpainting["latent_image"][..., :4])
    assert (kept - stock(model, **inpainting)).abs().max() > 0.01


def test_guiders_that_number_their_branches_otherwise(model, spun):
    """The negative prompt keeps its rows wherever it stands and however it is called."""
    (dual,) = outputs(DualCFGGuider, spun, POSITIVE, EMPTY, NEGATIVE, 2.0, 1.5, "regular")
    (dual_plain,) = outputs(DualCFGGuider, model, POSITIVE, EMPTY, NEGATIVE, 2.0, 1.5, "regular")
    positive, negative = branches(spun)
    plain, _ = branches(model)
    # negative + 1.5 * (middle - negative) + 2 * (positive - middle): only the positive's part differs.
    torch.testing.assert_close(predict(dual) - predict(dual_plain), 2.0 * (positive - plain), rtol=1e-3, atol=1e-4)

    seen = []

    def alone(args):
        """As SAG does: the negative prompt by itself."""
        (out, _) = comfy.samplers.calc_cond_batch(
            args["model"], [args["uncond"], None], args["input"], args["sigma"], args["model_options"]
        )
        seen.append(out)
        return args["denoised"]

    calling = spun.clone()
    calling.set_model_sampler_post_cfg_function(alone)
    predict(cfg_guider(calling))
    torch.testing.assert_close(seen[0], negative, rtol=1e-5, atol=1e-5)


def test_it_acts_in_its_part_of_the_run(model):
    def made(**part):
        return stock(apply_spin(model, REFERENCE, right(), **part), steps=4)

    whole, plain = made(), stock(model, steps=4)
    first, last = made(end=0.5), made(start=0.5)
    assert torch.equal(made(start=0.0, end=1.0), whole)
    assert torch.equal(made(start=1.0), plain)
    assert torch.equal(made(strength=0.0), plain)
    pictures = [whole, plain, first, last, made(strength=0.5), made(soft_edge=16)]
    for i, a in enumerate(pictures):
        for b in pictures[:i]:
            assert (a - b).abs().max() > 1e-3


def test_a_patch_that_did_nothing_says_so(model, spun, caplog):
    def told(model, **settings):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            stock(model, **settings)
        return [r.message for r in caplog.records if "never acted" in r.message]

    assert told(spun) == []
    assert "start to end range" in told(apply_spin(model, REFERENCE, right(), start=1.0))[0]
    assert "strength is 0" in told(apply_spin(model, REFERENCE, right(), strength=0.0))[0]
    left = [[POSITIVE[0][0], {"area": (16, 4, 0, 0)}]]
    assert "covered the mask" in told(spun, positive=left)[0]

    def skipping(executor, x, *args, **kwargs):
        return torch.zeros_like(x)

    caching = model.clone()
    caching.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "test", skipping)
    assert "was not called" in told(apply_spin(caching, REFERENCE, right()))[0]


def test_prompts_for_areas_get_their_part_of_the_mask(model):
    """A prompt for the picture's right half sees what a picture of that half would."""
    area = [[POSITIVE[0][0], {"area": (16, 4, 0, 4), "strength": 1.0}]]
    mask = torch.zeros(1, 128, 64)
    mask[:, 64:, 48:] = 1
    x = random(1, 4, *SIZE, seed=9)
    whole = predict(cfg_guider(apply_spin(model, REFERENCE, mask), area, cfg=1.0), x)[..., 4:]
    # Proportions differ from the whole picture's: the mask is cut as well.
    part = predict(cfg_guider(apply_spin(model, REFERENCE, mask[..., 32:]), cfg=1.0), x[..., 4:].clone())
    torch.testing.assert_close(whole, part, rtol=1e-4, atol=1e-4)
    assert (part - predict(cfg_guider(model, cfg=1.0), x[..., 4:].clone())).abs().max() > 0.01


def test_windows_of_a_clip_get_their_frames_masks(model):
    frames = 5
    masks = torch.zeros(frames, 16, 8)
    for i in range(frames):
        masks[i, 3 * i : 3 * i + 3] = 1
    x = random(frames, 4, *SIZE, seed=9)

    def predicted(m):
        """In a run whose levels are as many as its frames, which the host's windows compare with each other."""
        guider, asked = cfg_guider(m), Once(1.3)
        guider.sample(x, torch.zeros_like(x), asked, torch.tensor([1.3]), disable_pbar=True, seed=0)
        return asked.denoised

    spun = apply_spin(model, REFERENCE, masks)
    whole = predicted(spun)
    windowed = spun.clone()
    windowed.model_options["context_handler"] = context_handler(3, 1)
    # No motion model: frames do not depend on each other, so windows change nothing.
    torch.testing.assert_close(predicted(windowed), whole, rtol=1e-4, atol=1e-4)
    assert (whole - predicted(model)).abs().amax(dim=(1, 2, 3)).min() > 0.01


def test_the_injection_follows_the_copy_of_the_network_that_is_called(model):
    """As several GPUs do, each with a copy of its own; these differ, so that it shows whose layers are used."""
    other, turn = small_sd15(seed=1), iter([model, small_sd15(seed=1)])

    def elsewhere(apply, args):
        return next(turn).model.apply_model(args["input"], args["timestep"], **args["c"])

    class Twice(Once):
        def sample(self, *args):
            super().sample(*args)
            return super().sample(*args)

    x, asked = random(1, 4, *SIZE, seed=9), Twice(1.3)
    routed = apply_spin(model, REFERENCE, right())
    routed.set_model_unet_function_wrapper(elsewhere)
    cfg_guider(routed, cfg=1.0).sample(x, torch.zeros_like(x), asked, torch.tensor([1.3, 0.0]), disable_pbar=True)
    expected = predict(cfg_guider(apply_spin(other, REFERENCE, right()), cfg=1.0), x)
    torch.testing.assert_close(asked.denoised, expected, rtol=1e-4, atol=1e-4)


def test_tiles_that_nobody_knows_the_place_of_are_refused(spun):
    tiled = spun.clone()

    def halves(apply, args):
        parts = [apply(part, args["timestep"], **args["c"]) for part in args["input"].chunk(2, dim=2)]
        return torch.cat(parts, dim=2)

    tiled.set_model_unet_function_wrapper(halves)
    with pytest.raises(ValueError, match="cuts the picture into tiles"):
        stock(tiled)


def test_it_chains_with_what_replaces_cross_attention_before_or_after(model):
    calls = []

    def other(q, k, v, extra):
        calls.append((k.shape[1], tuple(extra["cond_or_uncond"]), len(q)))
        return comfy.ldm.modules.attention.optimized_attention(q, k, v, extra["n_heads"]) + 0.1

    def with_other(m):
        m = m.clone()
        m.set_model_attn2_replace(other, "output", 7)
        return m

    before = predict(cfg_guider(apply_spin(with_other(model), REFERENCE, right())))
    assert sorted(set(calls)) == [(7, (0, 1), 2), (11, (0,), 1)] or sorted(set(calls)) == [
        (7, (1, 0), 2),
        (11, (0,), 1),
    ]
    after = predict(cfg_guider(with_other(apply_spin(model, REFERENCE, right()))))
    assert torch.equal(before, after)
    assert (before - predict(cfg_guider(apply_spin(model, REFERENCE, right())))).abs().max() > 1e-3


def test_loras_and_controls_stay_in_effect(model, spun):
    class Control(comfy.controlnet.ControlBase):
        """Adds a constant to the skips, as a ControlNet adds what it computes."""

        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            self.tokens = cond["c_crossattn"].shape[1]
            return {"input": [], "middle": [], "output": [None] * 3 + [torch.full((1, 1, 1, 1), 0.3)] * 3}

        def copy(self):
            return self

        def get_models(self):
            return []

        def pre_run(self, model, percent_to_timestep_function):
            pass

    plain, control = predict(cfg_guider(spun)), Control()
    controlled = [[POSITIVE[0][0], {"control": control, "control_apply_to_uncond": True}]]
    assert (predict(cfg_guider(spun, controlled)) - plain).abs().max() > 0.01
    assert control.tokens == 7

    def with_lora(m):
        changed = m.clone()
        key = "diffusion_model.output_blocks.4.1.transformer_blocks.0.attn2.to_v.weight"
        shape = model.get_model_object(key).shape
        changed.add_patches({key: ("diff", (0.3 * random(*shape, seed=1),))}, 1.0)
        return changed

    inside = predict(cfg_guider(apply_spin(with_lora(model), REFERENCE, right())))
    assert (inside - plain).abs().max() > 1e-3
    assert torch.equal(inside, predict(cfg_guider(with_lora(spun))))
    assert torch.equal(predict(cfg_guider(spun)), plain)


def test_with_scsa_on_the_same_model_in_either_order(model):
    pictures = Pictures(*(invert_ddim(task(model, seed)) for seed in (1, 2)))
    regions = torch.zeros(1, *SIZE, dtype=torch.long)
    regions[:, 8:] = 1
    patch = Patch(pictures, SemanticMap(regions, regions), ScsaSettings(a1=0.0))
    one = stock(apply_scsa(apply_spin(model, REFERENCE, right()), patch))
    other = stock(apply_spin(apply_scsa(model, patch), REFERENCE, right()))
    assert torch.equal(one, other)
    assert (one - stock(apply_scsa(model, patch))).abs().max() > 0.01
    assert (one - stock(apply_spin(model, REFERENCE, right()))).abs().max() > 0.01


def background_mask():
    mask = torch.zeros(1, 128, 64)
    mask[:, 32:96, 16:] = 1
    return mask


def test_under_the_energy_guider_with_gradient_through_it(model):
    background = invert_ddpm(task(model, 1, POSITIVE))
    spun, mask = apply_spin(model, REFERENCE, background_mask()), background_mask()
    kept = Stream(background)
    # The map of out is compared with the context's: both over the background's 7 tokens, not the reference's 11.
    semantic = Energy((SemanticTerm(kept, 20.0), SpatialTerm(kept, 0.9)))

    def guider(model, energy, **settings):
        return ReportingGuider(model, POSITIVE, NEGATIVE, CFG, energy, cache=ReferenceCache(), **settings)

    alone = replayed(cfg_guider(spun), background)
    style = spin_energy(background, mask, 20.0)
    for energy in (style, semantic, style + semantic):
        used = guider(spun, energy)
        out = replayed(used, background)
        assert (out - alone).abs().max() > 1e-3
        assert torch.equal(out, replayed(guider(spun, energy), background))
        assert max(used.report.table()["gradient"]) > 0
    out = replayed(guider(spun, style), background)
    # The negative prompt is called by itself there, and still has no reference in it.
    torch.testing.assert_close(replayed(guider(spun, style, checkpointing=True), background), out, rtol=1e-3, atol=1e-3)
    nothing = spin_energy(background, mask, 0.0)
    torch.testing.assert_close(replayed(guider(spun, nothing), background), alone, rtol=1e-3, atol=1e-3)


def test_a_cancelled_or_failed_run_leaves_the_model_as_it_was(model, spun):
    plain, out = stock(model), stock(spun)
    calls = []

    def cancel(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise comfy.model_management.InterruptProcessingException()
        return executor(*args, **kwargs)

    cancelled = spun.clone()
    cancelled.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        stock(cancelled, steps=3)
    assert torch.equal(stock(model), plain)
    assert torch.equal(stock(spun), out)
    assert KEY not in model.model_options["transformer_options"].get("wrappers", {}).get("diffusion_model", {})
    wrappers = spun.model_options["transformer_options"].get("wrappers", {})
    assert "diffusion_model" not in wrappers, "a run's state lives in the run"


def test_low_memory_gives_the_same(model, spun):
    expected = predict(cfg_guider(spun))
    low = apply_spin(small_sd15(), REFERENCE, right())

    def unload(executor, base, *args, **kwargs):
        base.current_patcher.partially_unload(torch.device("cpu"), 1e32)
        assert [m for m in low.model.modules() if getattr(m, "comfy_cast_weights", False)]
        return executor(base, *args, **kwargs)

    low.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "test", unload)
    torch.testing.assert_close(predict(cfg_guider(low)), expected, rtol=1e-4, atol=1e-4)


def test_half_precision(model):
    half = small_sd15(dtype=torch.bfloat16)
    spun = apply_spin(half, REFERENCE, right())
    out, plain = stock(spun), stock(half)
    assert torch.isfinite(out).all()
    assert (out - plain).abs().max() > 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.zeros(1, 8, 8)}, "is empty"),
        ({"mask": torch.full((1, 8, 8), float("nan"))}, "not finite"),
        ({"reference": conditioning(1)[:0]}, "conditioning is empty"),
        ({"reference": [[torch.zeros(1, 7, 32), {}]]}, "takes 64: encode it with the CLIP"),
        ({"reference": [[torch.full((1, 7, 64), float("nan")), {}]]}, "not finite"),
        ({"strength": 2.0}, "between 0"),
        ({"start": 0.8, "end": 0.2}, "start not after end"),
        ({"soft_edge": -1.0}, "0 or more pixels"),
    ],
)
def test_what_does_not_fit_is_refused_at_once(model, change, message):
    given = {"reference": REFERENCE, "mask": right(), **change}
    with pytest.raises(ValueError, match=message):
        apply_spin(model, **given)


def test_what_does_not_fit_the_latent_is_refused_before_the_first_call(model, spun):
    def bad(model, message, **settings):
        with pytest.raises(ValueError, match=message):
            stock(model, **settings)

    bad(apply_spin(model, REFERENCE, right().transpose(1, 2)), "other proportions")
    bad(spun, "other proportions", size=(8, 8))
    bad(apply_spin(model, REFERENCE, right(2)), "2 masks for 3 pictures", rows=3)
    bad(apply_spin(model, conditioning(4, batch=2), right()), "2 rows of the reference's", rows=3)
    with pytest.raises(ValueError, match="invert with the model from before"):
        invert_ddim(task(spun, 1))
    background = invert_ddpm(task(model, 1, POSITIVE))
    thin = torch.zeros(1, 128, 64)
    thin[:, :8, :8] = 1
    for mask, message in ((thin, "inside covers"), (torch.ones(1, 128, 64), "is full")):
        with pytest.raises(ValueError, match=message):
            replayed(ReportingGuider(model, POSITIVE, NEGATIVE, CFG, spin_energy(background, mask)), background)
    # Cropped to whole places of the latent, a picture of 130x67 gives 16x8.
    assert torch.isfinite(stock(apply_spin(model, REFERENCE, torch.ones(1, 130, 67)))).all()


def test_what_is_left_out_of_the_reference_is_said(model, caplog):
    reference = node_helpers.conditioning_set_values(REFERENCE + POSITIVE, {"mask": torch.ones(1, 16, 8)})
    with caplog.at_level(logging.WARNING):
        several = apply_spin(model, reference, right())
    assert any("takes the first" in r.message for r in caplog.records)
    assert any("leaves out the mask" in r.message for r in caplog.records)
    assert torch.equal(stock(several), stock(apply_spin(model, REFERENCE, right())))


def test_a_reference_counts_in_its_own_range(model, caplog):
    def ranged(reference, start, end):
        return node_helpers.conditioning_set_values(reference, {"start_percent": start, "end_percent": end})

    early, late = ranged(REFERENCE, 0.0, 0.5), ranged(EMPTY, 0.5, 1.0)
    with caplog.at_level(logging.WARNING):
        both = stock(apply_spin(model, early + late, right()), steps=4)
    assert caplog.records == []
    by_hand = apply_spin(apply_spin(model, REFERENCE, right(), end=0.5), EMPTY, right(), start=0.5)
    assert torch.equal(both, stock(by_hand, steps=4))
    only = apply_spin(model, early, right(), start=0.2)
    assert torch.equal(stock(only, steps=4), stock(apply_spin(model, REFERENCE, right(), start=0.2, end=0.5), steps=4))
    never = stock(apply_spin(model, early, right(), start=0.6), steps=4)
    assert torch.equal(never, stock(model, steps=4))


def test_two_subjects(model):
    top, bottom = torch.zeros(1, 16, 8), torch.zeros(1, 16, 8)
    top[:, :8], bottom[:, 8:] = 1, 1
    one, other = (apply_spin(model, REFERENCE, top), apply_spin(model, EMPTY, bottom))
    both = predict(cfg_guider(apply_spin(one, EMPTY, bottom)))
    assert (both - predict(cfg_guider(one))).abs().max() > 0.01
    assert (both - predict(cfg_guider(other))).abs().max() > 0.01
    in_front = predict(cfg_guider(apply_spin(one, EMPTY, torch.ones(1, 16, 8))))
    expected = predict(cfg_guider(apply_spin(model, EMPTY, torch.ones(1, 16, 8))))
    torch.testing.assert_close(in_front, expected, rtol=1e-5, atol=1e-5)


def test_on_a_backgrounds_path_the_outside_is_the_background(model, spun):
    """Replay under a latent noise mask keeps the trajectory outside; the subject comes in inside."""
    latent_mask = mask_on_grid(right(), SIZE)[:, None]
    for invert in (invert_ddim, invert_ddpm):
        background = invert(task(model, 1, POSITIVE))
        image = background.to_outer(background.clean)
        noise = ReplayNoise(background).generate_noise({"samples": image})

        def painted(m, background=background, image=image, noise=noise):
            sampler = ReplaySampler(background)
            run = {"denoise_mask": latent_mask, "disable_pbar": True, "seed": 0}
            return cfg_guider(m).sample(noise, image, sampler, background.sigmas, **run)

        out = painted(spun)
        torch.testing.assert_close(out[..., :4], image[..., :4], rtol=1e-4, atol=1e-4)
        assert (out - painted(model))[..., 4:].abs().max() > 0.01


def test_everything_at_once(model):
    """SCSA and the injection on one MODEL, under Semantix's energies and Spin's, on a background's path."""
    background, style = invert_ddpm(task(model, 1, POSITIVE)), invert_ddpm(task(model, 2))
    regions = torch.zeros(1, *SIZE, dtype=torch.long)
    regions[:, 8:] = 1
    maps = SemanticMap(regions, regions)
    spun = apply_spin(model, REFERENCE, background_mask())
    both = apply_scsa(spun, Patch(Pictures(background, style), maps, ScsaSettings(a1=0.0)))
    energy = semantix_energy(Stream(background), Stream(style, EMPTY), regions=maps)
    energy += spin_energy(background, background_mask())
    guider = ReportingGuider(both, POSITIVE, NEGATIVE, CFG, energy, cache=ReferenceCache())
    out = replayed(guider, background)
    assert torch.isfinite(out).all()
    table = guider.report.table()
    assert {"style", "spatial", "semantic", "spin style"} <= set(table)
    assert min(table["spin style"]) > 0
    assert torch.equal(out, replayed(guider, background))


def test_frames_with_an_empty_mask_are_left_out_and_named(model):
    background, mask = invert_ddim(task(model, 1, POSITIVE)), background_mask()
    masks = torch.cat([mask, torch.zeros_like(mask), mask])
    energy, report = SpinStyleEnergy.execute(background, masks, 2.0, 0.0, 1.0).result
    assert report == "Left out, their masks being empty: 2 of 3 frames"
    x = random(3, 4, *SIZE, seed=9)

    def guided(energy, x):
        return predict(ReportingGuider(model, POSITIVE, NEGATIVE, 1.0, energy, cache=None), x)

    out, plain = guided(energy, x), guided(spin_energy(background, mask, 0.0), x)
    torch.testing.assert_close(out[1], plain[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(out[[0, 2]], guided(spin_energy(background, mask, 2.0), x[[0, 2]]), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="is empty"):
        SpinStyleEnergy.execute(background, 0 * masks, 2.0, 0.0, 1.0)


def test_the_nodes(model):
    patched, positive = ApplySpin.execute(model, REFERENCE, POSITIVE, right(), 1.0, 0.0, 1.0, 0).result
    assert positive is POSITIVE
    assert torch.equal(stock(patched), stock(apply_spin(model, REFERENCE, right())))
    background = invert_ddpm(task(model, 1, POSITIVE))
    energy, report = SpinStyleEnergy.execute(background, background_mask(), 2.0, 0.1, 0.9).result
    assert report == ""
    (term,) = energy.terms
    assert (term.weight, term.start, term.end, term.stream.conditioning) == (2.0, 0.1, 0.9, background.positive)
    energy, _ = SpinStyleEnergy.execute(background, background_mask(), 2.0, 0.1, 0.9, NEGATIVE).result
    assert energy.terms[0].stream.conditioning is NEGATIVE
    image, original = torch.rand(2, 16, 8, 3), torch.rand(1, 16, 8, 3)
    mask = torch.zeros(1, 128, 64)
    mask[:, 64:] = 1
    (kept,) = KeepBackground.execute(image, original, mask, 0).result
    assert torch.equal(kept[:, :8], original[:, :8].expand(2, -1, -1, -1))
    assert torch.equal(kept[:, 8:], image[:, 8:])
