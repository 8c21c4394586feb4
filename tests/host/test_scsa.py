"""SCSA as a patch of the host's MODEL, on small random UNets and on the demo model."""

import gc
import logging
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import comfy.controlnet
import comfy.ldm.modules.attention
import comfy.model_management
import comfy.patcher_extension
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import BasicGuider, SamplerCustom, SamplerCustomAdvanced
from semantic_style.attention.layers import self_attention_layers, transformer_block
from semantic_style.attention.regional_attention import order_by_region
from semantic_style.attention.scsa_attention import References, ScsaSettings, SelfAttention, prepare, scsa
from semantic_style.attention.scsa_patch import Scsa
from semantic_style.benchmarks.random_models import (
    ReportingGuider,
    conditioning,
    pooled_conditioning,
    small_sd15,
    small_sdxl,
)
from semantic_style.host.apply_scsa import Patch, Pictures, apply_scsa
from semantic_style.host.invert import InversionTask, invert_ddim, invert_ddpm
from semantic_style.host.reference_cache import ReferenceCache
from semantic_style.host.replay_sampler import ReplayNoise, ReplaySampler
from semantic_style.host.small_model import PixelVAE, unet_model
from semantic_style.nodes.nodes_paperland import LoadPaperland
from semantic_style.nodes.nodes_scsa import ApplySCSA, parse_blocks
from semantic_style.paperland import model as paperland
from semantic_style.paperland import scenes
from semantic_style.regions.map_pictures import draw_map
from semantic_style.regions.semantic_map import SemanticMap
from semantic_style.samplers.terms import Energy, SemanticTerm, SpatialTerm, Stream, StyleTerm

pytestmark = pytest.mark.usefixtures("one_thread", "as_the_host_runs_nodes")

POSITIVE, NEGATIVE, EMPTY = conditioning(1), conditioning(2), conditioning(3)
STEPS, CFG, SIZE = 2, 3.5, (16, 8)
SD15_SCALE = 0.18215


@pytest.fixture(scope="module")
def model():
    return small_sd15()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def invert(model, seed, rows=1, size=SIZE, prompt=EMPTY, channels=4):
    image = random(rows, channels, *size, seed=seed) / SD15_SCALE
    return invert_ddim(InversionTask(model, prompt, prompt, image, STEPS, "normal", 1.0, 0))


def label_maps(seed=0, rows=1, size=SIZE, style_size=SIZE):
    generator = torch.Generator().manual_seed(seed)
    # Blobs: regions that a coarse grid still has.
    coarse = [torch.randint(0, 3, (rows, 4, 4), generator=generator) for _ in range(2)]
    content, style = (
        c.repeat_interleave(s[0] // 4, 1).repeat_interleave(s[1] // 4, 2)
        for c, s in zip(coarse, (size, style_size), strict=True)
    )
    return SemanticMap(content, style[:1])


def pictures_of(model, rows=1, size=SIZE, style_size=SIZE, **settings):
    return Pictures(
        invert(model, 1, rows, size, **settings),
        invert(model, 2, 1, style_size, **settings),
        invert(model, 3, 1, size, **settings),
        invert(model, 4, 1, style_size, **settings),
    )


@pytest.fixture(scope="module")
def pictures(model):
    with torch.inference_mode():
        return pictures_of(model)


@pytest.fixture(scope="module")
def patch(pictures):
    return Patch(pictures, label_maps())


@pytest.fixture(scope="module")
def patched(model, patch):
    return apply_scsa(model, patch)


def cfg_guider(model, positive=POSITIVE, negative=NEGATIVE, cfg=CFG):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def replayed(guider, inversion, callback=None):
    image = inversion.to_outer(inversion.clean)
    noise = ReplayNoise(inversion).generate_noise({"samples": image})
    return guider.sample(
        noise, image, ReplaySampler(inversion), inversion.sigmas, callback=callback, disable_pbar=True, seed=0
    )


def stock(model, sampler="euler", steps=STEPS, cfg=CFG, positive=POSITIVE, rows=1, **settings):
    """A run of the host's own KSampler."""
    empty = torch.zeros(rows, 4, *SIZE)
    sampler = comfy.samplers.KSampler(model, steps, model.load_device, sampler, "normal", 1.0, model.model_options)
    return sampler.sample(
        random(*empty.shape, seed=9), positive, NEGATIVE, cfg, latent_image=empty, disable_pbar=True, seed=1, **settings
    )


def outputs(node, *inputs):
    """Of a node of the host, in its old or new form."""
    result = node.execute(*inputs) if hasattr(node, "execute") else getattr(node(), node.FUNCTION)(*inputs)
    return tuple(getattr(result, "result", result))


def test_a_second_larger_pass_is_told_its_nodes_and_they_work(model, pictures, patched):
    first = stock(patched)
    larger = torch.nn.functional.interpolate(first, scale_factor=2, mode="bilinear")

    def second_pass(model):
        sampler = comfy.samplers.KSampler(model, 4, model.load_device, "euler", "normal", 0.5, model.model_options)
        noise = random(*larger.shape, seed=3)
        given = {"latent_image": larger, "disable_pbar": True, "seed": 1}
        return sampler.sample(noise, POSITIVE, NEGATIVE, CFG, **given)

    with pytest.raises(ValueError, match=r"Upscale Image .* VAE Encode, DDIM Inversion .* own Apply SCSA") as told:
        second_pass(patched)
    assert "8x16, the one being sampled is 16x32" in str(told.value)
    content = invert(model, 1, size=(32, 16))
    again = apply_scsa(model, Patch(Pictures(content, pictures.style), label_maps(), ScsaSettings(a1=0.0)))
    out = second_pass(again)
    assert torch.isfinite(out).all()
    assert not torch.equal(out, second_pass(model))


def once(model, positive=POSITIVE, cfg=CFG):
    """One prediction of a picture, with and without prompt."""
    return predict(cfg_guider(model, positive, cfg=cfg), random(1, 4, *SIZE, seed=9), 1.3)


class Levels(comfy.samplers.Sampler):
    """A sampler that asks for one prediction and keeps it."""

    def __init__(self, sigma):
        self.sigma = sigma

    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=0):
        self.denoised = guider(noise, torch.full((len(noise),), self.sigma), **extra_args)
        return noise


