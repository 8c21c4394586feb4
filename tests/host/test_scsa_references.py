"""What enters SCSA's blocks for its references, kept from inversions and between runs: fewer calls, same picture."""

import gc

import comfy.model_management
import comfy.samplers
import pytest
import torch
from semantic_style.attention.layers import self_attention_layers
from semantic_style.attention.scsa_attention import ScsaSettings
from semantic_style.benchmarks.random_models import conditioning, small_sd15
from semantic_style.host.apply_scsa import Patch, Pictures, apply_scsa
from semantic_style.host.invert import InversionTask, invert_ddim
from semantic_style.host.reference_cache import ReferenceCache
from semantic_style.host.replay_sampler import ReplayNoise, ReplaySampler
from semantic_style.regions.semantic_map import SemanticMap

pytestmark = pytest.mark.usefixtures("one_thread", "as_the_host_runs_nodes")

POSITIVE, EMPTY = conditioning(1), conditioning(3)
STEPS, SIZE, SKIP = 4, (16, 8), 1
KINDS = 4  # content, style, and the pictures of their maps
# Of each, at each level: three blocks of 8x4 tokens of 64 channels, three of 16x8 tokens of 32.
VALUES = 3 * (8 * 4 * 64 + 16 * 8 * 32)


@pytest.fixture(scope="module")
def model():
    return small_sd15()


def image(seed, rows=1, size=SIZE):
    return torch.randn(rows, 4, *size, generator=torch.Generator().manual_seed(seed)) / 0.18215


def inverted(model, latent, cache, *, prompt=EMPTY, cfg=1.0, refine=0):
    return invert_ddim(InversionTask(model, prompt, prompt, latent, STEPS, "normal", cfg, 0), refine, cache)


def four(model, cache, **settings):
    return Pictures(*(inverted(model, image(seed), cache, **settings) for seed in range(1, 1 + KINDS)))


