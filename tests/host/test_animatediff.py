"""AnimateDiff-Evolved under this pack's nodes, with a small random motion module made here.

The pack is looked for in the folder that $SEMANTIC_STYLE_PEERS names, else in the host's custom_nodes; nothing of it is
copied here.
"""

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import CFGGuider, SamplerCustomAdvanced
from semantic_style.attention.scsa_attention import ScsaSettings
from semantic_style.benchmarks.random_models import ReportingGuider, conditioning, small_sd15
from semantic_style.host.apply_scsa import Patch, Pictures, apply_scsa
from semantic_style.host.apply_spin import apply_spin
from semantic_style.host.reference_cache import ReferenceCache
from semantic_style.nodes.nodes_inversion import DDIMInversion, DDPMInversion, Replay
from semantic_style.nodes.nodes_semantix import KSampler
from semantic_style.regions.semantic_map import SemanticMap
from semantic_style.samplers.terms import Energy, SemanticTerm, SpatialTerm, Stream, StyleTerm

pytestmark = pytest.mark.usefixtures("one_thread", "as_the_host_runs_nodes")

FOLDER = "comfyui-animatediff-evolved"
FRAMES, STEPS, CFG = 6, 3, 3.5
WIDTHS = (32, 64, 128, 128)  # of small_sd15's levels
PE_LENGTH = 32  # what marks a module of the third version
SD15_SCALE = 0.18215
POSITIVE, NEGATIVE = conditioning(1), conditioning(2)


@pytest.fixture(scope="module")
def peer(host_folder):
    """AnimateDiff-Evolved's modules."""
    named = os.environ.get("SEMANTIC_STYLE_PEERS")
    where = Path(named) if named else host_folder / "custom_nodes"
    folder = next((f for f in where.glob("*") if f.name.lower() == FOLDER), None)
    if folder is None:
        pytest.skip(f"no peer packs: no AnimateDiff-Evolved in {where} ($SEMANTIC_STYLE_PEERS)")
    name = "animatediff_evolved"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    pack = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    modules = ("motion_module_ad", "model_injection", "nodes_gen2", "nodes_context", "sampling")
    return SimpleNamespace(**{m: sys.modules[f"{name}.animatediff.{m}"] for m in modules})


def motion_weights(seed=0) -> dict[str, torch.Tensor]:
    """Random weights under AnimateDiff's names. Its zero-initialised last layer would make the module do nothing."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}

    def linear(name, rows, columns, bias=True):
        weights[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) / columns**0.5
        if bias:
            weights[f"{name}.bias"] = 0.1 * torch.randn(rows, generator=generator)

    def norm(name, width):
        weights[f"{name}.weight"], weights[f"{name}.bias"] = torch.ones(width), torch.zeros(width)

    def module(name, width):
        norm(f"{name}.norm", width)
        linear(f"{name}.proj_in", width, width)
        linear(f"{name}.proj_out", width, width)
        block = f"{name}.transformer_blocks.0"
        for i in range(2):
            attention = f"{block}.attention_blocks.{i}"
            for part in ("to_q", "to_k", "to_v"):
                linear(f"{attention}.{part}", width, width, bias=False)
            linear(f"{attention}.to_out.0", width, width)
            weights[f"{attention}.pos_encoder.pe"] = torch.randn(1, PE_LENGTH, width, generator=generator)
            norm(f"{block}.norms.{i}", width)
        linear(f"{block}.ff.net.0.proj", 8 * width, width)
        linear(f"{block}.ff.net.2", width, 4 * width)
        norm(f"{block}.ff_norm", width)

    for kind, widths, count in (("down", WIDTHS, 2), ("up", WIDTHS[::-1], 3)):
        for i, width in enumerate(widths):
            for j in range(count):
                module(f"{kind}_blocks.{i}.motion_modules.{j}.temporal_transformer", width)
    return weights


@pytest.fixture(scope="module")
def motion(peer: SimpleNamespace):
    """A motion model as its loader makes one, but for the widths, which the pack has as constants."""
    modules, injection = peer.motion_module_ad, peer.model_injection

    class Narrow(modules.AnimateDiffModel):
        def __init__(self, weights, info):
            with torch.device("meta"):
                super().__init__(weights, info)
            settings = {
                "temporal_pe_max_len": self.encoding_max_len,
                "attention_block_types": self.attn_block_types,
                "ops": self.ops,
            }
            for kind, widths in (("down", WIDTHS), ("up", WIDTHS[::-1])):
                blocks = [
                    modules.MotionModule(w, block_type=kind, block_idx=i, **settings) for i, w in enumerate(widths)
                ]
                setattr(self, f"{kind}_blocks", torch.nn.ModuleList(blocks))

    with torch.inference_mode():  # as its loader node runs
        weights, info = modules.normalize_ad_state_dict(motion_weights(), "small")
        model = Narrow(weights, info)
        injection.verify_load_result(model.load_state_dict(weights, strict=False), info)
    management = comfy.model_management
    return injection.create_MotionModelPatcher(
        model, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )


def windows(peer, kind, length=4, overlap=2, **settings):
    """CONTEXT_OPTIONS of one of the pack's nodes; None for none."""
    if kind is None:
        return None
    node = getattr(peer.nodes_context, f"{kind}ContextOptionsNode")
    return node().create_options(context_length=length, context_overlap=overlap, **settings)[0]