def predict(guider, x, sigma):
    asked = Levels(sigma)
    guider.sample(x, torch.zeros_like(x), asked, torch.tensor([sigma, 0.0]), disable_pbar=True, seed=0)
    return asked.denoised


@contextmanager
def rows_of_calls(model):
    rows = []
    handle = model.model.diffusion_model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        yield rows
    finally:
        handle.remove()


@contextmanager
def entering(unet, layers):
    """What enters the whole transformer blocks, not by the way that the patch reads it."""
    seen, handles = {}, []
    for layer in layers:
        module = transformer_block(unet, layer)
        handles.append(module.register_forward_pre_hook(lambda m, args, layer=layer: seen.update({layer: args[0]})))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def paperland_model():
    net = paperland.load()
    config = net.unet.config.host()
    return unet_model("Paperland", config, net.unet.state_dict(), rgb_factors=paperland.preview_factors()), net


def case(name):
    """Model, its conditionings (positive, negative, empty), channels of its latents, blocks that SCSA takes."""
    if name == "SDXL":
        prompts = [pooled_conditioning(i) for i in (1, 2, 3)]
        blocks = [(i, j) for i in (0, 1, 2) for j in range(3)] + [(i, j) for i in (3, 4, 5) for j in range(2)]
        return small_sdxl(), prompts, 4, blocks
    if name == "Paperland":
        host, net = paperland_model()
        prompts = [[[net.text([t]), {}]] for t in ("red and red shaded sky", "", "")]
        found = [i for i, b in enumerate(net.unet.output_blocks) if any(hasattr(m, "transformer_blocks") for m in b)]
        return host, prompts, 48, [(i, 0) for i in found if i >= 2]
    prompts = [conditioning(i) for i in (1, 2, 3)]
    sd2 = {"model_type": "V_PREDICTION", "linear": True} if name == "SD2.x" else {}
    return small_sd15(**sd2), prompts, 4, [(i, 0) for i in range(6, 12)]


