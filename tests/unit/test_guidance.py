"""Energies as values, their gradient on a small UNet, the tap's attention maps and the cut of the graph."""

import math

import pytest
import torch
from semantic_style.attention.layers import cross_attention_layers, feature_blocks
from semantic_style.paperland.model import Paperland
from semantic_style.paperland.unet import UNetConfig, attention
from semantic_style.regions.masks import mask_on_grid
from semantic_style.regions.semantic_map import SemanticMap
from semantic_style.samplers.ddpm_inversion import ddpm_inversion
from semantic_style.samplers.energies import semantic_distance, spatial_feature_energy, style_feature_energy
from semantic_style.samplers.features import RECOMPUTE, Features, FeatureTap
from semantic_style.samplers.finite import FiniteWatch
from semantic_style.samplers.guidance import clamped, energy_gradient, step_of, total_energy, with_guidance
from semantic_style.samplers.matching import find_matches
from semantic_style.samplers.replay import replay
from semantic_style.samplers.step_adain import StepAdaIN
from semantic_style.samplers.terms import Energy, Resampled, SemanticTerm, SpatialTerm, Stream, StyleTerm, active_terms
from torch import nn

SIGMA = 0.7
CONFIG = UNetConfig(channels=32, multipliers=(1, 1, 2), context_channels=16, head_channels=16)
LEVELS = torch.tensor([4.0, 1.5, 0.7, 0.2, 0.0])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Paperland(CONFIG).double().eval().requires_grad_(False)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def prompts(model):
    return random(1, 6, 16, seed=1), random(1, 6, 16, seed=2)


@pytest.fixture(scope="module")
def inversions(model, prompts):
    """Of a context and of a larger reference."""
    guided = model.guided(*prompts, cfg=1.5)
    return tuple(
        ddpm_inversion(guided, 0.8 * random(1, 48, *size, seed=seed), LEVELS, seed=seed)
        for seed, size in ((3, (8, 12)), (4, (12, 16)))
    )


def taps(model, maps=True, cut=False):
    blocks, layers = feature_blocks(model.unet), cross_attention_layers(model.unet)
    return FeatureTap(blocks, layers if maps else None, attention, cut=cut)


def features(model, x, sigma, prompt):
    tap = taps(model)
    model(x, x.new_full((len(x),), sigma), prompt, tap.options())
    (seen,) = tap.read(x.shape[2:]).values()
    return seen


def all_terms(context, reference, empty=None):
    style, kept = Stream(reference, empty), Stream(context)
    return StyleTerm(style, 3.0), SpatialTerm(kept, 0.9), SemanticTerm(kept, 20.0)


def test_layers_of_a_stage_are_those_between_its_upsampler_and_the_one_before():
    class Upsample(nn.Module):
        pass

    def block(layers, up):
        transformer = nn.Module()
        transformer.transformer_blocks = nn.ModuleList(nn.Identity() for _ in range(layers))
        return nn.Sequential(nn.Identity(), transformer, *([Upsample()] if up else []))

    sdxl = nn.Module()
    sdxl.output_blocks = nn.ModuleList(block(n, i in (2, 5)) for i, n in enumerate([3, 3, 3, 2, 2, 2, 0, 0, 0]))
    coarse, fine = cross_attention_layers(sdxl)
    assert {layer[1] for layer in coarse} == {0, 1, 2}
    assert len(coarse) == 9
    assert {layer[1] for layer in fine} == {3, 4, 5}
    assert len(fine) == 6

    sd15 = nn.Module()
    sd15.output_blocks = nn.ModuleList(block(int(i > 2), i in (2, 5, 8)) for i in range(12))
    assert cross_attention_layers(sd15) == (
        (("output", 3, 0), ("output", 4, 0), ("output", 5, 0)),
        (("output", 6, 0), ("output", 7, 0), ("output", 8, 0)),
    )