CONTEXTS = {
    "whole clip": (None, {}),
    "static windows": ("StandardStatic", {}),
    "moving windows": ("StandardUniform", {"overlap": 1, "context_stride": 1}),
    "looped windows": ("LoopedUniform", {"overlap": 1, "context_stride": 2, "closed_loop": True}),
    "one window": ("StandardStatic", {"length": FRAMES, "use_on_equal_length": True}),
}


def animated(peer, model, motion, context="whole clip"):
    """MODEL with the motion module, as a user's graph makes it. Without one: the pack's sampling alone."""
    kind, settings = CONTEXTS[context]
    models = None if motion is None else peer.nodes_gen2.ApplyAnimateDiffModelBasicNode().apply_motion_model(motion)[0]
    options = windows(peer, kind, **settings)
    node = peer.nodes_gen2.UseEvolvedSamplingNode()
    return node.use_evolved_sampling(model, "use existing", m_models=models, context_options=options)[0]


@pytest.fixture(scope="module")
def plain():
    return small_sd15()


@pytest.fixture(params=[c for c in CONTEXTS if c != "one window"])
def model(request, peer, plain, motion):
    return animated(peer, plain, motion, request.param)


@pytest.fixture
def calls(plain):
    """Of every call of the network: its levels, its rows, the frames of its window."""
    seen = []

    def look(network, args, kwargs):
        options = kwargs.get("transformer_options", {})
        frames = options.get("ad_params", {}).get("sub_idxs")
        seen.append(SimpleNamespace(levels=options["sigmas"].tolist(), rows=len(args[0]), frames=frames))

    handle = plain.model.diffusion_model.register_forward_pre_hook(look, with_kwargs=True)
    yield seen
    handle.remove()


def latent(frames=FRAMES, seed=0):
    return {"samples": torch.randn(frames, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) / SD15_SCALE}


def invert(model, image, steps=STEPS, node=DDPMInversion, **settings):
    return node.execute(model, POSITIVE, NEGATIVE, image, steps, "normal", CFG, seed=7, **settings).args[0]


def resample(model, inversion, skip=0, guider=None):
    noise, sampler, sigmas, image = Replay.execute(inversion, skip=skip, exact=True).args
    guider = guider or CFGGuider().get_guider(model, POSITIVE, NEGATIVE, CFG)[0]
    return SamplerCustomAdvanced().sample(noise, guider, sampler, sigmas, image)[0]["samples"]


def error(out, image):
    """Largest difference in the model's coordinates."""
    return float((out - image["samples"]).abs().max() * SD15_SCALE)


class OneCall(comfy.samplers.Sampler):
    """Evaluates a guider at the latent image itself, at one level."""

    def __init__(self, sigma):
        self.sigma = sigma

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        return model_wrap(latent_image, torch.full((len(latent_image),), self.sigma), **extra_args)


def predict(guider, image, sigma=2.0):
    """One prediction of a guider [F, 4, H, W], in the model's coordinates."""
    x = image["samples"]
    sigmas = torch.tensor([sigma, 0.0])
    return SD15_SCALE * guider.sample(torch.zeros_like(x), x, OneCall(sigma), sigmas, disable_pbar=True, seed=0)


def test_the_pack_takes_the_module_for_animatediff_s(motion):
    info = motion.model.mm_info
    assert (info.sd_type, info.mm_format, info.mm_version) == ("SD1.5", "AnimateDiff", "v3")