@pytest.mark.parametrize("name", ["SD1.x", "SD2.x", "SDXL", "Paperland"])
def test_the_blocks_compute_scsa_of_what_enters_them(name):
    model, (positive, negative, empty), channels, blocks = case(name)
    style_size = (8, 16)
    pictures = pictures_of(model, rows=2, style_size=style_size, prompt=empty, channels=channels)
    regions = label_maps(rows=2, style_size=style_size)
    settings = ScsaSettings(temperature=1.5, t1=0.7, t2=0.4, a1=0.4, a2=0.6)
    unet, sigma = model.model.diffusion_model, 1.3
    layers = self_attention_layers(unet)
    assert layers == tuple(("output", *block) for block in blocks)

    left = {}

    def watch(n, extra):
        layer = (*extra["block"], extra["block_index"])
        if layer in layers:
            left[layer] = n
        return n

    model = model.clone()
    model.set_model_attn1_output_patch(watch)
    patched = apply_scsa(model, Patch(pictures, regions, settings))
    x = random(4, channels, *SIZE, seed=7)
    with entering(unet, layers) as seen:
        predict(cfg_guider(patched, positive, negative), x, sigma)
        x_of, after = dict(seen), dict(left)
        entered = []
        for p in vars(pictures).values():
            predict(cfg_guider(model, empty, empty, 1.0), p.at(sigma), sigma)
            entered.append(dict(seen))
    for layer in layers:
        block = transformer_block(unet, layer)
        places = x_of[layer].shape[1]
        scale = next(s for s in (1, 2, 4) if places == SIZE[0] * SIZE[1] // s**2)
        order = order_by_region(
            regions.at((SIZE[0] // scale, SIZE[1] // scale), (style_size[0] // scale, style_size[1] // scale))
        )
        a = block.attn1
        attention = SelfAttention(block.norm1, a.to_q, a.to_k, a.to_v, a.to_out, block.n_heads)
        c, s, c_map, s_map = (e[layer] for e in entered)
        ready = prepare(attention, References(c, s, c_map.expand_as(c), s_map.expand_as(s)), order, settings)
        expected = scsa(attention, x_of[layer], ready, order, settings)
        assert len(expected) == 8, "four pictures, with and without prompt"
        torch.testing.assert_close(after[layer], expected, rtol=2e-4, atol=2e-5)
        assert after[layer].std() > 0.01


def test_each_reference_takes_one_call_for_each_level(model, patched, pictures):
    other = apply_scsa(model, Patch(pictures_of(model, style_size=(8, 16)), label_maps(style_size=(8, 16))))
    references = [1, 1, 1, 1]
    with rows_of_calls(model) as rows:
        stock(patched)
        assert rows == [*references, 2] * STEPS
        rows.clear()
        stock(patched, cfg=1.0)
        assert rows == [*references, 1] * STEPS
        rows.clear()
        # Two calls a step, at its level and at the next one, where the next step begins.
        stock(patched, sampler="heun")
        assert rows == [*references, 2] + [*references, 2, 2] * (STEPS - 1)
        rows.clear()
        stock(other)
        assert rows == [*references, 2] * STEPS
        rows.clear()
        without = Pictures(pictures.content, pictures.style)
        stock(apply_scsa(model, Patch(without, label_maps(), ScsaSettings(a1=0.0))))
        assert rows == [1, 1, 2] * STEPS


def test_prompts_of_references(model, patched, pictures):
    together = stock(patched)
    longer = replace(pictures.style, positive=conditioning(3, tokens=9))
    assert not torch.equal(stock(apply_scsa(model, Patch(replace(pictures, style=longer), label_maps()))), together)
    # Of combined prompts the first one counts.
    combined = replace(pictures.style, positive=EMPTY + POSITIVE)
    assert torch.equal(stock(apply_scsa(model, Patch(replace(pictures, style=combined), label_maps()))), together)


def test_every_way_to_sample(model, patched, patch):
    plain, with_scsa = stock(model), stock(patched)
    assert (plain - with_scsa).abs().max() > 0.1
    assert torch.equal(with_scsa, stock(patched))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
    sampler, empty = comfy.samplers.sampler_object("euler"), {"samples": torch.zeros(1, 4, *SIZE)}
    noise = SimpleNamespace(seed=1, generate_noise=lambda latent: random(1, 4, *SIZE, seed=9))
    (advanced, _) = outputs(SamplerCustomAdvanced, noise, cfg_guider(patched), sampler, sigmas, empty)
    assert torch.equal(advanced["samples"], with_scsa)
    (custom, _) = outputs(SamplerCustom, patched, True, 1, CFG, POSITIVE, NEGATIVE, sampler, sigmas, empty)
    assert torch.isfinite(custom["samples"]).all()
    (basic,) = outputs(BasicGuider, patched, POSITIVE)
    (out, _) = outputs(SamplerCustomAdvanced, noise, basic, sampler, sigmas, empty)
    assert torch.equal(out["samples"], stock(patched, cfg=1.0))
    content = patch.pictures.content
    assert not torch.equal(replayed(cfg_guider(patched), content), replayed(cfg_guider(model), content))
    for name in ("dpmpp_2m_sde", "heun", "uni_pc"):
        assert torch.isfinite(stock(patched, sampler=name)).all()


def test_pictures_of_a_batch_are_made_as_alone(model):
    both = pictures_of(model, rows=2)
    regions = label_maps(rows=2)
    x = random(4, 4, *SIZE, seed=7)
    together = predict(cfg_guider(apply_scsa(model, Patch(both, regions))), x, 1.3)
    for i in range(2):
        content = replace(
            both.content, clean=both.content.clean[i : i + 1], trajectory=both.content.trajectory[:, i : i + 1]
        )
        one = Patch(replace(both, content=content), SemanticMap(regions.content[i : i + 1], regions.style))
        alone = predict(cfg_guider(apply_scsa(model, one)), x[i::2], 1.3)
        torch.testing.assert_close(together[i::2], alone, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(together[0], together[1])


def test_it_acts_in_its_part_of_the_run(model, patch):
    def calls(**part):
        with rows_of_calls(model) as rows:
            out = stock(apply_scsa(model, replace(patch, **part)), steps=4)
        return rows, out

    middle = model.get_model_object("model_sampling").percent_to_sigma(0.5)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 4)[:-1]
    high = int((sigmas >= middle).sum())
    assert 0 < high < 4
    assert calls(end=0.5)[0] == [1, 1, 1, 1, 2] * high + [2] * (4 - high)
    assert calls(start=0.5)[0] == [2] * high + [1, 1, 1, 1, 2] * (4 - high)
    rows, out = calls(start=1.0)
    assert rows == [2] * 4
    assert torch.equal(out, stock(model, steps=4))


def test_a_patch_that_did_nothing_says_so(model, patch, caplog):
    def told(model):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            stock(model)
        return [r.message for r in caplog.records if "SCSA never acted" in r.message]

    assert told(apply_scsa(model, patch)) == []
    assert "start to end range" in told(apply_scsa(model, replace(patch, start=1.0)))[0]

    def skipping(executor, x, *args, **kwargs):
        """As nodes do that take what the decoder computed from the step before."""
        return torch.zeros_like(x)

    caching = apply_scsa(model, patch)
    caching.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", skipping)
    assert "none of its blocks was called" in told(caching)[0]


def test_loras_and_controls_stay_in_effect(model, patch):
    class Control(comfy.controlnet.ControlBase):
        """Adds a constant to the skips, as a ControlNet adds what it computes."""

        def __init__(self):
            super().__init__()
            self.rows = []

        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            self.rows.append(len(x_noisy))
            return {"input": [], "middle": [], "output": [None] * 3 + [torch.full((1, 1, 1, 1), 0.3)] * 3}

        def copy(self):
            return self

        def get_models(self):
            return []

        def pre_run(self, model, percent_to_timestep_function):
            pass

    patched = apply_scsa(model, patch)
    plain, control = once(patched), Control()
    controlled = [[POSITIVE[0][0], {"control": control, "control_apply_to_uncond": True}]]
    out = once(patched, positive=controlled)
    assert (out - plain).abs().max() > 0.01
    assert set(control.rows) <= {1, 2}, "the references have no control"

    def with_lora(model, block):
        changed = model.clone()
        key = f"diffusion_model.output_blocks.{block}.1.transformer_blocks.0.attn1.to_v.weight"
        width = {4: 128, 7: 64}[block]
        changed.add_patches({key: ("diff", (0.3 * random(width, width, seed=1),))}, 1.0)
        return changed

    # Of a patched block, whose projections SCSA uses, and of another one.
    for block in (7, 4):
        inside = once(apply_scsa(with_lora(model, block), patch))
        assert (inside - plain).abs().max() > 0.01
        assert torch.equal(inside, once(with_lora(patched, block))), "before or after that node"
    assert torch.equal(once(patched), plain)


def test_low_memory_gives_the_same(model, patch):
    expected = once(apply_scsa(model, patch))
    low = apply_scsa(small_sd15(), replace(patch, allow_other_model=True))

    def unload(executor, base, *args, **kwargs):
        base.current_patcher.partially_unload(torch.device("cpu"), 1e32)
        casting = [m for m in low.model.modules() if getattr(m, "comfy_cast_weights", False)]
        assert casting
        return executor(base, *args, **kwargs)

    low.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "test", unload)
    torch.testing.assert_close(once(low), expected, rtol=1e-4, atol=1e-4)


def test_it_chains_with_other_patches(model, patch):
    seen = []

    def half(n, extra):
        seen.append(("output", *extra["block"]))
        return 0.5 * n

    def cross(q, k, v, extra):
        seen.append(("cross", *extra["block"]))
        return 0.7 * comfy.ldm.modules.attention.optimized_attention(q, k, v, extra["n_heads"])

    def inner(q, k, v, extra):
        seen.append(("middle", *extra["block"]))
        return 0.7 * comfy.ldm.modules.attention.optimized_attention(q, k, v, extra["n_heads"])

    for change, what in (
        (lambda m: m.set_model_attn1_output_patch(half), ("output", "output", 7)),
        (lambda m: m.set_model_attn2_replace(cross, "output", 7), ("cross", "output", 7)),
        (lambda m: m.set_model_attn1_replace(inner, "middle", 0), ("middle", "middle", 0)),
        (lambda m: m.set_model_attn2_patch(lambda n, c, v, e: (n, 0.5 * c, v)), None),
    ):
        results = []
        for order in ("before", "after"):
            seen.clear()
            changed = model.clone()
            if order == "before":
                change(changed)
            both = apply_scsa(changed, patch)
            if order == "after":
                change(both)
            results.append(once(both))
            if what is not None:
                assert seen.count(what) == 1, "on the picture only"
        assert torch.equal(*results)
        assert (results[0] - once(apply_scsa(model, patch))).abs().max() > 1e-3
        only = model.clone()
        change(only)
        assert (results[0] - once(only)).abs().max() > 0.01


def other_taker(q, k, v, extra):
    return comfy.ldm.modules.attention.optimized_attention(q, k, v, extra["n_heads"])


def test_two_takers_of_a_block_are_an_error_that_names_both(model, patch):
    message = r"SCSA takes .* output block 8.*other_taker"
    before = model.clone()
    before.set_model_attn1_replace(other_taker, "output", 8)
    with pytest.raises(ValueError, match=message):
        apply_scsa(before, patch)
    assert apply_scsa(before, replace(patch, blocks=(6, 7)))
    after = apply_scsa(model, patch)
    after.set_model_attn1_replace(other_taker, "output", 8, 0)
    with rows_of_calls(model) as rows, pytest.raises(ValueError, match=message):
        once(after)
    assert rows == [], "before any call"

    import comfy.hooks

    hooks = comfy.hooks.HookGroup()
    hooks.add(
        comfy.hooks.TransformerOptionsHook(
            transformers_dict={"patches_replace": {"attn1": {("output", 8): other_taker}}}
        )
    )
    hooked = [[POSITIVE[0][0], {"hooks": hooks}]]
    with pytest.raises(ValueError, match=message):
        once(apply_scsa(model, patch), positive=hooked)


def test_patches_that_move_places_around_are_refused(model, patch):
    from comfy_extras.nodes_hypertile import HyperTile
    from comfy_extras.nodes_tomesd import TomePatchModel

    for node, settings in ((HyperTile, (32, 2, 0, False)), (TomePatchModel, (0.5,))):
        (both,) = outputs(node, apply_scsa(model, patch), *settings)
        with pytest.raises(ValueError, match=r"merges or tiles .*comfy_extras"):
            once(both)
        assert hooks_left(model) == []


def hooks_left(model):
    return [m for m in model.model.modules() if m._forward_pre_hooks or m._forward_hooks]


def states():
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is Scsa]


def test_nothing_is_left_behind_also_after_errors_and_cancel(model, patched, pictures):
    plain, with_scsa = stock(model), stock(patched)
    assert torch.equal(plain, stock(model))
    assert hooks_left(model) == []
    assert states() == []
    options = repr(model.model_options), repr(patched.model_options)

    def fail(n, extra):
        raise RuntimeError("on purpose")

    failing = patched.clone()
    failing.set_model_attn1_output_patch(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        stock(failing)
    assert hooks_left(model) == []
    assert torch.equal(plain, stock(model))

    steps = []

    def cancel(step, *_):
        steps.append(step)
        comfy.model_management.interrupt_current_processing()

    try:
        with rows_of_calls(model) as rows, pytest.raises(comfy.model_management.InterruptProcessingException):
            replayed(cfg_guider(patched), pictures.content, callback=cancel)
    finally:
        comfy.model_management.interrupt_current_processing(False)
    assert (steps, rows) == ([0], [1, 1, 1, 1, 2])
    assert hooks_left(model) == []
    assert torch.equal(plain, stock(model))
    assert torch.equal(with_scsa, stock(patched))
    assert options == (repr(model.model_options), repr(patched.model_options))
    del failing
    assert states() == []


@pytest.fixture(scope="module")
def energy(model):
    with torch.inference_mode():
        images = [random(1, 4, *SIZE, seed=s) / SD15_SCALE for s in (1, 5)]
        tasks = (
            InversionTask(model, POSITIVE, NEGATIVE, images[0], STEPS, "normal", CFG, 1),
            InversionTask(model, EMPTY, EMPTY, images[1], STEPS, "normal", 1.0, 2),
        )
        context, reference = (invert_ddpm(task) for task in tasks)
    style, kept = Stream(reference, EMPTY), Stream(context)
    return context, Energy((StyleTerm(style, 3.0), SpatialTerm(kept, 0.9), SemanticTerm(kept, 1.0)))


def energy_guider(model, energy, cfg=CFG, **settings):
    return ReportingGuider(model, POSITIVE, NEGATIVE, cfg, energy, cache=settings.pop("cache", None), **settings)


def test_the_energy_s_gradient_passes_patched_blocks_by_the_residual_only(model, patched, patch, energy, monkeypatch):
    """Against differences of the energy: SSA's choices are held, as the gradient does, by taking them away (t2 = 0)."""
    context, _ = energy
    kept = Energy((SpatialTerm(Stream(context), 0.9), SemanticTerm(Stream(context), 1.0)))
    continuous = apply_scsa(model, replace(patch, settings=ScsaSettings(t2=0.0)))
    sigma, h = 1.2, 3e-3
    x = context.at(sigma) + 0.3 * random(1, 4, *SIZE, seed=9)
    direction = random(1, 4, *SIZE, seed=4)
    g = {}
    for checkpointing in (False, True):
        guider = energy_guider(continuous, kept, checkpointing=checkpointing)
        g[checkpointing] = (predict(cfg_guider(continuous), x, sigma) - predict(guider, x, sigma)) / sigma
    torch.testing.assert_close(g[True], g[False], rtol=1e-3, atol=1e-5)
    values = []
    for sign in (1, -1):
        guider = energy_guider(continuous, kept)
        predict(guider, x + sign * h * direction, sigma)
        table = guider.report.table()
        values.append(table["spatial"][0] + table["semantic"][0])
    slope = (values[0] - values[1]) / (2 * h)
    assert g[False].abs().max() < 1, "the comparison needs a gradient that is not clamped"
    assert float((g[False] * direction).sum()) == pytest.approx((1 + sigma**2) ** 0.5 * slope, rel=0.02)
    plain = (predict(cfg_guider(model), x, sigma) - predict(energy_guider(model, kept), x, sigma)) / sigma
    assert not torch.allclose(plain, g[False], atol=1e-3)


def test_guided_runs_with_it(model, patched, energy):
    context, terms = energy
    cache = ReferenceCache(10**8)
    with rows_of_calls(model) as rows:
        out = replayed(energy_guider(patched, terms, cache=cache), context)
    # SCSA's references, the energy's two, the branch with gradient, the other one.
    assert rows == [1, 1, 1, 1, 1, 1, 1, 1] * STEPS
    assert torch.isfinite(out).all()
    assert torch.equal(out, replayed(energy_guider(patched, terms), context))
    unpatched = energy_guider(model, terms, cache=cache)
    plain = replayed(unpatched, context)
    assert unpatched.report.reference_forwards == 0, "the energy's references are those of the unpatched model"
    assert not torch.allclose(plain, out, atol=0.1)
    assert not torch.allclose(replayed(cfg_guider(patched), context), out, atol=1e-3)
    less_memory = replayed(energy_guider(patched, terms, checkpointing=True), context)
    torch.testing.assert_close(less_memory, out, rtol=1e-2, atol=1e-2)
    assert hooks_left(model) == []
    assert states() == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, patch, energy):
    half = small_sd15(dtype=dtype)
    patched = apply_scsa(half, replace(patch, allow_other_model=True))
    x, sigma = random(2, 4, *SIZE, seed=7), 1.3
    full = predict(cfg_guider(apply_scsa(small_sd15(), patch)), x, sigma)
    out = predict(cfg_guider(patched), x, sigma)
    plain = predict(cfg_guider(half), x, sigma)
    # Rounding flips some of the sparse part's choices; the rest is close.
    assert (out - full).abs().mean() < 0.2 * (plain - full).abs().mean()
    assert torch.equal(out, predict(cfg_guider(patched), x, sigma))
    context, terms = energy
    guided = ReportingGuider(patched, POSITIVE, NEGATIVE, CFG, terms, cache=None, allow_other_model=True)
    assert torch.isfinite(predict(guided, context.at(sigma), sigma)).all()


def test_windows_areas_and_mixed_levels_are_refused(model, patched):
    window = model.clone()
    window.model_options["transformer_options"]["context_window"] = SimpleNamespace(index_list=[0])
    with pytest.raises(ValueError, match="context windows"):
        once(apply_scsa(window, patched.get_wrappers("outer_sample", "semantic_style_scsa")[0].patch))
    area = [[POSITIVE[0][0], {"area": (8, 8, 0, 0), "strength": 1.0}]]
    with pytest.raises(ValueError, match="whole pictures"):
        once(patched, positive=area)

    class Mixed(Levels):
        def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, bar=0):
            return guider(noise, torch.tensor([1.0, 2.0]), **extra_args)

    x = torch.zeros(2, 4, *SIZE)
    with pytest.raises(ValueError, match="one noise level"):
        cfg_guider(patched).sample(x, x, Mixed(1.0), torch.tensor([2.0, 0.0]), disable_pbar=True, seed=0)