def test_maps_are_the_softmax_of_queries_and_keys_averaged_over_heads_and_layers(model, prompts):
    x = random(2, 48, 8, 12, seed=5)
    recorded = {}
    for i in (0, 1):
        for name in ("to_q", "to_k"):
            layer = getattr(model.unet.output_blocks[i][1].transformer_blocks[0].attn2, name)
            layer.register_forward_hook(lambda m, args, out, key=(i, name): recorded.update({key: out}))
    seen = features(model, x, SIGMA, prompts[0])
    layers = []
    for i in (0, 1):
        q, k = recorded[i, "to_q"], recorded[i, "to_k"]
        heads = []
        for h in range(4):
            part = slice(16 * h, 16 * h + 16)
            logits = torch.einsum("bnd,bmd->bnm", q[..., part], k[..., part]) / math.sqrt(16)
            heads.append(logits.softmax(dim=-1))
        layers.append(sum(heads) / 4)
    expected = (layers[0] + layers[1]) / 2
    assert seen.maps[0].shape == (2, 2 * 3, 6)
    assert torch.allclose(seen.maps[0], expected, atol=1e-12)
    assert torch.allclose(seen.maps[1].sum(dim=-1), torch.ones(2, 24).double())


def test_tap_leaves_the_prediction_alone_and_chains_what_replaced_a_layer(model, prompts):
    x, sigma = random(1, 48, 8, 12), torch.tensor([SIGMA], dtype=torch.float64)
    used = []

    def halved(q, k, v, extra):
        used.append(extra["block"])
        return 0.5 * attention(q, k, v, extra["n_heads"])

    for key in (("output", 1), ("output", 1, 0)):
        base = {"patches_replace": {"attn2": {key: halved}}}
        plain = model(x, sigma, prompts[0], base)
        assert torch.equal(plain, model(x, sigma, prompts[0], taps(model).options(base)))
        assert not torch.equal(plain, model(x, sigma, prompts[0]))
    assert used == [("output", 1)] * 4
    assert base == {**base, "patches_replace": {"attn2": {("output", 1, 0): halved}}}


def test_a_checkpoints_second_run_is_not_recorded(model, prompts):
    x, sigma = random(1, 48, 8, 12), torch.tensor([SIGMA], dtype=torch.float64)
    tap = taps(model)
    model(x, sigma, prompts[0], tap.options())
    first = tap.calls[0].stages[feature_blocks(model.unet)[0]]
    model(2 * x, sigma, prompts[0], tap.options({RECOMPUTE: True}))
    assert len(tap.calls) == 1
    assert tap.calls[0].stages[feature_blocks(model.unet)[0]] is first


def test_stacked_conditions_are_told_apart(model, prompts):
    x = random(2, 48, 8, 12)
    tap = taps(model)
    both = torch.cat([prompts[0].expand(2, -1, -1), prompts[1].expand(2, -1, -1)])
    model(
        x.repeat(2, 1, 1, 1),
        torch.full((4,), SIGMA).double(),
        both,
        tap.options({"cond_or_uncond": [0, 0], "uuids": ["a", "b"]}),
    )
    seen = tap.read((8, 12))
    assert {prompt: s.count for prompt, s in seen.items()} == {"a": 2, "b": 2}
    assert tap.calls == []
    assert torch.allclose(seen["b"].maps[0], features(model, x, SIGMA, prompts[1]).maps[0], atol=1e-6)


def test_calls_of_areas_and_calls_that_failed_are_left_out(model, prompts):
    tap = taps(model)
    sigma = torch.tensor([SIGMA], dtype=torch.float64)

    def fails(h, skip, options):
        if options["block"][1] == 3:
            raise RuntimeError("somebody's patch")
        return h, skip

    for number, size in enumerate(((8, 12), (8, 8), (8, 12))):
        model(random(1, 48, *size), sigma, prompts[0], tap.options({"uuids": [number]}))
    base = {"patches": {"output_block_patch": [fails]}}
    with pytest.raises(RuntimeError, match="somebody"):
        model(random(1, 48, 8, 12), sigma, prompts[0], tap.options(base))
    seen = tap.read((8, 12))
    assert {number: tuple(s.stages[1].shape[2:]) for number, s in seen.items()} == {0: (8, 12), 2: (8, 12)}
    assert tap.calls == []


def test_the_cut_keeps_the_gradient_of_features_and_leaves_no_graph_behind_them(model, prompts):
    gradients = []
    for cut in (False, True):
        x = random(1, 48, 8, 12).requires_grad_()
        tap = taps(model, cut=cut)
        # The network's own output, without the path around it that scales x.
        out = model.unet(x, torch.tensor([300.0]).double(), prompts[0], tap.options())
        assert out.requires_grad == (not cut)
        (seen,) = tap.read((8, 12)).values()
        value = sum(f.square().sum() for f in seen.stages) + sum(m.square().sum() for m in seen.maps)
        gradients.append(torch.autograd.grad(value, x)[0])
    assert torch.equal(*gradients)