def test_a_clip_is_reconstructed(model):
    """In float32, of unit variance, also from a later step on; measured 3e-5 and less."""
    image = latent()
    inversion = invert(model, image)
    for skip in (0, 2):
        assert error(resample(model, inversion, skip), image) < 1e-4, f"skip {skip}"


def test_the_motion_module_takes_part(peer, plain, motion):
    """An inversion made with it is no inversion without it."""
    image = latent()
    inversion = invert(animated(peer, plain, motion), image)
    assert error(resample(animated(peer, plain, None), inversion), image) > 0.01


@pytest.mark.parametrize("node", [DDPMInversion, DDIMInversion])
def test_a_replay_sees_the_windows_of_its_inversion(peer, plain, motion, calls, node):
    """Also where they move from step to step, the inversion goes up the schedule, and the replay starts later."""
    model = animated(peer, plain, motion, "moving windows")
    inversion = invert(model, latent(), node=node)
    sigmas = inversion.sigmas.tolist()[:-1]
    at_inversion = {level: [c.frames for c in calls if c.levels[0] == level] for level in sigmas}
    assert len({str(frames) for frames in at_inversion.values()}) > 1, "these windows do not move"
    calls.clear()
    resample(model, inversion, skip=1)
    for level in sigmas[1:]:
        at_replay = [c.frames for c in calls if c.levels[0] == level]
        # DDIM's inversion evaluates its last level twice, being at the clean end once.
        assert at_replay == at_inversion[level][: len(at_replay)]
        assert at_replay


def test_levels_are_not_mixed_into_one_call(model, calls):
    invert(model, latent(), steps=2, batch_steps=2)
    assert len({c.levels[0] for c in calls}) == 2
    for call in calls:
        assert len(set(call.levels)) == 1
        assert call.rows == 2 * len(call.frames or range(FRAMES))


def test_windows_are_respected(peer, plain, motion, calls):
    invert(animated(peer, plain, motion, "static windows"), latent(), steps=2)
    assert [c.frames for c in calls] == [[0, 1, 2, 3], [2, 3, 4, 5]] * 2


def influence(model, changed=3):
    """How much a change of one frame changes the prediction of each, [F]."""
    image, other = latent(), latent()
    other["samples"][changed] += 1
    a, b = (predict(CFGGuider().get_guider(model, POSITIVE, NEGATIVE, CFG)[0], i) for i in (image, other))
    return (a - b).flatten(1).abs().amax(dim=1)


def test_frames_influence_each_other(peer, plain, motion):
    assert (influence(animated(peer, plain, motion)) > 1e-3).all()


def test_without_a_motion_module_they_do_not(peer, plain):
    for model in (plain, animated(peer, plain, None)):
        assert torch.equal(influence(model) > 0, torch.arange(FRAMES) == 3)


def test_windows_end_influence(peer, plain, motion):
    """Frames 2 and 3 are in both windows, 0 and 1 only in the first."""
    moved = influence(animated(peer, plain, motion, "static windows"), changed=5) > 0
    assert moved.tolist() == [False, False, True, True, True, True]


def test_one_frame_is_a_clip(peer, plain, motion):
    """As a reference picture is inverted."""
    model, image = animated(peer, plain, motion), latent(1)
    assert error(resample(model, invert(model, image)), image) < 1e-4


def test_the_host_is_as_it_was(peer, plain, motion):
    """The pack swaps functions of the host while it samples."""
    before = comfy.samplers.sampling_function
    invert(animated(peer, plain, motion, "moving windows"), latent(), steps=2)
    assert comfy.samplers.sampling_function is before
    assert not any(type(m).__name__ == "VanillaTemporalModule" for m in plain.model.modules())


def semantix(context, reference, weight=1.0):
    kept, style = Stream(context), Stream(reference, NEGATIVE)
    return Energy((StyleTerm(style, 6 * weight), SpatialTerm(kept, 3 * weight), SemanticTerm(kept, 5 * weight)))


def guided(model, energy, cache=None, **settings):
    return ReportingGuider(model, POSITIVE, NEGATIVE, CFG, energy, cache=cache, **settings)


@pytest.fixture(scope="module")
def context(plain):
    """Of the clip, on the image model: a trajectory does not depend on the model, and reconstruction is not asked."""
    with torch.inference_mode():
        return invert(plain, latent(), steps=2)