def test_what_does_not_fit_is_refused_before_any_call(model, patch, pictures, patched):
    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            apply_scsa(model, replace(patch, **changes))

    small, two = invert(model, 3, size=(8, 8)), invert(model, 3, rows=2)
    with rows_of_calls(model) as rows:
        refused("the content's latent is .* that of its map", pictures=replace(pictures, content_map=small))
        refused("the style's latent is .* that of its map", pictures=replace(pictures, style_map=small))
        refused("needs the picture of the style's map", pictures=replace(pictures, style_map=None))
        refused("one style or one for each", pictures=replace(pictures, style=two, style_map=two))
        refused("2 content maps for 1 pictures", regions=label_maps(rows=2))
        refused("both between 0 and 1", start=0.6, end=0.4)
        refused(r"no self-attention in output block\(s\) 2, 12; those that have are 3, 4", blocks=(2, 6, 12))
        with pytest.raises(ValueError, match="has SCSA already"):
            apply_scsa(patched, patch)
        with pytest.raises(ValueError, match="content latent of 8x16, the one being sampled is 16x16"):
            predict(cfg_guider(patched), torch.zeros(1, 4, 16, 16), 1.0)
        with pytest.raises(ValueError, match="invert with the model from before that node"):
            invert(patched, 1)
        assert rows == []
    several = apply_scsa(model, Patch(pictures_of(model, rows=2), label_maps()))
    with pytest.raises(ValueError, match="a multiple of the contents"):
        predict(cfg_guider(several), torch.zeros(3, 4, *SIZE), 1.0)
    other = small_sd15(seed=3)
    with pytest.raises(ValueError, match="another checkpoint"):
        apply_scsa(other, patch)
    assert apply_scsa(other, replace(patch, allow_other_model=True))
    with pytest.raises(ValueError, match="another kind of model"):
        apply_scsa(small_sdxl(), replace(patch, allow_other_model=True))