def test_the_energy_is_the_weighted_sum_of_its_terms(model, prompts, inversions):
    context, reference = inversions
    x = random(2, 48, 8, 12, seed=6)
    out = features(model, x, SIGMA, prompts[0])
    own = features(model, context.at(SIGMA), SIGMA, prompts[0])
    theirs = features(model, reference.at(SIGMA), SIGMA, prompts[1])
    terms = all_terms(context, reference, prompts[1])
    references = {terms[0].stream.key: {None: theirs}, terms[1].stream.key: {0: own}}
    total, by_name = total_energy(terms, {0: out}, references)

    expected = {"style": 0.0, "spatial": 0.0, "semantic": 0.0}
    for stage in range(2):
        f = out.stages[stage]
        matches = find_matches(f, theirs.stages[stage], 3.0)
        expected["style"] += 3.0 * style_feature_energy(f, theirs.stages[stage], matches) / 2
        expected["spatial"] += 0.9 * spatial_feature_energy(f, own.stages[stage]) / 2
        expected["semantic"] += 20.0 * semantic_distance(out.maps[stage], own.maps[stage]) / 2
    for name, value in expected.items():
        assert torch.allclose(by_name[name], value.mean(), rtol=1e-6), name
    assert torch.allclose(total, sum(v.sum() for v in expected.values()), rtol=1e-6)

    other = features(model, x, SIGMA, prompts[1])
    references[terms[1].stream.key] |= {1: other}
    both, _ = total_energy(terms, {0: out, 1: other}, references)
    alone, _ = total_energy(terms, {1: other}, references)
    assert torch.allclose(both, (total + alone) / 2), "combined prompts count with their mean, each against its own"
    kept, _ = total_energy(terms[1:], {1: other}, references)
    assert kept.abs().max() < 1e-9


def test_the_gradient_is_that_of_finite_differences(model, prompts, inversions):
    context, reference = inversions
    x = random(1, 48, 8, 12, seed=7)
    sigma = torch.tensor([SIGMA], dtype=torch.float64)
    terms = all_terms(context, reference, prompts[1])
    references = {
        terms[0].stream.key: {None: features(model, reference.at(SIGMA), SIGMA, prompts[1])},
        terms[1].stream.key: {None: features(model, context.at(SIGMA), SIGMA, prompts[0])},
    }
    tap = taps(model, cut=True)
    denoised, gradient, _ = energy_gradient(
        x, SIGMA, terms, lambda x: model(x, sigma, prompts[0], tap.options()), tap, references
    )
    assert torch.equal(denoised, model(x, sigma, prompts[0]))
    assert not denoised.requires_grad

    styled = references[terms[0].stream.key][None]
    fixed = [find_matches(f, r, 3.0) for f, r in zip(features(model, x, SIGMA, prompts[0]).stages,
                                                     styled.stages, strict=True)]  # fmt: skip

    def energy(x):
        out = features(model, x, SIGMA, prompts[0])
        style = [style_feature_energy(f, r, m) for f, r, m in
                 zip(out.stages, styled.stages, fixed, strict=True)]  # fmt: skip
        rest, _ = total_energy(terms[1:], {0: out}, references)
        return 3.0 * sum(style) / 2 + rest

    direction = random(1, 48, 8, 12, seed=8)
    h = 1e-4
    slope = (energy(x + h * direction) - energy(x - h * direction)) / (2 * h)
    assert torch.allclose((gradient * direction).sum(), math.sqrt(1 + SIGMA**2) * slope, rtol=2e-4)


def test_nothing_pulls_where_picture_context_and_reference_are_one(model, prompts, inversions):
    context, _ = inversions
    terms = (*all_terms(context, context)[1:], StyleTerm(Stream(context), 3.0, position_weight=3.0))
    x, sigma = context.at(SIGMA), torch.tensor([SIGMA], dtype=torch.float64)
    own = features(model, x, SIGMA, prompts[0])
    tap = taps(model, cut=True)
    _, gradient, energies = energy_gradient(
        x, SIGMA, terms, lambda x: model(x, sigma, prompts[0], tap.options()), tap, {Stream(context).key: {None: own}}
    )
    assert max(e.abs().max() for e in energies.values()) < 1e-9
    assert gradient.abs().max() < 1e-9


