"""Flow models in the host: inversion and replay on small random models of each family's own class."""

import functools

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import (
    CFGGuider,
    DisableNoise,
    KSamplerSelect,
    SamplerCustomAdvanced,
    SplitSigmas,
)
from comfy_extras.nodes_model_advanced import ModelSamplingFlux, ModelSamplingSD3
from semantic_style.benchmarks.random_flow_models import FAMILIES, flow_conditioning, small_flow
from semantic_style.benchmarks.random_models import conditioning, small_sd15
from semantic_style.files.inversion_file import load_inversion, save_inversion
from semantic_style.host.invert import make_sigmas
from semantic_style.host.model_sampling import check_unet
from semantic_style.nodes.nodes_adain import MapFromLabels
from semantic_style.nodes.nodes_inversion import (
    DDIMInversion,
    DDPMInversion,
    InversionFromBatch,
    InversionLatent,
    Replay,
)

pytestmark = pytest.mark.usefixtures("one_thread", "as_the_host_runs_nodes")

# What this version of the host does not have is not among them.
HERE = [name for name, family in FAMILIES.items() if not family.missing]
CFG = 4.0
POSITIVE, NEGATIVE, OTHER = 1, 2, 3  # seeds of prompts


@pytest.fixture(scope="module")
def model_of():
    return functools.cache(small_flow)


def picture(model, name, batch=1, frames=1, size=(7, 5)):
    """A latent of an odd size as a VAE would give it."""
    axes = (frames, *size) if FAMILIES[name].video else size
    x = torch.randn(batch, 16, *axes, generator=torch.Generator().manual_seed(0))
    return {"samples": model.model.process_latent_out(x)}


def prompts(model, positive):
    """What a sampler is given: a seed in place of a prompt stands for a random one."""
    given = positive if isinstance(positive, list) else flow_conditioning(model, positive)
    return given, flow_conditioning(model, NEGATIVE)


def ddpm(model, image, steps=3, positive=POSITIVE, cfg=CFG, batch_steps=0):
    both = prompts(model, positive)
    return DDPMInversion.execute(model, *both, image, steps, "simple", cfg, 7, batch_steps).args[0]


def ddim(model, image, steps=3, refine=0):
    both = prompts(model, POSITIVE)
    return DDIMInversion.execute(model, *both, image, steps, "simple", 1.0, 0, refine).args[0]


def sample(model, noise, sampler, sigmas, image, positive=POSITIVE, cfg=CFG):
    (guider,) = CFGGuider().get_guider(model, *prompts(model, positive), cfg)
    return SamplerCustomAdvanced().sample(noise, guider, sampler, sigmas, image)[0]


def resample(model, inversion, positive=POSITIVE, cfg=CFG, mask=None, **settings):
    noise, sampler, sigmas, image = Replay.execute(inversion, **{"skip": 0, "exact": True, **settings}).args
    if mask is not None:
        image = {**image, "noise_mask": mask}
    return sample(model, noise, sampler, sigmas, image, positive, cfg)["samples"]


def error(model, out, image):
    """Largest difference in the model's coordinates."""
    inner = model.model.process_latent_in
    return float((inner(out) - inner(image["samples"])).abs().max())


@pytest.mark.parametrize("cfg", [1.0, CFG])
@pytest.mark.parametrize("name", HERE)
def test_reconstruction_from_pure_noise(model_of, name, cfg):
    model = model_of(name)
    image = picture(model, name, batch=2, frames=1 if name == "Qwen-Image" else 3)
    steps = 5 if name == "Z-Image" else 20  # which cannot be as small as the others
    inversion = ddpm(model, image, steps, cfg=cfg)
    assert (inversion.path, inversion.steps, float(inversion.sigmas[0])) == ("flow", steps, 1.0)
    assert inversion.clean.shape == image["samples"].shape
    assert error(model, resample(model, inversion, cfg=cfg), image) < 1e-4
    edit = resample(model, inversion, OTHER, cfg=7.5)
    assert error(model, edit, image) > 0.01
    assert error(model, resample(model, inversion, OTHER, cfg=7.5, skip=steps - 1), image) < error(model, edit, image)


@pytest.mark.parametrize("name", HERE)
def test_bfloat16_keeps_float32_latents(name):
    """Measured at CFG 4, 20 steps: 5e-7 to 6e-3."""
    half = small_flow(name, torch.bfloat16)
    image = picture(half, name)
    inversion = ddpm(half, image)
    assert inversion.noise_maps.dtype == torch.float32
    assert error(half, resample(half, inversion), image) < 0.1


@pytest.mark.parametrize("name", HERE)
def test_levels_that_share_a_call_change_nothing(model_of, name):
    model = model_of(name)
    image = picture(model, name, batch=2)
    calls = []
    handle = model.model.diffusion_model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    one, many = (ddpm(model, image, batch_steps=n) for n in (1, 3))
    handle.remove()
    # Two pictures and both prompts at one level, then at three.
    assert calls in ([4, 4, 4, 12], [2] * 6 + [6] * 2)
    torch.testing.assert_close(many.noise_maps, one.noise_maps, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["SD3", "Wan"])