def test_blocks_of_the_coarse_levels_can_be_asked_for(model, patch):
    coarse = apply_scsa(model, replace(patch, blocks=(3, 11)))
    out = once(coarse)
    assert torch.isfinite(out).all()
    assert (out - once(apply_scsa(model, patch))).abs().max() > 1e-3


@pytest.fixture(scope="module")
def demo():
    with torch.inference_mode():
        return LoadPaperland.execute("fp32").result


NUMBERS = {"temperature": 1.2, "t1": 0.8, "t2": 0.2, "a1": 0.3, "a2": 0.5, "blocks": "", "start_percent": 0.0}


def apply_node(demo, content, style, regions, **changed):
    return ApplySCSA.execute(demo[0], content, style, regions, **{**NUMBERS, "end_percent": 1.0, **changed}).result[0]


def scene(demo, seed, size=(32, 24)):
    drawn = scenes.scene(seed, seed, size)
    empty = demo[1].encode_from_tokens_scheduled(demo[1].tokenize(""))
    latent = demo[2].encode(drawn.images)
    return drawn, invert_ddim(InversionTask(demo[0], empty, empty, latent, STEPS, "normal", 1.0, 0))


@pytest.mark.parametrize("style_size", [(32, 24), (24, 40)])
def test_the_node_makes_the_maps_pictures_once(demo, style_size):
    model, _, vae = demo
    (a, content), (b, style) = scene(demo, 1), scene(demo, 2, style_size)
    regions = SemanticMap(a.labels, b.labels)
    with rows_of_calls(model) as rows:
        patched = apply_node(demo, content, style, regions, vae=vae)
        assert rows == [1] * 2 * STEPS
        rows.clear()
        again = apply_node(demo, content, style, regions, vae=vae, temperature=2.0, blocks="2-3")
        assert rows == [], "kept for this map"
        apply_node(demo, content, style, SemanticMap(a.labels, b.labels), vae=vae)
        assert rows
    prompt = content.positive
    maps = [
        invert_ddim(InversionTask(model, prompt, prompt, vae.encode(m), STEPS, "normal", 1.0, 0))
        for m in draw_map(regions)
    ]
    given = apply_node(demo, content, style, regions, content_map=maps[0], style_map=maps[1])
    out = {}
    for name, one in (("node", patched), ("given", given), ("again", again)):
        out[name] = replayed(cfg_guider(one, prompt, prompt, 1.0), content)
    torch.testing.assert_close(out["node"], out["given"], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(out["node"], out["again"], atol=1e-2)
    one_given = apply_node(demo, content, style, regions, content_map=maps[0], vae=vae)
    torch.testing.assert_close(replayed(cfg_guider(one_given, prompt, prompt, 1.0), content), out["node"])


def test_the_node_says_what_is_missing(demo):
    (a, content), (b, style) = scene(demo, 1), scene(demo, 2)
    regions = SemanticMap(a.labels, b.labels)
    with pytest.raises(ValueError, match=r"Connect the VAE.*content_map, style_map.*a1 to 0"):
        apply_node(demo, content, style, regions)
    assert apply_node(demo, content, style, regions, a1=0.0)
    assert apply_node(demo, content, style, regions, t1=0.0, t2=1.0)
    with pytest.raises(ValueError, match="no prompt"):
        apply_node(demo, replace(content, positive=None), style, regions, vae=demo[2])
    other = PixelVAE(lambda p: torch.zeros(len(p), 4, 4, 3), lambda x: x, 8, 4)
    with pytest.raises(ValueError, match="VAE that the picture was encoded with"):
        apply_node(demo, content, style, regions, vae=other)
    with rows_of_calls(demo[0]) as rows, pytest.raises(ValueError, match="no self-attention in output"):
        apply_node(demo, content, style, regions, vae=demo[2], blocks="77")
    assert rows == [], "before the maps' pictures are made"
    with pytest.raises(ValueError, match="share and must be between 0 and 1"):
        apply_node(demo, content, style, regions, a1=1.5)


@pytest.mark.parametrize(
    ("text", "blocks"),
    [("", None), (" ", None), ("6-11", (6, 7, 8, 9, 10, 11)), ("8, 6;7", (6, 7, 8)), ("6 - 7 9", (6, 7, 9))],
)
def test_blocks_are_read(text, blocks):
    assert parse_blocks(text) == blocks


@pytest.mark.parametrize("text", ["six", "6-", "-3", "9-7", "6..9", "1-99999999"])
def test_what_is_not_a_list_of_blocks_is_refused(text):
    with pytest.raises(ValueError, match="numbers of output blocks are expected"):
        parse_blocks(text)


def test_maps_are_drawn_in_the_same_flat_colours():
    content, style = torch.tensor([[[3, 9], [3, 40]]]), torch.tensor([[[40, 3, -2]]])
    c, s = draw_map(SemanticMap(content, style))
    assert c.shape == (1, 2, 2, 3)
    assert s.shape == (1, 1, 3, 3)
    assert torch.equal(c[0, 0, 0], c[0, 1, 0])
    assert torch.equal(c[0, 0, 0], s[0, 0, 1])
    assert torch.equal(c[0, 1, 1], s[0, 0, 0])
    colors = torch.stack([c[0, 0, 0], c[0, 0, 1], c[0, 1, 1], s[0, 0, 2]])
    assert (torch.cdist(colors, colors) + torch.eye(4)).min() > 0.3