def maps():
    labels = [torch.randint(0, 2, (1, 4, 4), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    return SemanticMap(*(m.repeat_interleave(SIZE[0] // 4, 1).repeat_interleave(SIZE[1] // 4, 2) for m in labels))


def stylised(model, pictures, cache, cfg=1.0, **settings):
    """As the graphs do it: the content's path, without its noisiest step."""
    content = pictures.content
    guider = comfy.samplers.CFGGuider(apply_scsa(model, Patch(pictures, maps(), **settings), cache))
    guider.set_conds(POSITIVE, EMPTY)
    guider.set_cfg(cfg)
    latent = content.to_outer(content.clean)
    noise = ReplayNoise(content, SKIP).generate_noise({"samples": latent})
    sampler = ReplaySampler(content, SKIP)
    return guider.sample(noise, latent, sampler, content.sigmas[SKIP:], disable_pbar=True, seed=0)


class Rows:
    """Rows of the UNet's calls since the last question."""

    def __init__(self, model):
        self.calls = []
        unet = model.model.diffusion_model
        self.handle = unet.register_forward_pre_hook(lambda module, args: self.calls.append(len(args[0])))

    def since(self):
        calls, self.calls = self.calls, []
        return sum(calls)


@pytest.fixture
def rows(model):
    counted = Rows(model)
    yield counted
    counted.handle.remove()


def test_a_run_after_the_inversions_pays_for_its_own_steps_only(model, rows):
    cache = ReferenceCache(10**8)
    pictures = four(model, cache)
    assert rows.since() == KINDS * STEPS
    assert cache.bytes == KINDS * (STEPS - 1) * VALUES * 4
    first = stylised(model, pictures, cache)
    assert rows.since() == STEPS - SKIP
    second = stylised(model, pictures, cache)
    assert rows.since() == STEPS - SKIP
    without = stylised(model, pictures, None)
    assert rows.since() == (1 + KINDS) * (STEPS - SKIP)
    assert torch.equal(first, without)
    assert torch.equal(second, without)
    # Knobs, the prompt and the guidance do not change what is kept.
    turned = {"settings": ScsaSettings(temperature=2.0, a1=0.5), "cfg": 3.0}
    out = stylised(model, pictures, cache, **turned)
    assert rows.since() == 2 * (STEPS - SKIP)
    assert torch.equal(out, stylised(model, pictures, None, **turned))


def test_the_first_run_serves_the_second(model, rows):
    cache = ReferenceCache(10**8)
    pictures = four(model, None)
    rows.since()
    first = stylised(model, pictures, cache)
    assert rows.since() == (1 + KINDS) * (STEPS - SKIP)
    assert torch.equal(first, stylised(model, pictures, cache))
    assert rows.since() == STEPS - SKIP
    # Another style: only that is asked for.
    other = Pictures(pictures.content, inverted(model, image(9), None), pictures.content_map, pictures.style_map)
    rows.since()
    out = stylised(model, other, cache)
    assert rows.since() == (1 + 1) * (STEPS - SKIP)
    assert torch.equal(out, stylised(model, other, None))


def test_pictures_of_a_batch_find_what_was_read_of_the_batch(model, rows):
    cache = ReferenceCache(10**8)
    batch = inverted(model, torch.cat([image(seed) for seed in range(1, 1 + KINDS)]), cache)
    pair = cache.rows(batch, 2, 2)
    pictures = Pictures(cache.rows(batch, 0), cache.rows(batch, 1), cache.rows(pair, 0), cache.rows(pair, 1))
    held = cache.bytes
    del batch, pair
    gc.collect()
    rows.since()
    out = stylised(model, pictures, cache)
    assert rows.since() == STEPS - SKIP
    assert cache.bytes == held, "once, not for each of the pictures"
    torch.testing.assert_close(out, stylised(model, pictures, None), rtol=1e-4, atol=1e-4)
    del pictures
    gc.collect()
    assert (len(cache), cache.bytes) == (0, 0)


@pytest.mark.parametrize("fills", ["inversion", "run"])
def test_what_does_not_fit_is_asked_for_again(model, rows, fills):
    pictures = four(model, None)
    kept = KINDS * (STEPS - 1) // 2
    small = ReferenceCache(kept * VALUES * 4 + 100)
    if fills == "inversion":
        pictures = four(model, small)
    else:
        stylised(model, pictures, small)
    assert len(small) == kept
    rows.since()
    for _ in range(2):
        out = stylised(model, pictures, small)
        assert rows.since() == (1 + KINDS) * (STEPS - SKIP) - kept
        assert small.bytes <= small.limit
    assert torch.equal(out, stylised(model, pictures, None))


def with_lora(model):
    patched = model.clone()
    weight = "diffusion_model.output_blocks.5.1.transformer_blocks.0.attn1.to_q.weight"
    shape = model.model.state_dict()[weight].shape
    patched.add_patches({weight: (torch.ones(shape),)}, 0.1)
    return patched


def with_wrapper(model):
    patched = model.clone()
    patched.add_wrapper_with_key("diffusion_model", "somebody's", lambda executor, *args, **kw: executor(*args, **kw))
    return patched


def with_override(model):
    patched = model.clone()
    to = patched.model_options["transformer_options"] = dict(patched.model_options.get("transformer_options", {}))
    to["optimized_attention_override"] = lambda attend, *args, **kwargs: attend(*args, **kwargs)
    return patched


@pytest.mark.parametrize("changed", [with_lora, with_wrapper, with_override])
def test_another_model_is_asked_anew(model, rows, changed):
    cache = ReferenceCache(10**8)
    pictures = four(model, cache)
    other = changed(model)
    rows.since()
    out = stylised(other, pictures, cache)
    assert rows.since() == (1 + KINDS) * (STEPS - SKIP)
    assert torch.equal(out, stylised(other, pictures, None))


def test_another_prompt_and_other_blocks_are_asked_anew(model, rows):
    cache = ReferenceCache(10**8)
    pictures = four(model, cache)
    unet = model.model.diffusion_model
    blocks = tuple(sorted({block for _, block, _ in self_attention_layers(unet)}))
    rows.since()
    stylised(model, pictures, cache, blocks=blocks)
    assert rows.since() == STEPS - SKIP
    stylised(model, pictures, cache, blocks=blocks[1:])
    assert rows.since() == (1 + KINDS) * (STEPS - SKIP)
    prompted = four(model, cache, prompt=POSITIVE)
    rows.since()
    out = stylised(model, prompted, cache)
    assert rows.since() == STEPS - SKIP
    assert torch.equal(out, stylised(model, prompted, None))


def with_patch(model):
    patched = model.clone()
    patched.set_model_attn1_output_patch(lambda n, extra: 1.5 * n)
    return patched


def test_inversions_whose_calls_are_not_those_of_scsa_are_not_read(model):
    cache = ReferenceCache(10**8)
    patched = inverted(with_patch(model), image(1), cache)
    guided = inverted(model, image(1), cache, cfg=2.0)
    several = inverted(model, image(1), cache, prompt=EMPTY + POSITIVE)
    assert len(cache) == 0, [i.cfg for i in (patched, guided, several)]


def test_refined_inversions_are_read_at_their_own_latents(model, rows):
    cache = ReferenceCache(10**8)
    pictures = four(model, cache, refine=1)
    rows.since()
    out = stylised(model, pictures, cache)
    assert rows.since() == STEPS - SKIP
    assert torch.equal(out, stylised(model, pictures, None))


def test_reading_changes_no_inversion_and_a_cancelled_one_leaves_nothing(model, monkeypatch):
    cache = ReferenceCache(10**8)
    read, plain = inverted(model, image(1), cache), inverted(model, image(1), None)
    assert torch.equal(read.trajectory, plain.trajectory)
    del read
    gc.collect()
    assert len(cache) == 0
    calls = iter(range(STEPS))

    def cancel():
        if next(calls) == 2:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        inverted(model, image(1), cache)
    assert len(cache) == 0
    hooks = [m for m in model.model.diffusion_model.modules() if m._forward_pre_hooks]
    assert hooks == []


def test_half_precision_takes_half_the_memory_and_changes_nothing():
    model, cache = small_sd15(dtype=torch.bfloat16), ReferenceCache(10**8)
    pictures = four(model, cache)
    assert cache.bytes == KINDS * (STEPS - 1) * VALUES * 2
    kept = stylised(model, pictures, cache)
    assert torch.isfinite(kept).all()
    assert torch.equal(kept, stylised(model, pictures, None))
