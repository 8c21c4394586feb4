"""IPAdapter (ComfyUI_IPAdapter_plus) together with this pack's cross-attention, with a small random adapter made here.

The pack is looked for in the folder that $SEMANTIC_STYLE_PEERS names, else in the host's custom_nodes; nothing of it is
copied here.
"""

import importlib.util
import os
import sys
from pathlib import Path

import comfy.samplers
import pytest
import torch
from semantic_style.attention.layers import all_cross_attention
from semantic_style.benchmarks.random_models import CONTEXT, ReportingGuider, conditioning, small_sd15
from semantic_style.host.apply_spin import apply_spin, spin_energy
from semantic_style.host.invert import InversionTask, invert_ddpm
from semantic_style.host.replay_sampler import ReplayNoise, ReplaySampler

pytestmark = pytest.mark.usefixtures("one_thread", "as_the_host_runs_nodes")

FOLDER = "comfyui_ipadapter_plus"
POSITIVE, NEGATIVE, REFERENCE = conditioning(1), conditioning(2), conditioning(4, tokens=11)
CFG, STEPS, SIZE = 3.5, 2, (16, 8)
PICTURE = 48  # channels of what the adapter is told of its picture
TOKENS = 4


@pytest.fixture(scope="module")
def peer(host_folder):
    named = os.environ.get("SEMANTIC_STYLE_PEERS")
    where = Path(named) if named else host_folder / "custom_nodes"
    folder = next((f for f in where.glob("*") if f.name.lower() == FOLDER), None)
    if folder is None:
        pytest.skip(f"no peer packs: no ComfyUI_IPAdapter_plus in {where} ($SEMANTIC_STYLE_PEERS)")
    spec = importlib.util.spec_from_file_location(
        "ipadapter_plus", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    pack = sys.modules["ipadapter_plus"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    return pack.NODE_CLASS_MAPPINGS


@pytest.fixture(scope="module")
def model():
    return small_sd15()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapter(model):
    """Weights under the adapter's names, for layers in the order that it counts them in: encoder, decoder, middle."""
    layers = all_cross_attention(model.model.diffusion_model)
    weights = {}
    for part in ("input", "output", "middle"):
        for attn2 in (layers[layer] for layer in layers if layer[0] == part):
            key, width = 2 * (len(weights) // 2) + 1, attn2.to_k.out_features
            weights[f"{key}.to_k_ip.weight"] = random(width, CONTEXT, seed=key) / CONTEXT**0.5
            weights[f"{key}.to_v_ip.weight"] = random(width, CONTEXT, seed=key + 1) / CONTEXT**0.5
    projection = {
        "proj.weight": random(TOKENS * CONTEXT, PICTURE) / PICTURE**0.5,
        "proj.bias": torch.zeros(TOKENS * CONTEXT),
        "norm.weight": torch.ones(CONTEXT),
        "norm.bias": torch.zeros(CONTEXT),
    }
    return {"image_proj": projection, "ip_adapter": weights}


def with_adapter(peer, model, attn_mask=None):
    picture, nothing = random(1, PICTURE, seed=7), random(1, PICTURE, seed=8)
    node = peer["IPAdapterEmbeds"]()
    given = {"neg_embed": nothing, "attn_mask": attn_mask}
    return node.apply_ipadapter(model, adapter(model), picture, 0.8, "linear", 0.0, 1.0, **given)[0]


def mask_of_pixels():
    mask = torch.zeros(1, 8 * SIZE[0], 8 * SIZE[1])
    mask[:, 40:, 16:] = 1
    return mask


def branches(model, positive=POSITIVE, sigma=1.3):
    """What the positive and the negative prompt predict in one CFG call."""
    seen = {}

    def keep(args):
        seen.update(args)
        return args["input"] - args["cond_denoised"]

    class Once(comfy.samplers.Sampler):
        def sample(self, guider, sigmas, extra_args, callback, noise, *args):
            guider(noise, torch.full((len(noise),), sigma), **extra_args)
            return noise

    watched = model.clone()
    watched.set_model_sampler_cfg_function(keep)
    guider = comfy.samplers.CFGGuider(watched)
    guider.set_conds(positive, NEGATIVE)
    guider.set_cfg(CFG)
    x = random(2, 4, *SIZE, seed=9)
    guider.sample(x, torch.zeros_like(x), Once(), torch.tensor([sigma, 0.0]), disable_pbar=True, seed=0)
    return seen["cond_denoised"], seen["uncond_denoised"]


@pytest.mark.parametrize("masked", [False, True])
def test_injection_and_adapter_go_together_in_either_order(peer, model, masked):
    attn_mask = mask_of_pixels() if masked else None
    adapted = with_adapter(peer, model, attn_mask)
    before = branches(apply_spin(adapted, REFERENCE, mask_of_pixels()))
    after = branches(with_adapter(peer, apply_spin(model, REFERENCE, mask_of_pixels()), attn_mask))
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)
    plain, unconditional = branches(adapted)
    assert torch.equal(before[1], unconditional), "the negative prompt keeps the adapter's negative"
    assert (before[0] - plain).abs().max() > 0.01
    without, _ = branches(apply_spin(model, REFERENCE, mask_of_pixels()))
    assert (before[0] - without).abs().max() > 0.01


def test_everywhere_it_is_the_adapter_over_the_references_prompt(peer, model):
    adapted = with_adapter(peer, model)
    out, _ = branches(apply_spin(adapted, REFERENCE, torch.ones(1, 16, 8)))
    expected, _ = branches(adapted, REFERENCE)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_under_energies_the_adapter_still_tells_the_prompts_apart(peer, model):
    image = random(1, 4, *SIZE, seed=1) / 0.18215
    background = invert_ddpm(InversionTask(model, POSITIVE, NEGATIVE, image, STEPS, "normal", 1.0, 0))
    spun = apply_spin(with_adapter(peer, model), REFERENCE, mask_of_pixels())

    def made(guider):
        outer = background.to_outer(background.clean)
        noise = ReplayNoise(background).generate_noise({"samples": outer})
        return guider.sample(noise, outer, ReplaySampler(background), background.sigmas, disable_pbar=True, seed=0)

    def guided(weight):
        energy = spin_energy(background, mask_of_pixels(), weight)
        return made(ReportingGuider(spun, POSITIVE, NEGATIVE, CFG, energy, cache=None))

    plain = comfy.samplers.CFGGuider(spun)
    plain.set_conds(POSITIVE, NEGATIVE)
    plain.set_cfg(CFG)
    torch.testing.assert_close(guided(1e-9), made(plain), rtol=1e-3, atol=1e-3)
    assert (guided(20.0) - guided(1e-9)).abs().max() > 0.01