def test_energies_add_and_act_in_their_range(inversions):
    context, reference = inversions
    style, spatial, semantic = all_terms(context, reference)
    late = SpatialTerm(Stream(context), 2.0, start=0.5, end=0.75)
    energy = Energy((style, spatial)) + Energy((late, SemanticTerm(Stream(reference), 0.0)))
    assert [t.name for t in energy.terms] == ["style", "spatial", "spatial", "semantic"]
    assert len(energy.streams) == 2
    assert not energy.needs_maps
    assert (energy + Energy((semantic,))).needs_maps

    def level(part):
        return 10.0 * (1 - part)

    assert active_terms(energy, 5.0, level) == (style, spatial, late)
    assert active_terms(energy, 2.5, level) == (style, spatial, late)
    assert active_terms(energy, 2.4, level) == active_terms(energy, 5.1, level) == (style, spatial)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, "0 or more"),
        ({"weight": math.nan}, "0 or more"),
        ({"weight": 1.0, "start": 0.6, "end": 0.5}, "start not after end"),
        ({"weight": 1.0, "end": 1.5}, "between 0 and 1"),
    ],
)
def test_terms_refuse_what_makes_no_sense(inversions, settings, message):
    with pytest.raises(ValueError, match=message):
        SpatialTerm(Stream(inversions[0]), **settings)


def test_a_terms_maps_must_fit_the_pictures(inversions):
    _, reference = inversions
    labels = torch.zeros(3, 8, 12, dtype=torch.int64)
    with pytest.raises(ValueError, match="3 content maps for 1 pictures"):
        StyleTerm(Stream(reference), 1.0, regions=SemanticMap(labels, labels[:1])).check_fits((1, 48, 8, 12))
    with pytest.raises(ValueError, match="3 style maps for 1 references"):
        StyleTerm(Stream(reference), 1.0, regions=SemanticMap(labels, labels)).check_fits((3, 48, 8, 12))