@pytest.fixture(scope="module", params=[1, FRAMES], ids=["image", "video"])
def reference(request, plain):
    with torch.inference_mode():
        return invert(plain, latent(request.param, seed=5), steps=2)


def stock(model):
    """A run of the host's own KSampler."""
    x = torch.randn(FRAMES, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    sampler = comfy.samplers.KSampler(model, 2, model.load_device, "euler", "normal", 1.0, model.model_options)
    return sampler.sample(x, POSITIVE, NEGATIVE, CFG, latent_image=torch.zeros_like(x), disable_pbar=True, seed=3)


@pytest.mark.parametrize(("setting", "count"), [("whole clip", 1), ("static windows", 2)])
def test_a_guided_run_finishes(peer, plain, motion, context, reference, setting, count):
    model = animated(peer, plain, motion, setting)
    before = stock(model)
    guider = guided(model, semantix(context, reference), ReferenceCache(10**8))
    out = resample(model, context, guider=guider)
    assert torch.isfinite(out).all()
    assert out.shape == (FRAMES, 4, 8, 8)
    assert (out - resample(model, context)).abs().mean() * SD15_SCALE > 0.01
    report = guider.report
    assert len(report.steps) == context.steps
    assert report.gradient_forwards == report.plain_forwards == report.backwards
    assert report.gradient_forwards == count * context.steps
    assert report.reference_forwards == 2 * report.gradient_forwards
    assert report.reference_reused == 0, "windows and motion are not part of the cache's key"
    assert torch.equal(stock(model), before)


class OneFrame(SpatialTerm):
    """The spatial term of the clip's first frame alone."""

    def value(self, out, other, frames, resampled):
        at = torch.arange(out.count) if frames is None else torch.tensor(frames)
        return super().value(out, other, frames, resampled) * (at == 0)


def guidance(model, energy, image, sigma=2.0, **settings):
    """g [F, 4, H, W] and the report of a guider at the latent itself."""
    guider = guided(model, energy, **settings)
    (plain,) = CFGGuider().get_guider(model, POSITIVE, NEGATIVE, CFG)
    g = (predict(plain, image, sigma) - predict(guider, image, sigma)) / sigma
    return g, guider.report


def reach(model, context):
    """Which frames' latents the energy of the first frame depends on."""
    g, report = guidance(model, Energy((OneFrame(Stream(context), 0.1),)), latent(seed=9))
    assert report.table()["saturated"] == [0.0]
    return (g.flatten(1).abs().amax(dim=1) > 1e-5).tolist()


def test_gradients_cross_frames(peer, plain, motion, context):
    assert reach(animated(peer, plain, motion), context) == [True] * FRAMES


def test_without_a_motion_module_gradients_stay_in_their_frame(peer, plain, context):
    for model in (plain, animated(peer, plain, None), animated(peer, plain, None, "static windows")):
        assert reach(model, context) == [True] + [False] * (FRAMES - 1)


def test_gradients_end_with_the_window(peer, plain, motion, context):
    assert reach(animated(peer, plain, motion, "static windows"), context) == [True] * 4 + [False] * 2


def test_the_gradient_through_the_motion_module_is_the_energy_s_slope(peer, plain, motion, context):
    model, sigma, h = animated(peer, plain, motion), 2.0, 3e-3
    energy = Energy((OneFrame(Stream(context), 0.1),))
    image = latent(seed=9)
    direction = torch.zeros(FRAMES, 4, 8, 8)
    direction[3] = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(4))
    values = []
    for sign in (1, -1):
        moved = {"samples": image["samples"] + sign * h * direction / SD15_SCALE}
        values.append(guidance(model, energy, moved, sigma)[1].table()["spatial"][0] * FRAMES)
    slope = (values[0] - values[1]) / (2 * h)
    g, _ = guidance(model, energy, image, sigma)
    assert float((g * direction).sum()) == pytest.approx((1 + sigma**2) ** 0.5 * slope, rel=0.03)


@pytest.mark.parametrize("setting", ["static windows", "looped windows"])
def test_windows_change_nothing_where_frames_are_independent(peer, plain, context, reference, setting):
    """Each frame's guidance is the mean over the windows that hold it, and these are all the same."""
    energy = semantix(context, reference, 0.1)
    whole, _ = guidance(plain, energy, latent(seed=9))
    windowed, _ = guidance(animated(peer, plain, None, setting), energy, latent(seed=9))
    assert whole.abs().max() > 0.01
    assert torch.allclose(windowed, whole, atol=1e-4)


