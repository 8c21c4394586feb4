"""Models with a step cache of the host on them (EasyCache, LazyCache), which answers calls without making them."""

import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from semantic_style.benchmarks.random_models import conditioning, small_sd15
from semantic_style.host.apply_scsa import Patch, Pictures, apply_scsa
from semantic_style.host.energy_guider import EnergyGuider
from semantic_style.host.invert import InversionTask, invert_ddim, invert_ddpm
from semantic_style.host.reading import FeatureCall, read_features
from semantic_style.host.replay_sampler import ReplayNoise, ReplaySampler
from semantic_style.regions.semantic_map import SemanticMap
from semantic_style.samplers.terms import Energy, SpatialTerm, Stream, StyleTerm

pytestmark = pytest.mark.usefixtures("one_thread", "as_the_host_runs_nodes")

POSITIVE, NEGATIVE, EMPTY = conditioning(1), conditioning(2), conditioning(3)
STEPS = 6
SCALE = 0.18215


@pytest.fixture(scope="module")
def model():
    return small_sd15()


@pytest.fixture(params=[EasyCacheNode, LazyCacheNode], ids=["EasyCache", "LazyCache"])
def cached(model, request):
    """The model with a cache that answers every call which it can."""
    return request.param.execute(model, 1e9, 0.0, 1.0, False)[0]


def latent(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / SCALE


def invert(model, size, seed, run=invert_ddpm):
    return run(InversionTask(model, EMPTY, EMPTY, latent(1, 4, *size, seed=seed), STEPS, "normal", 1.0, 0))


@pytest.fixture(scope="module")
def inversions(model):
    with torch.inference_mode():
        return invert(model, (16, 16), 1), invert(model, (24, 16), 2)


def replayed(guider, context):
    image = context.to_outer(context.clean)
    noise = ReplayNoise(context).generate_noise({"samples": image})
    return guider.sample(noise, image, ReplaySampler(context), context.sigmas, disable_pbar=True, seed=0)


def unet_calls(model, run):
    """What a run gives, and the sizes of the network's calls meanwhile."""
    seen = []
    # A cache stands around the network's layers, inside its call.
    first = model.model.diffusion_model.input_blocks[0][0]
    handle = first.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2:]))
    try:
        return run(), seen
    finally:
        handle.remove()


def cfg_guider(model):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(POSITIVE, NEGATIVE)
    guider.set_cfg(3.5)
    return guider


def stock(model):
    sampler = comfy.samplers.KSampler(model, STEPS, model.load_device, "euler", "normal", 1.0, model.model_options)
    empty = torch.zeros(1, 4, 16, 16)
    return sampler.sample(latent(1, 4, 16, 16, seed=9), POSITIVE, NEGATIVE, 3.5, latent_image=empty, disable_pbar=True)


def test_the_cache_of_these_tests_answers_ordinary_calls(model, cached):
    _, without = unet_calls(model, lambda: stock(model))
    _, calls = unet_calls(model, lambda: stock(cached))
    assert len(calls) < len(without)


@pytest.mark.parametrize("run", [invert_ddpm, invert_ddim])
def test_an_inversion_makes_all_its_calls(model, cached, run):
    there, plain = (invert(m, (16, 16), 1, run) for m in (cached, model))
    assert torch.equal(there.trajectory, plain.trajectory)
    if run is invert_ddpm:
        assert torch.equal(there.noise_maps, plain.noise_maps)


def test_a_guided_run_makes_all_its_calls_whatever_the_sizes(model, cached, inversions):
    context, reference = inversions
    energy = Energy((StyleTerm(Stream(reference, EMPTY), 3.0), SpatialTerm(Stream(context), 0.9)))

    def run(model):
        return replayed(EnergyGuider(model, POSITIVE, NEGATIVE, 3.5, energy, cache=None), context)

    assert torch.equal(run(cached), run(model))


def test_scsa_reads_its_references_at_every_level(model, cached, inversions):
    content, style = inversions
    labels = [torch.zeros(1, 4, 4, dtype=torch.long)] * 2
    patch = Patch(Pictures(content, style, content, style), SemanticMap(*labels))
    _, plain = unet_calls(model, lambda: replayed(cfg_guider(apply_scsa(model, patch)), content))
    _, calls = unet_calls(model, lambda: replayed(cfg_guider(apply_scsa(cached, patch)), content))
    assert len(calls) < len(plain), "calls for the picture are answered by the cache, as its user wants"
    if cached.get_wrappers("calc_cond_batch", "easycache"):
        style_calls = [calls_of.count(style.clean.shape[2:]) for calls_of in (calls, plain)]
        # A step that LazyCache skips makes no call at all.
        assert style_calls == [2 * STEPS] * 2, "the style, and the picture of its map"


def test_looking_at_pictures_makes_all_its_calls(model, cached, inversions):
    looks = [FeatureCall(i.clean, EMPTY, 0) for i in inversions] * 2
    there, plain = (read_features(m, looks, 0.6) for m in (cached, model))
    for t, p in zip(there, plain, strict=True):
        assert all(map(torch.equal, t.stages, p.stages))
