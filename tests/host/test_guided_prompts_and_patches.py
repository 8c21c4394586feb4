"""Energies under what users have in their graphs: several prompts, ranges, stock patches, other runs before."""

import gc

import comfy.samplers
import comfy_extras.nodes_freelunch as freelunch
import comfy_extras.nodes_model_advanced as model_advanced
import comfy_extras.nodes_model_downscale as downscale
import pytest
import torch
from semantic_style.attention.scsa_attention import ScsaSettings
from semantic_style.benchmarks.random_models import ReportingGuider, conditioning, small_sd15
from semantic_style.host import reference_cache
from semantic_style.host.apply_scsa import Patch, Pictures, apply_scsa
from semantic_style.host.apply_spin import spin_energy
from semantic_style.host.fingerprint import NoFingerprintError, fingerprint, token
from semantic_style.host.invert import InversionTask, invert_ddim, invert_ddpm
from semantic_style.host.reference_cache import ReferenceCache, usable_ram
from semantic_style.host.replay_sampler import ReplayNoise, ReplaySampler
from semantic_style.regions.semantic_map import SemanticMap
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
        return invert(model, latent(1, 4, 16, 8, seed=5), EMPTY, 1.0, seed=2)


def semantix(context, reference, weights=(3.0, 0.9, 1.0)):
    style, kept = Stream(reference, EMPTY), Stream(context)
    return Energy((StyleTerm(style, weights[0]), SpatialTerm(kept, weights[1]), SemanticTerm(kept, weights[2])))


def run(model, energy, context, positive=POSITIVE, cfg=CFG, cache=None, **settings):
    guider = ReportingGuider(model, positive, NEGATIVE, cfg, energy, cache=cache, **settings)
    image = context.to_outer(context.clean)
    noise = ReplayNoise(context).generate_noise({"samples": image})
    out = guider.sample(noise, image, ReplaySampler(context), context.sigmas, disable_pbar=True, seed=0)
    return out, guider.report


def prompts(kind):
    """Two whole-picture prompts, combined."""
    second = conditioning(8, tokens=9) if kind == "other length" else conditioning(8)
    if kind == "masked":
        second = [[second[0][0], {"mask": torch.rand(1, 16, 8), "mask_strength": 1.0}]]
    return POSITIVE + second


@pytest.mark.parametrize("kind", ["same length", "other length", "masked"])
def test_of_combined_prompts_each_is_compared_with_its_own(model, kind):
    both = prompts(kind)
    context = invert(model, latent(1, 4, 16, 8), both, 1.0)
    image = context.to_outer(context.clean)
    out, report = run(model, semantix(context, context, (0.0, 1.0, 1.0)), context, both, 1.0)
    assert (out - image).abs().max() < 1e-3, "where nothing differs nothing pulls: the context comes back"
    assert len(report.steps) == STEPS
    assert report.reference_forwards == 2 * STEPS
    pulled, _ = run(model, semantix(context, context, (0.0, 1.0, 1.0)), context, conditioning(5), 1.0)
    assert (pulled - image).abs().max() > 0.1


def test_prompts_for_areas_are_refused_before_any_call(model, context, reference):
    calls = []
    handle = model.model.diffusion_model.register_forward_pre_hook(lambda module, args: calls.append(1))
    area = [[POSITIVE[0][0], {"area": (8, 8, 0, 0), "strength": 1.0}]]
    bounds = [[POSITIVE[0][0], {"mask": torch.ones(1, 16, 8), "set_area_to_bounds": True}]]
    try:
        for positive in (area, POSITIVE + area, bounds):
            with pytest.raises(ValueError, match="for an area of it"):
                run(model, semantix(context, reference), context, positive)
    finally:
        handle.remove()
    assert calls == []


def ranged(start, end):
    return [[POSITIVE[0][0], {"start_percent": start, "end_percent": end}]]