def test_ddim_and_its_refinement(model_of, name):
    model = model_of(name)
    image = picture(model, name, frames=2)
    errors = [error(model, resample(model, ddim(model, image, 6, refine), cfg=1.0), image) for refine in (0, 4)]
    assert errors[1] < 0.2 * errors[0]


@pytest.mark.parametrize(
    ("name", "key"), [("Flux", "ref_latents"), ("Flux", "guidance"), ("Qwen-Image", "ref_latents")]
)
def test_what_else_a_prompt_holds_reaches_the_model(model_of, name, key):
    model = model_of(name)
    image = picture(model, name)
    reference = picture(model, name, size=(4, 6))["samples"]
    positive = flow_conditioning(model, 1, guidance=2.5, reference_latents=[reference])
    seen = []
    handle = model.model.diffusion_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get(key)), with_kwargs=True
    )
    inversion = ddpm(model, image, positive=positive, cfg=1.0, batch_steps=3)
    handle.remove()
    assert len(seen) == 1
    if key == "guidance":
        assert seen[0].tolist() == [2.5] * 3
    else:
        inner = model.model.process_latent_in(reference)
        torch.testing.assert_close(seen[0][0], inner.expand(3, *inner.shape[1:]))
    assert error(model, resample(model, inversion, positive, cfg=1.0), image) < 1e-4
    assert error(model, resample(model, inversion, cfg=1.0), image) > 1e-4


def inputs_seen_by(model):
    """A clone whose guider notes what it is asked about, and the notes."""
    seen, m = [], model.clone()

    def note(args):
        seen.append((float(args["sigma"][0]), args["input"].clone()))
        return args["denoised"]

    m.set_model_sampler_post_cfg_function(note)
    return m, seen


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("name", ["Flux", "Wan"])
def test_noise_and_sigmas_serve_the_hosts_own_samplers(model_of, name, skip):
    model, seen = inputs_seen_by(model_of(name))
    inversion = ddpm(model, picture(model, name), 4)
    noise, _, sigmas, image = Replay.execute(inversion, skip, True).args
    seen.clear()
    (euler,) = KSamplerSelect().get_sampler("euler")
    sample(model, noise, euler, sigmas, image)
    assert seen[0][0] == float(inversion.sigmas[skip])
    torch.testing.assert_close(seen[0][1], inversion.trajectory[skip], rtol=0, atol=1e-5)


def test_a_replay_that_ends_early_goes_on_in_the_hosts_samplers(model_of):
    model, seen = inputs_seen_by(model_of("SD3"))
    inversion = ddpm(model, picture(model, "SD3"), 4)
    noise, sampler, sigmas, image = Replay.execute(inversion, 0, True).args
    high, low = SplitSigmas().get_sigmas(sigmas, 2)
    half = sample(model, noise, sampler, high, image)
    seen.clear()
    (euler,), (nothing,) = KSamplerSelect().get_sampler("euler"), DisableNoise().get_noise()
    sample(model, nothing, euler, low, half)
    torch.testing.assert_close(seen[0][1], inversion.trajectory[2], rtol=0, atol=1e-4)


def test_an_inversion_latent_is_a_start(model_of):
    model = model_of("Qwen-Image")
    inversion = ddpm(model, picture(model, "Qwen-Image"), 4)
    for skip in (0, 2):
        stored = InversionLatent.execute(inversion, skip).args[0]
        same = resample(model, inversion, skip=skip, start=stored)
        torch.testing.assert_close(same, resample(model, inversion, skip=skip), rtol=0, atol=1e-4)


def test_a_picture_without_a_time_axis_gets_one(model_of):
    model = model_of("Qwen-Image")
    flat = {"samples": picture(model, "Qwen-Image")["samples"][:, :, 0]}
    inversion = ddpm(model, flat)
    assert inversion.clean.shape == (1, 16, 1, 7, 5)
    assert error(model, resample(model, inversion), {"samples": flat["samples"][:, :, None]}) < 1e-4