def test_masks_of_the_style_term(model, prompts, inversions):
    """Positions outside the content_mask have no part, and nothing outside the style_mask is matched."""
    _, reference = inversions
    out = features(model, random(1, 48, 8, 12, seed=9), SIGMA, prompts[0])
    theirs = features(model, reference.at(SIGMA), SIGMA, prompts[1])
    content_mask, style_mask = torch.zeros(1, 16, 24), torch.zeros(1, 24, 32)
    content_mask[:, :, :10], style_mask[:, 12:] = 0.5, 1.0
    term = StyleTerm(Stream(reference), 1.0, content_mask=content_mask, style_mask=style_mask)
    expected = []
    for f, r in zip(out.stages, theirs.stages, strict=True):
        below = torch.arange(r.shape[2] // 2 * r.shape[3], r.shape[2] * r.shape[3])
        on_grid = mask_on_grid(content_mask, (f.shape[2], f.shape[3]))
        expected.append(style_feature_energy(f, r, find_matches(f, r, 3.0, within=(below,)), on_grid))
    assert torch.equal(term.value(out, theirs, None, Resampled()), (expected[0] + expected[1]) / 2)
    everywhere = StyleTerm(Stream(reference), 1.0, content_mask=torch.ones(1, 5, 3), style_mask=torch.ones(1, 2, 2))
    plain = StyleTerm(Stream(reference), 1.0).value(out, theirs, None, Resampled())
    assert torch.allclose(everywhere.value(out, theirs, None, Resampled()), plain, rtol=1e-12)


def test_a_speck_of_a_style_mask_is_matched_at_every_stage(model, prompts, inversions):
    _, reference = inversions
    out = features(model, random(1, 48, 8, 12, seed=9), SIGMA, prompts[0])
    theirs = features(model, reference.at(SIGMA), SIGMA, prompts[1])
    speck = torch.zeros(1, 96, 128)
    speck[0, 50, 70] = 0.1
    expected = []
    for f, r in zip(out.stages, theirs.stages, strict=True):
        place = 50 * r.shape[2] // 96 * r.shape[3] + 70 * r.shape[3] // 128
        expected.append(style_feature_energy(f, r, torch.full((1, f.shape[2:].numel()), place)))
    value = StyleTerm(Stream(reference), 1.0, style_mask=speck).value(out, theirs, None, Resampled())
    assert torch.equal(value, (expected[0] + expected[1]) / 2)


def test_masks_of_the_style_term_must_fit_and_have_something(inversions):
    _, reference = inversions
    masks = torch.ones(2, 8, 12)
    with pytest.raises(ValueError, match="2 content_masks for 1 pictures"):
        StyleTerm(Stream(reference), 1.0, content_mask=masks).check_fits((1, 48, 8, 12))
    with pytest.raises(ValueError, match="2 style_masks for 1 references"):
        StyleTerm(Stream(reference), 1.0, style_mask=masks).check_fits((2, 48, 8, 12))
    for name in ("content_mask", "style_mask"):
        with pytest.raises(ValueError, match=rf"the {name} is empty.* Paint the part"):
            StyleTerm(Stream(reference), 1.0, **{name: torch.zeros(1, 8, 12)})
    masks[1] = 0.0
    with pytest.raises(ValueError, match=r"number 2 of the 2 style_masks is empty.* Paint the part"):
        StyleTerm(Stream(reference), 1.0, style_mask=masks)
    StyleTerm(Stream(reference), 1.0, content_mask=masks).check_fits((2, 48, 8, 12))


def test_regions_without_matches_are_noted(inversions):
    _, reference = inversions
    content, style = torch.zeros(1, 8, 12, dtype=torch.int64), torch.zeros(1, 12, 16, dtype=torch.int64)
    content[:, 4:], content[:, :, 6:], style[:, :, 8:] = 1, 2, 2
    regions, right = SemanticMap(content, style), torch.zeros(1, 12, 16)
    right[:, :, 8:] = 1.0
    shape = (1, 48, 8, 12)
    (note,) = StyleTerm(Stream(reference), 1.0, regions=regions).notes(shape)
    assert note.startswith("region 1 of the content has no position in the reference on")
    (note,) = StyleTerm(Stream(reference), 1.0, regions=regions, style_mask=right).notes(shape)
    assert note.startswith("regions 0, 1 of the content have no position in the reference's style_mask on")
    assert not StyleTerm(Stream(reference), 1.0, style_mask=right).notes(shape)
    outside = {"content_mask": right, "style_mask": right}
    assert not StyleTerm(Stream(reference), 1.0, regions=regions, **outside).notes(shape), "nothing of them is drawn"


def test_windows_of_a_clip_take_their_frames_masks(model, prompts, inversions):
    _, reference = inversions
    out = features(model, random(2, 48, 8, 12, seed=9), SIGMA, prompts[0])
    theirs = features(model, reference.at(SIGMA), SIGMA, prompts[1])
    masks = random(3, 8, 12, seed=10).sigmoid()
    whole = StyleTerm(Stream(reference), 1.0, content_mask=masks)
    chosen = StyleTerm(Stream(reference), 1.0, content_mask=masks[[2, 0]])
    resampled = Resampled()
    assert torch.equal(whole.value(out, theirs, (2, 0), resampled), chosen.value(out, theirs, None, resampled))
    assert not torch.equal(whole.value(out, theirs, (0, 2), resampled), chosen.value(out, theirs, None, resampled))


def test_windows_of_a_clip_take_their_frames_maps(model, prompts, inversions):
    _, reference = inversions
    out = features(model, random(2, 48, 8, 12, seed=9), SIGMA, prompts[0])
    theirs = features(model, reference.at(SIGMA), SIGMA, prompts[1])
    labels = torch.stack([torch.zeros(8, 12), torch.ones(8, 12), torch.arange(96).reshape(8, 12) % 2]).long()
    style = torch.arange(12 * 16).reshape(1, 12, 16) % 2
    whole = StyleTerm(Stream(reference), 1.0, regions=SemanticMap(labels, style))
    chosen = StyleTerm(Stream(reference), 1.0, regions=SemanticMap(labels[[2, 0]], style))
    resampled = Resampled()
    assert torch.equal(whole.value(out, theirs, (2, 0), resampled), chosen.value(out, theirs, None, resampled))
    assert not torch.equal(whole.value(out, theirs, (0, 2), resampled), chosen.value(out, theirs, None, resampled))


def test_the_clamp_is_on_the_sum_and_is_reported():
    gradient = torch.tensor([[[[-3.0, 0.5, 0.0, 1.5]]]])
    g, report = clamped(gradient, 2.0, {"style": torch.tensor(1.0)}, 0, torch.float32, FiniteWatch())
    assert g.flatten().tolist() == [-1.0, 0.5, 0.0, 1.0]
    assert report.saturated == 0.5
    assert report.size == 1.25
    with pytest.raises(FloatingPointError, match=r"step 7, sigma 2, with the model in torch.float16"):
        clamped(gradient * math.nan, 2.0, {}, 7, torch.float16, FiniteWatch())


def test_the_step_of_a_level():
    sigmas = [8.0, 4.0, 2.0, 0.0]
    levels = {9.0: 0, 8.0: 0, 5.0: 0, 4.0 * (1 + 1e-6): 1, 4.0: 1, 2.5: 1, 2.0: 2, 0.1: 2}
    assert {level: step_of(level, sigmas) for level in levels} == levels


def test_a_guided_replay_lowers_what_it_weighs(model, prompts, inversions):
    context, reference = inversions
    terms = all_terms(context, reference, prompts[1])
    reports = []

    def guided(x, sigma):
        level, tap = float(sigma[0]), taps(model, cut=True)
        streams = {t.stream.key: (t.stream, prompts[0] if t.stream.conditioning is None else prompts[1]) for t in terms}
        theirs = {
            k: {None: features(model, s.inversion.at(level), level, prompt)} for k, (s, prompt) in streams.items()
        }
        denoised, gradient, energies = energy_gradient(
            x, level, terms, lambda x: model(x, sigma, prompts[0], tap.options()), tap, theirs
        )
        g, report = clamped(gradient, level, energies, len(reports), x.dtype, FiniteWatch())
        reports.append(report)
        unguided = model(x, sigma, prompts[1])
        return with_guidance(unguided + 1.5 * (denoised - unguided), g, level)

    out = replay(guided, context.trajectory[0], LEVELS, inversion=context)
    assert [r.sigma for r in reports] == pytest.approx(LEVELS[:-1].tolist())
    # At the start the picture is the context; what the style does to it then shows.
    assert reports[0].energies["spatial"] < 1e-9 < reports[-1].energies["spatial"]

    level = 0.2
    theirs = features(model, reference.at(level), level, prompts[1])

    def style(clean):
        f = features(model, clean + level * context.noise_at(3), level, prompts[0])
        return terms[0].value(f, theirs, None, Resampled()).item()

    assert style(out) < style(context.clean)


def test_adain_follows_the_published_steps(model, prompts, inversions):
    context, reference = inversions
    guided = model.guided(*prompts, cfg=1.5)
    levels = []

    class Watched(StepAdaIN):
        def __call__(self, x, step, sigma):
            out = super().__call__(x, step, sigma)
            levels.append((step, bool((out != x).any())))
            if levels[-1][1]:
                at = reference.at(sigma)
                assert torch.allclose(out.mean(dim=(2, 3)), at.mean(dim=(2, 3)))
                assert torch.allclose(out.std(dim=(2, 3), correction=0), at.std(dim=(2, 3), correction=0), rtol=1e-4)
            return out

    replay(guided, context.trajectory[0], LEVELS, inversion=context, after_step=Watched(reference, 4, 1 / 3))
    assert levels == [(0, False), (1, True), (2, True)]
    off = replay(guided, context.trajectory[0], LEVELS, inversion=context, after_step=StepAdaIN(reference, 4, 1.0))
    assert torch.allclose(off, context.clean, atol=1e-9)
    with pytest.raises(ValueError, match="between 0 and 1"):
        StepAdaIN(reference, 4, 1.5)
    with pytest.raises(ValueError, match="as many channels"):
        StepAdaIN(reference, 4).check_fits((1, 4, 8, 12))


def test_rows_and_sizes_of_features():
    whole = Features((torch.arange(6.0).reshape(3, 2, 1, 1),), (torch.zeros(3, 1, 2),))
    assert whole.count == 3
    assert whole.bytes == 4 * 12
    assert whole.rows([2, 0]).stages[0][:, 0, 0, 0].tolist() == [4.0, 0.0]