def test_one_window_of_all_frames_is_the_whole_clip(peer, plain, motion, context, reference):
    energy = semantix(context, reference, 0.1)
    whole, one = (
        guidance(animated(peer, plain, motion, c), energy, latent(seed=9))[0] for c in ("whole clip", "one window")
    )
    assert whole.abs().max() > 0.01
    assert torch.allclose(one, whole, atol=1e-4)


def test_an_image_reference_is_a_still_clip(peer, plain, motion, context):
    """The same guidance as from a video of the one picture, repeated."""
    image = invert(plain, latent(1, seed=5), steps=2)
    repeated = {n: getattr(image, n) for n in ("clean", "trajectory", "noise_maps", "residual")}
    axes = {"clean": 0, "trajectory": 1, "noise_maps": 1, "residual": 0}
    video = replace(image, **{n: t.repeat_interleave(FRAMES, dim=axes[n]) for n, t in repeated.items()})
    model = animated(peer, plain, motion)
    still, moving = (guidance(model, semantix(context, r, 0.1), latent(seed=9))[0] for r in (image, video))
    assert torch.allclose(still, moving, atol=1e-5)


def test_checkpointing_gives_the_same_guidance(peer, plain, motion, context):
    model = animated(peer, plain, motion, "static windows")
    energy = semantix(context, context, 0.1)
    kept, again = (guidance(model, energy, latent(seed=9), checkpointing=c)[0] for c in (False, True))
    assert kept.abs().max() > 0.01
    assert torch.allclose(again, kept, atol=1e-5)


def test_the_node_restyles_a_clip(peer, plain, motion, context):
    model = animated(peer, plain, motion, "static windows")
    reference = invert(plain, latent(1, seed=5), steps=2)
    setting = "published for video"
    result = KSampler.execute(model, POSITIVE, NEGATIVE, context, reference, CFG, setting, 0.0, 0.0, 0.0, 0.0).args
    out = result[0]["samples"]
    assert out.shape == (FRAMES, 4, 8, 8)
    assert torch.isfinite(out).all()
    assert error(out, latent()) > 0.05


@pytest.mark.parametrize("context", ["whole clip", "static windows"])
def test_scsa_takes_a_clip_as_a_whole(peer, plain, motion, calls, context):
    """Content and style each in a call of their own, a still style as a still clip."""
    model = animated(peer, plain, motion, context)
    clip, still = invert(model, latent(), node=DDIMInversion), invert(plain, latent(1, seed=5), node=DDIMInversion)
    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    labels[:, 4:] = 1
    patch = Patch(Pictures(clip, still), SemanticMap(labels, labels), ScsaSettings(a1=0.0))
    patched = apply_scsa(model, patch)
    calls.clear()
    if context != "whole clip":
        with pytest.raises(ValueError, match="does not know context windows"):
            resample(patched, clip)
        return
    out = resample(patched, clip)
    assert [c.rows for c in calls] == [FRAMES, FRAMES, 2 * FRAMES] * STEPS
    assert error(out, latent()) > 0.1
    assert torch.equal(out, resample(patched, clip))


@pytest.mark.parametrize("setting", ["static windows", "looped windows"])
def test_spin_s_masks_follow_the_frames_of_windows(peer, plain, motion, setting):
    """Where frames are independent, windows change nothing; with motion, the subject is in every frame."""
    masks = torch.zeros(FRAMES, 8, 8)
    for i in range(FRAMES):
        masks[i, i : i + 3, 2:6] = 1
    reference = conditioning(5, tokens=11)
    clip = invert(plain, latent())
    whole = resample(apply_spin(plain, reference, masks), clip)
    windowed = resample(apply_spin(animated(peer, plain, None, setting), reference, masks), clip)
    assert torch.allclose(windowed, whole, atol=1e-3)
    assert (whole - resample(plain, clip)).abs().amax(dim=(1, 2, 3)).min() > 0.01
    moving = animated(peer, plain, motion, setting)
    out, without = (resample(m, invert(moving, latent())) for m in (apply_spin(moving, reference, masks), moving))
    assert torch.isfinite(out).all()
    assert (out - without).abs().amax(dim=(1, 2, 3)).min() > 0.01