def test_a_file_a_batch_and_a_second_run(model_of, tmp_path):
    model = model_of("Flux")
    image = picture(model, "Flux", batch=2)
    positive = flow_conditioning(model, 1, guidance=2.5, reference_latents=[image["samples"][:1], image["samples"][1:]])
    inversion = ddpm(model, image, positive=positive)
    save_inversion(tmp_path / "i.safetensors", inversion)
    loaded = load_inversion(tmp_path / "i.safetensors")
    expected = resample(model, inversion, positive)
    assert torch.equal(resample(model, loaded, loaded.positive), expected)
    assert torch.equal(resample(model, inversion, positive), expected)
    part = InversionFromBatch.execute(inversion, 1, 1).args[0]
    torch.testing.assert_close(resample(model, part, positive), expected[1:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("of_replay", [False, True])
def test_cancel_leaves_nothing_behind(model_of, of_replay):
    model = model_of("SD3")
    inversion = ddpm(model, picture(model, "SD3"), 4)

    def run(model):
        return resample(model, inversion) if of_replay else ddpm(model, picture(model, "SD3"), 4).noise_maps

    def cancel(args):
        comfy.model_management.interrupt_current_processing(len(calls) == 1)
        calls.append(1)
        return args["denoised"]

    expected, calls, cancelled = run(model), [], model.clone()
    cancelled.set_model_sampler_post_cfg_function(cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(cancelled)
    assert len(calls) == 2
    assert torch.equal(run(model), expected)


def test_a_lora_is_an_edit_and_another_checkpoint_is_none(model_of):
    model = model_of("Lumina2")
    image = picture(model, "Lumina2")
    inversion = ddpm(model, image)
    patched = model.clone()
    patches = {k: ("diff", (0.05 * torch.randn_like(v),)) for k, v in model.model.state_dict().items() if v.ndim == 2}
    assert patched.add_patches(patches)
    assert error(model, resample(patched, inversion), image) > 1e-3
    assert error(model, resample(model, inversion), image) < 1e-4
    with pytest.raises(ValueError, match="another checkpoint"):
        resample(small_flow("Lumina2", seed=1), inversion)


def test_a_mask_keeps_a_video_outside(model_of):
    model = model_of("Wan")
    image = picture(model, "Wan", frames=3, size=(8, 8))
    inversion = ddpm(model, image)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1.0
    out = resample(model, inversion, OTHER, cfg=7.5, mask=mask)
    torch.testing.assert_close(out[..., :4], image["samples"][..., :4], rtol=0, atol=1e-4)
    assert error(model, out, image) > 0.01


def test_adain_by_regions_along_the_replay_of_a_video(model_of):
    model = model_of("Wan")
    video = ddpm(model, picture(model, "Wan", frames=3, size=(8, 8)), 8)
    style = ddpm(model, {"samples": 2 + 0.5 * picture(model, "Wan", size=(6, 8))["samples"]}, 8)
    halves = torch.zeros(1, 8, 8, dtype=torch.long)
    halves[..., 4:] = 1
    (regions,) = MapFromLabels.execute(halves, halves).args
    out = resample(model, video, adain_reference=style, adain_start=0.0, semantic_map=regions)
    plain = resample(model, video, adain_reference=style, adain_start=0.0)
    assert error(model, plain, {"samples": out}) > 0.01
    # The last step's residual, which AdaIN does not come after, pulls back to the content.
    new, style, old = (
        x[..., :4].mean(dim=(2, 3, 4)) for x in (out, style.to_outer(style.clean), video.to_outer(video.clean))
    )
    assert (new - style).abs().mean() < 0.9 * (old - style).abs().mean()


def test_a_shift_by_resolution_is_in_the_levels(model_of):
    model = model_of("Flux")
    (shifted,) = ModelSamplingFlux().patch(model, 1.15, 0.5, 256, 256)
    image = picture(model, "Flux")
    inversion = ddpm(shifted, image)
    assert (inversion.sigmas[1:-1] < ddpm(model, image).sigmas[1:-1]).all()
    for m in (shifted, model):
        assert error(model, resample(m, inversion), image) < 1e-4


@pytest.mark.parametrize("name", ["SD3", "Flux"])
@pytest.mark.parametrize("scheduler", comfy.samplers.SCHEDULER_NAMES)
def test_every_scheduler_gives_levels_of_a_flow(model_of, name, scheduler):
    for steps in (2, 7, 60):
        sigmas = make_sigmas(model_of(name), scheduler, steps)
        assert (sigmas.diff() < 0).all()
        assert 0.5 < sigmas[0] <= 1.0
        assert sigmas[-1] == 0


def test_cosmos_flow_is_in_the_other_coordinates():
    model, words = small_sd15(model_type="FLOW_COSMOS"), conditioning(1)
    image = {"samples": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) / 0.18215}
    inversion = DDPMInversion.execute(model, words, words, image, 4, "karras", 1.0, 7).args[0]
    assert inversion.path == "ve"
    assert error(model, resample(model, inversion, words, cfg=1.0), image) < 1e-3


def test_refusals(model_of):
    model = model_of("Flux")
    inversion = ddpm(model, picture(model, "Flux"))
    exploding = small_sd15()
    image = {"samples": torch.ones(1, 4, 8, 8)}
    other = DDPMInversion.execute(exploding, conditioning(1), conditioning(1), image, 2, "normal", 1.0, 0).args[0]
    (as_flow,) = ModelSamplingSD3().patch(exploding, 3.0)
    flow = DDPMInversion.execute(as_flow, conditioning(1), conditioning(1), image, 2, "normal", 1.0, 0).args[0]
    for call, message in (
        (lambda: resample(as_flow, flow, conditioning(1), adain_reference=other), "noised differently"),
        (lambda: check_unet(model), r"Flux/Flux.*CONST\) is a flow model: what works with it is"),
        (lambda: resample(model, other), "on the path 've', the guider's model on 'flow'"),
        (lambda: resample(model, inversion, adain_reference=other), "of the kind SD15"),
        (lambda: ddpm(model, {"samples": torch.ones(1, 4, 8, 8)}), "16 channels"),
        (lambda: ddpm(model, {"samples": torch.ones(1, 16, 2, 8, 8)}), "2 further axes"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