def test_where_no_prompt_is_active_the_run_goes_on_unguided(model, context, reference):
    out, report = run(model, semantix(context, reference), context, ranged(0.0, 0.5))
    assert torch.isfinite(out).all()
    assert 0 < len(report.steps) < STEPS
    assert report.unprompted == STEPS - len(report.steps)
    plain = comfy.samplers.CFGGuider(model)
    plain.set_conds(ranged(0.0, 0.5), NEGATIVE)
    plain.set_cfg(CFG)
    image = context.to_outer(context.clean)
    noise = ReplayNoise(context).generate_noise({"samples": image})
    stock = plain.sample(noise, image, ReplaySampler(context), context.sigmas, disable_pbar=True, seed=0)
    nothing, _ = run(model, semantix(context, reference, (0.0, 0.0, 0.0)), context, ranged(0.0, 0.5))
    assert torch.equal(nothing, stock)
    assert not torch.equal(out, stock)


def test_a_picture_does_not_depend_on_what_ran_before(model, context, reference):
    full, without_style = semantix(context, reference), semantix(context, reference, (0.0, 0.9, 1.0))
    alone, _ = run(model, full, context, cache=ReferenceCache(10**8))
    cache = ReferenceCache(10**8)
    run(model, without_style, context, cache=cache)
    after, report = run(model, full, context, cache=cache)
    assert report.reference_reused == STEPS, "the context's features are known, the reference's are not"
    assert torch.equal(alone, after)
    for other in (cache, None, ReferenceCache(0), ReferenceCache(cache.bytes // 3)):
        assert torch.equal(alone, run(model, full, context, cache=other)[0])
    cache.clear()
    assert torch.equal(alone, run(model, full, context, cache=cache)[0])


def patched_by_freeu(model):
    return freelunch.FreeU().patch(model, 1.1, 1.2, 0.9, 0.2)[0]


def patched_by_freeu_v2(model):
    return freelunch.FreeU_V2().patch(model, 1.3, 1.4, 0.9, 0.2)[0]


def writing_everywhere(model):
    """Patches of every kind that write into what they are given."""
    patched = model.clone()

    def halve(h, *_):
        return h.mul_(0.9)

    def halve_both(h, skip, options):
        return h.mul_(0.9), skip.mul_(0.9)

    def halve_three(n, context, value, extra):
        return n.mul_(0.9), context, value

    def replace(q, k, v, extra):
        return comfy.ldm.modules.attention.optimized_attention(q.mul_(0.9), k, v, extra["n_heads"])

    patched.set_model_input_block_patch(halve)
    patched.set_model_output_block_patch(halve_both)
    patched.set_model_attn1_patch(halve_three)
    patched.set_model_attn2_patch(halve_three)
    patched.set_model_attn1_output_patch(halve)
    patched.set_model_attn2_replace(replace, "output", 4)
    return patched


@pytest.mark.parametrize("patch", [patched_by_freeu, patched_by_freeu_v2, writing_everywhere])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_patches_that_write_into_hidden_states(model, context, reference, patch, checkpointing):
    patched = patch(model)
    out, report = run(patched, semantix(context, reference), context, checkpointing=checkpointing)
    assert max(report.table()["gradient"]) > 1e-4
    plain, _ = run(model, semantix(context, reference), context)
    assert not torch.allclose(out, plain, atol=1e-2), "the patch acts"
    # The prediction under the gradient is the one without it.
    unguided, _ = run(patched, semantix(context, reference, (0.0, 0.0, 0.0)), context)
    weak, _ = run(patched, semantix(context, reference, (1e-7, 0.0, 0.0)), context, checkpointing=checkpointing)
    assert torch.allclose(weak, unguided, atol=2e-2)


def shrunk(model, **settings):
    given = {"start_percent": 0.0, "end_percent": 0.35, "downscale_after_skip": True} | settings
    node = downscale.PatchModelAddDownscale
    methods = {"downscale_method": "bicubic", "upscale_method": "bicubic"}
    return node.execute(model, block_number=3, downscale_factor=2.0, **given, **methods).result[0]


def test_deep_shrink_under_energies(model, context, reference):
    patched = shrunk(model)
    mask = torch.zeros(1, 16, 8)
    mask[:, 4:12, 2:6] = 1
    for energy in (semantix(context, reference), spin_energy(context, mask)):
        out, report = run(patched, energy, context)
        assert torch.isfinite(out).all()
        assert len(report.steps) == STEPS
        assert min(report.table()["gradient"]) > 0
    whole, _ = run(model, semantix(context, reference), context)
    out, _ = run(patched, semantix(context, reference), context)
    assert not torch.allclose(out, whole, atol=1e-2)


def test_scsa_refuses_deep_shrink_by_name_before_the_run(model):
    with torch.inference_mode():
        pictures = [invert_ddim(InversionTask(model, EMPTY, EMPTY, latent(1, 4, 16, 8, seed=s), 2, "normal", 1.0, 0))
                    for s in (1, 2)]  # fmt: skip
    labels = torch.zeros(1, 16, 8, dtype=torch.int64)
    patch = Patch(Pictures(*pictures), SemanticMap(labels, labels), ScsaSettings(a1=0.0))
    calls = []
    for patched in (shrunk(apply_scsa(model, patch)), apply_scsa(shrunk(model), patch)):
        handle = model.model.diffusion_model.register_forward_pre_hook(lambda module, args: calls.append(1))
        guider = comfy.samplers.CFGGuider(patched)
        guider.set_conds(POSITIVE, NEGATIVE)
        sampler, blank = comfy.samplers.sampler_object("euler"), torch.zeros(1, 4, 16, 8)
        try:
            with pytest.raises(ValueError, match="PatchModelAddDownscale"):
                guider.sample(blank, blank, sampler, pictures[0].sigmas, disable_pbar=True, seed=0)
        finally:
            handle.remove()
        assert calls == []


def test_a_compute_dtype_on_the_model(model, context, reference):
    patched = model_advanced.ModelComputeDtype().patch(model, "fp32")[0]
    cache = ReferenceCache(10**8)
    first, _ = run(patched, semantix(context, reference), context, cache=cache, allow_other_model=True)
    again, report = run(patched, semantix(context, reference), context, cache=cache, allow_other_model=True)
    assert torch.equal(first, again)
    assert report.reference_reused == 2 * STEPS
    half = model_advanced.ModelComputeDtype().patch(model, "bf16")[0]
    _, report = run(half, semantix(context, reference), context, cache=cache, allow_other_model=True)
    assert report.reference_reused == 0


def test_entries_end_with_their_inversion(model, reference):
    cache = ReferenceCache(10**8)
    own = invert(model, latent(1, 4, 16, 8, seed=9))
    energy = semantix(own, reference)
    run(model, energy, own, cache=cache)
    assert len(cache) == 2 * STEPS
    del own, energy
    gc.collect()
    assert len(cache) == STEPS, "those of the reference, which is still in use"


def test_the_bound_knows_a_containers_limit(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(reference_cache, "CGROUP_LIMITS", (str(tmp_path / "missing"), str(limit)))
    limit.write_text("max\n")
    whole = usable_ram()
    limit.write_text(f"{whole // 8}\n")
    assert usable_ram() == whole // 8
    assert ReferenceCache().limit == whole // 32


class Thing:
    """Told from others by itself only."""


DIFFERENT = [
    ([1, 23], [12, 3]), (["ab", "c"], ["a", "bc"]), ([[1], 2], [[1, 2]]), ({"a": 1}, {"a": 2}), ({1: "a"}, {"1": "a"}),
    (torch.tensor(1.0), torch.tensor(2.0)), (torch.tensor(1.0), torch.tensor([1.0])), (1, 1.0), (1, True), (0.0, -0.0),
    (None, "None"), ([], {}), (torch.float16, torch.bfloat16), (torch.zeros(2, 3), torch.zeros(3, 2)),
    (torch.zeros(0, 2), torch.zeros(2, 0)), (Thing(), Thing()), ({"a": {"b": 1}, "c": 2}, {"a": {"b": 1, "c": 2}}),
]  # fmt: skip


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_fingerprints_of_different_things_differ(a, b):
    assert fingerprint(a) != fingerprint(b)
    assert fingerprint(a) == fingerprint(a)


def test_what_cannot_be_told_from_others_has_no_fingerprint():
    class Slotted:
        __slots__ = ()

    with pytest.raises(NoFingerprintError):
        token(Slotted())
