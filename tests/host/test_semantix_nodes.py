"""Semantix's nodes as a user's graph runs them, on a small random UNet shaped like SD1.5."""

from dataclasses import replace

import comfy.model_management
import comfy.samplers
import comfy.utils
import pytest
import torch
from comfy_extras.nodes_custom_sampler import CFGGuider, SamplerCustomAdvanced
from semantic_style.benchmarks.random_models import conditioning, small_sd15
from semantic_style.host.energy_guider import EnergyGuider
from semantic_style.host.reference_cache import CACHE
from semantic_style.nodes import nodes_semantix
from semantic_style.nodes.nodes_adain import ReplayAdaIN
from semantic_style.nodes.nodes_inversion import DDIMInversion, DDPMInversion, Replay
from semantic_style.nodes.nodes_semantix import AS_SET, CombineEnergies, Guider, KSampler, SemantixEnergy
from semantic_style.regions.adain import adain_latents
from semantic_style.regions.semantic_map import SemanticMap
from semantic_style.samplers.replay import replay
from semantic_style.samplers.step_adain import StepAdaIN
from semantic_style.samplers.terms import Energy

pytestmark = pytest.mark.usefixtures("one_thread", "as_the_host_runs_nodes")

PROMPT, EMPTY = conditioning(1), conditioning(2)
CFG, STEPS = 3.5, 4
SD15_SCALE = 0.18215
SETTINGS = {"cfg": CFG, "weights": AS_SET}
WEIGHTS = {"style_weight": 3.0, "spatial_weight": 0.9, "semantic_weight": 1.0, "position_weight": 3.0}
MIDDLE = {"start_percent": 0.2, "end_percent": 0.7}
NO_WEIGHTS = dict.fromkeys(WEIGHTS, 0.0)


@pytest.fixture(scope="module")
def model():
    return small_sd15()


@pytest.fixture(scope="module")
def context(model):
    return invert(model, latent(1, 4, 8, 8), PROMPT, CFG)


@pytest.fixture(scope="module")
def reference(model):
    return invert(model, latent(1, 4, 8, 12, seed=1), EMPTY, 1.0)


@pytest.fixture
def evaluations(model):
    """Rows of every call of the network."""
    rows = []
    handle = model.model.diffusion_model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    yield rows
    handle.remove()


def latent(*shape, seed=0):
    return {"samples": torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / SD15_SCALE}


def invert(model, image, prompt, cfg, steps=STEPS):
    return DDPMInversion.execute(model, prompt, EMPTY, image, steps, "normal", cfg, 7).args[0]


def transfer(model, context, reference, **settings):
    """Latent, plot and report of the one node."""
    settings = {"positive": PROMPT, "negative": EMPTY, **SETTINGS, **WEIGHTS, **settings}
    out, plot, report = KSampler.execute(model=model, context=context, reference=reference, **settings).args
    return out["samples"], plot, report


def energy(context, reference, **settings):
    settings = {"weights": AS_SET, **WEIGHTS, "start_percent": 0.0, "end_percent": 1.0, **settings}
    return SemantixEnergy.execute(context, reference, **settings).args[0]


def sample(guider, context, mask=None, skip=0, adains=(), **settings):
    noise, sampler, sigmas, image = Replay.execute(context, skip, True, **settings).args
    for adain in adains:
        (sampler,) = ReplayAdaIN.execute(sampler, **adain).args
    if mask is not None:
        image = {**image, "noise_mask": mask}
    return SamplerCustomAdvanced().sample(noise, guider, sampler, sigmas, image)[0]["samples"]


def guided(model, context, an_energy, **settings):
    """What a graph of the separate nodes gives."""
    (guider,) = Guider.execute(model, PROMPT, EMPTY, CFG, an_energy).args
    return sample(guider, context, **settings)


def plain(model, context, **settings):
    (guider,) = CFGGuider().get_guider(model, PROMPT, EMPTY, CFG)
    return sample(guider, context, **settings)


def difference(out, context):
    """Largest one, in the model's coordinates."""
    return float((out - context.to_outer(context.clean)).abs().max() * SD15_SCALE)


def halves(count=1, height=8, width=8):
    labels = torch.zeros(count, height, width, dtype=torch.int64)
    labels[:, height // 2 :] = 1
    return labels


@pytest.mark.parametrize("start", [0.0, 1 / 3, 0.5])
@pytest.mark.parametrize("regions", [None, SemanticMap(halves(), halves(width=12))])
def test_adain_in_a_replay_is_the_pure_function_s(model, context, reference, start, regions):
    (guider,) = CFGGuider().get_guider(model, PROMPT, EMPTY, CFG)
    out = sample(guider, context, adain_reference=reference, adain_start=start, semantic_map=regions)
    seen = []

    def denoise(x, sigma):
        """One call of the guider for the pure replay, from outside the host's sampling loop."""
        step = len(seen)
        seen.append(x)
        return recorded[step]

    recorded = predictions(model, context, adain_reference=reference, adain_start=start, semantic_map=regions)
    adain = StepAdaIN(reference, context.steps, start, regions)
    expected = replay(denoise, context.trajectory[0], context.sigmas, inversion=context, after_step=adain)
    torch.testing.assert_close(context.to_inner(out), expected, rtol=0, atol=1e-5)
    # After the steps that have one, the latent's statistics are the reference's.
    first = round(start * context.steps)
    for step in range(1, context.steps):
        wanted = adain_latents(seen[step], reference.trajectory[step], regions)
        assert torch.allclose(seen[step], wanted, atol=1e-3) == (step > first)


def predictions(model, context, **settings):
    """What the model predicted at every step of a replay."""
    found = []
    watched = model.clone()

    def watch(args):
        found.append(args["denoised"].clone())
        return args["denoised"]

    watched.set_model_sampler_post_cfg_function(watch)
    plain(watched, context, **settings)
    return found


def test_a_replay_with_adain_off_is_the_replay_without(model, context, reference):
    expected = plain(model, context)
    assert torch.equal(plain(model, context, adain_reference=reference, adain_start=1.0), expected)
    assert difference(expected, context) < 1e-4
    assert difference(plain(model, context, adain_reference=reference), context) > 0.1


@pytest.mark.parametrize(
    ("settings", "energy_settings", "replay_settings"),
    [
        ({}, {}, {}),
        ({"weights": "published for video"}, {"weights": "published for video"}, {}),
        (
            {"skip": 1, "start_percent": 0.2, "end_percent": 0.7},
            {"start_percent": 0.2, "end_percent": 0.7},
            {"skip": 1},
        ),
    ],
)
def test_the_one_node_is_the_graph_of_its_parts(model, context, reference, settings, energy_settings, replay_settings):
    regions = SemanticMap(halves(), halves(width=12))
    out, _, _ = transfer(model, context, reference, adain_start=0.5, semantic_map=regions, **settings)
    parts = energy(context, reference, semantic_map=regions, **energy_settings)
    adain = {"adain_reference": reference, "adain_start": 0.5, "semantic_map": regions}
    assert torch.equal(out, guided(model, context, parts, **adain, **replay_settings))
    assert difference(out, context) > 0.1


def part(height, width, rows=slice(None), columns=slice(None)):
    mask = torch.zeros(1, height, width)
    mask[:, rows, columns] = 1.0
    return mask


def test_masks_of_the_one_node_are_those_of_its_parts(model, context, reference):
    where = {"content_mask": part(64, 64, columns=slice(32)), "style_mask": part(64, 96, rows=slice(24, 64))}
    where["semantic_map"] = SemanticMap(halves(), halves(width=12))
    out, _, report = transfer(model, context, reference, adain_start=0.5, **where)
    adain = {"reference": reference, "adain_start": 0.5, **where}
    assert torch.equal(out, guided(model, context, energy(context, reference, **where), adains=[adain]))
    for name in where:
        left_out = {n: v for n, v in where.items() if n != name}
        assert not torch.allclose(out, transfer(model, context, reference, adain_start=0.5, **left_out)[0], atol=0.01)
    assert "no position" not in report
    where["style_mask"] = part(64, 96, rows=slice(32, 64))
    _, _, report = transfer(model, context, reference, adain_start=0.5, **where)
    assert "Note: region 0 of the content has no position in the reference's style_mask" in report


def test_a_content_mask_with_a_noise_mask_of_the_same_part(model, context, reference):
    left = part(64, 64, columns=slice(32))
    both, _, _ = transfer(model, context, reference, content_mask=left, mask=left)
    assert (both - context.to_outer(context.clean))[..., 4:].abs().max() * SD15_SCALE < 1e-5
    assert difference(both, context) > 0.1
    (free, _, _) = transfer(model, context, reference, content_mask=left)
    assert (free - context.to_outer(context.clean))[..., 4:].abs().max() * SD15_SCALE > 1e-3


def test_two_references_on_two_parts_cost_one_call_more_a_level(model, context, reference, evaluations):
    other = invert(model, latent(1, 4, 10, 8, seed=3), EMPTY, 1.0)
    left, right = part(64, 64, columns=slice(32)), part(64, 64, columns=slice(32, 64))
    parts = [
        energy(context, reference, content_mask=left, style_mask=part(64, 96, rows=slice(32))),
        energy(context, other, content_mask=right, spatial_weight=0.0, semantic_weight=0.0),
    ]
    (both,) = CombineEnergies.execute(*parts).args
    assert len(both.streams) == 3
    CACHE.clear()
    evaluations.clear()
    out = guided(model, context, both)
    # The picture's with gradient and the negative's, the context's, and one for each reference.
    assert len(evaluations) == (2 + 1 + 2) * STEPS
    evaluations.clear()
    assert torch.equal(guided(model, context, both), out)
    assert len(evaluations) == 2 * STEPS
    (swapped,) = CombineEnergies.execute(*reversed(parts)).args
    torch.testing.assert_close(guided(model, context, swapped), out, rtol=0, atol=1e-4 / SD15_SCALE)
    assert not torch.allclose(guided(model, context, parts[0]), out, atol=0.01)


def test_adains_along_a_replay_act_each_in_its_part(model, context, reference):
    other = invert(model, latent(1, 4, 10, 8, seed=3), EMPTY, 1.0)
    left, right = part(64, 64, columns=slice(32)), part(64, 64, columns=slice(32, 64))
    adains = [
        {"reference": reference, "adain_start": 0.0, "content_mask": left},
        {"reference": other, "adain_start": 0.5, "content_mask": right, "style_mask": part(80, 64, rows=slice(40))},
    ]
    out = plain(model, context, adains=adains)
    recorded = iter(predictions(model, context, adains=adains))

    def after_step(x, step, sigma):
        x = torch.cat([adain_latents(x[..., :4], reference.trajectory[step + 1]), x[..., 4:]], dim=-1)
        if step < STEPS // 2:
            return x
        top = other.trajectory[step + 1][:, :, :5]
        return torch.cat([x[..., :4], adain_latents(x[..., 4:], top)], dim=-1)

    start = context.trajectory[0]
    expected = replay(lambda x, s: next(recorded), start, context.sigmas, inversion=context, after_step=after_step)
    torch.testing.assert_close(context.to_inner(out), expected, rtol=0, atol=1e-5)
    assert torch.equal(plain(model, context, adains=adains[:1]), plain(model, context, adains=[adains[0], off(other)]))
    whole = {"adain_reference": reference, "adain_start": 0.5}
    one = {"reference": reference, "adain_start": 0.5}
    assert torch.equal(plain(model, context, **whole), plain(model, context, adains=[one]))


def off(reference):
    return {"reference": reference, "strength": 0.0}


def test_adain_along_something_else_is_refused(reference):
    with pytest.raises(ValueError, match="connect the SAMPLER of Replay Inversion"):
        ReplayAdaIN.execute(comfy.samplers.sampler_object("euler"), reference)


def test_published_weights_are_the_papers_numbers(context, reference):
    def numbers(weights):
        style, spatial, semantic = energy(context, reference, weights=weights, **NO_WEIGHTS).terms
        return style.weight, spatial.weight, semantic.weight, style.position_weight

    assert numbers("published for images") == (3.0, 0.9, 1.0, 3.0)
    assert numbers("published for video") == (6.0, 3.0, 5.0, 3.0)
    assert numbers(AS_SET) == (0.0, 0.0, 0.0, 0.0)
    defaults = {i.id: i.default for i in KSampler.define_schema().inputs if hasattr(i, "default")}
    assert [defaults[name] for name in WEIGHTS] == [3.0, 0.9, 1.0, 3.0]
    assert defaults["cfg"] == 3.5


@pytest.mark.parametrize("node", [KSampler, Replay])
def test_adain_begins_after_exactly_a_third_of_any_number_of_steps(reference, node):
    (start,) = (i.default for i in node.define_schema().inputs if i.id == "adain_start")
    for steps in range(1, 201):
        adain = StepAdaIN(reference, steps, start)
        x = torch.zeros(1, 4, 8, 8)
        acts = [adain(x, step, torch.tensor(1.0)) is not x for step in range(steps)]
        assert acts.index(True) == adain.first == round(steps / 3), steps


def test_other_starts_are_what_they_say(reference):
    first = {start: StepAdaIN(reference, 1000, start).first for start in (0.0, 0.25, 0.32, 0.34, 0.67, 1.0)}
    assert first == {0.0: 0, 0.25: 250, 0.32: 320, 0.34: 340, 0.67: 667, 1.0: 1000}


def test_a_preset_gives_the_picture_of_its_numbers(model, context, reference):
    by_name, _, _ = transfer(model, context, reference, weights="published for images", **NO_WEIGHTS)
    assert torch.equal(by_name, transfer(model, context, reference)[0])


@pytest.mark.parametrize("exact", [True, False])
def test_without_weights_and_adain_the_context_comes_back(model, context, reference, exact):
    out, plot, report = transfer(model, context, reference, adain_start=1.0, exact=exact, **NO_WEIGHTS)
    assert (difference(out, context) < 1e-4) == exact
    assert "changed nothing: all weights are 0" in report
    assert "AdaIN off" in report
    assert plot.shape == (1, 600, 900, 3)


def test_a_range_without_steps_is_said(model, context, reference):
    run = {"start_percent": 0.5, "end_percent": 0.5, "adain_start": 1.0}
    out, empty, report = transfer(model, context, reference, **run)
    assert "no step of this run lies in" in report
    assert difference(out, context) < 1e-4
    _, plot, report = transfer(model, context, reference)
    assert "changed nothing" not in report
    assert "4 guided steps" in report
    assert not torch.equal(plot, empty)


def test_what_fails_after_sampling_does_not_lose_the_latent(model, context, reference, monkeypatch, caplog):
    expected, _, report = transfer(model, context, reference)

    def broken(*_):
        raise OSError("cannot open resource")

    monkeypatch.setattr("PIL.ImageFont.load_default", broken)
    out, plot, told = transfer(model, context, reference)
    assert torch.equal(out, expected)
    assert plot.shape == (1, 600, 900, 3)
    assert told.splitlines()[0] == report.splitlines()[0]
    assert told.endswith("\nThe plot failed (OSError: cannot open resource); the rest of the result is complete.")
    monkeypatch.setattr(nodes_semantix, "describe", broken)
    out, _, told = transfer(model, context, reference)
    assert torch.equal(out, expected)
    assert "The report failed (OSError: cannot open resource)" in told
    assert "The plot failed" in caplog.text
    assert "The report failed" in caplog.text


def test_the_report_names_what_makes_it_an_edit(model, context, reference):
    assert "inverted with another" not in transfer(model, context, reference)[2]
    other = {"positive": conditioning(5), "cfg": 2.0}
    assert "another CFG (3.5) and another positive prompt" in transfer(model, context, reference, **other)[2]


def test_plot_values_are_a_picture(model, context, reference):
    _, plot, _ = transfer(model, context, reference)
    assert plot.dtype == torch.float32
    assert 0.0 <= plot.min() < 0.5 < plot.max() <= 1.0


def test_a_mask_keeps_the_rest_exactly(model, context, reference):
    mask = torch.zeros(1, 64, 64)
    mask[..., 32:] = 1.0
    out, _, _ = transfer(model, context, reference, mask=mask)
    kept = context.to_outer(context.clean)[..., :4]
    assert (out[..., :4] - kept).abs().max() * SD15_SCALE < 1e-5
    assert difference(out, context) > 0.1
    parts = {"adain_reference": reference, "mask": mask[:, None]}
    assert torch.equal(out, guided(model, context, energy(context, reference), **parts))


def test_the_same_run_twice_and_in_another_order(model, context, reference, evaluations):
    first = {"style_weight": 6.0}
    alone = [transfer(model, context, reference, **s)[0] for s in ({}, first)]
    evaluations.clear()
    again = [transfer(model, context, reference, **s)[0] for s in (first, {})]
    assert torch.equal(alone[0], again[1])
    assert torch.equal(alone[1], again[0])
    assert not torch.equal(*alone)
    # The references come from the cache: two rows per step, the picture's with gradient and the negative's.
    assert sum(evaluations) == 2 * 2 * STEPS


def test_several_pictures_with_one_reference_or_one_for_each(model, reference):
    two = invert(model, latent(2, 4, 8, 8), PROMPT, CFG)
    out, _, _ = transfer(model, two, reference)
    assert out.shape == (2, 4, 8, 8)
    both = invert(model, latent(2, 4, 6, 8, seed=3), EMPTY, 1.0)
    other, _, _ = transfer(model, two, both)
    assert not torch.allclose(out, other, atol=0.01)
    regions = SemanticMap(halves(2), halves(2, 6))
    assert torch.isfinite(transfer(model, two, both, semantic_map=regions)[0]).all()


def test_energies_add(model, context, reference):
    whole = energy(context, reference)
    parts = [
        energy(context, reference, **{**NO_WEIGHTS, name: WEIGHTS[name], "position_weight": 3.0})
        for name in ("style_weight", "spatial_weight", "semantic_weight")
    ]
    (three,) = CombineEnergies.execute(*parts).args
    (two,) = CombineEnergies.execute(*parts[:2]).args
    assert (len(three.terms), len(two.terms)) == (9, 6)
    assert len(three.streams) == 2
    out = guided(model, context, whole)
    torch.testing.assert_close(guided(model, context, three), out, rtol=0, atol=1e-4 / SD15_SCALE)
    assert not torch.allclose(guided(model, context, two), out, atol=1e-3 / SD15_SCALE)


def test_ddim_inversions_do(model, reference):
    image = latent(1, 4, 8, 8)
    context = DDIMInversion.execute(model, PROMPT, EMPTY, image, STEPS, "normal", CFG, 0).args[0]
    out, _, report = transfer(model, context, reference)
    assert torch.isfinite(out).all()
    assert "4 guided steps" in report


def test_the_prompt_of_a_reference_can_be_given(model, context, reference):
    nameless = replace(reference, positive=None, negative=None)
    with pytest.raises(ValueError, match=r"connect that prompt .* to reference_prompt"):
        transfer(model, context, nameless)
    out, _, _ = transfer(model, context, nameless, reference_prompt=EMPTY)
    assert torch.equal(out, transfer(model, context, reference)[0])
    other, _, _ = transfer(model, context, reference, reference_prompt=conditioning(9))
    assert not torch.equal(out, other)


@pytest.fixture
def react(monkeypatch):
    """What is done at every step that the host's progress hook is told of."""
    # Newer hosts report ten times a second at most.
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0.0, raising=False)
    steps = []

    class React:
        def __call__(self, value):
            """Called with the number of the step."""

    reaction = [React()]

    def hook(value, total, preview, **_):
        steps.append((value, total))
        reaction[0](value)

    comfy.utils.set_progress_bar_global_hook(hook)
    yield steps, reaction
    comfy.utils.set_progress_bar_global_hook(None)
    comfy.model_management.interrupt_current_processing(False)


def test_cancel_leaves_nothing_behind(model, context, reference, react):
    steps, reaction = react
    stock, expected = plain(model, context), transfer(model, context, reference)[0]
    steps.clear()
    reaction[0] = lambda value: comfy.model_management.interrupt_current_processing(value == 2)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        transfer(model, context, reference)
    assert steps == [(1, STEPS), (2, STEPS)]
    reaction[0] = lambda value: None
    assert torch.equal(plain(model, context), stock)
    assert torch.equal(transfer(model, context, reference)[0], expected)


def test_checkpointing_is_the_same_picture(model, context, reference):
    out, _, _ = transfer(model, context, reference, checkpointing=True)
    torch.testing.assert_close(out, transfer(model, context, reference)[0], rtol=0, atol=1e-4 / SD15_SCALE)


def test_inputs_are_untouched(model, context, reference):

    def tensors():
        return context.trajectory, context.noise_maps, reference.trajectory, PROMPT[0][0]

    before = [t.clone() for t in tensors()]
    options = repr(model.model_options)
    transfer(model, context, reference)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(), strict=True))
    assert repr(model.model_options) == options
    assert PROMPT[0][1] == {}


def test_bad_inputs_are_refused_before_any_work(model, context, reference, evaluations):
    other_model = small_sd15(seed=5)
    elsewhere = invert(other_model, latent(1, 4, 8, 8), PROMPT, CFG)
    smaller = invert(model, latent(1, 4, 6, 8), PROMPT, CFG)
    two = invert(model, latent(2, 4, 8, 8), PROMPT, CFG)
    doubled = {n: getattr(reference, n).repeat_interleave(2, dim=-3) for n in ("clean", "trajectory", "noise_maps")}
    wide = replace(reference, residual=None, scale=None, shift=None, **doubled)
    sdxl = replace(reference, latent_format="SDXL")
    evaluations.clear()
    nan, minus = float("nan"), -1.0
    adain = {"adain_reference": reference, "adain_start": 0.0}

    def run(**settings):
        return transfer(model, **{"context": context, "reference": reference, **settings})

    def with_map(content, style, **settings):
        return run(semantic_map=SemanticMap(content, style), **settings)

    for call, message in (
        (lambda: run(style_weight=nan), "style weight must be a number from 0 on, got nan"),
        (lambda: run(spatial_weight=minus), "spatial weight"),
        (lambda: run(semantic_weight=float("inf")), "semantic weight"),
        (lambda: run(position_weight=nan), "position weight"),
        (lambda: run(weights="magic"), "choose one of as set below, published for images"),
        (lambda: run(start_percent=0.9, end_percent=0.1), "start not after end"),
        (lambda: run(adain_start=nan), "start must lie between 0 and 1"),
        (lambda: run(skip=STEPS), f"skip must be 0 to {STEPS - 1}"),
        (lambda: run(skip=-1), "skip must be 0"),
        (lambda: run(reference=wide), r"latent \[1, 8, 8, 12\].*same channels"),
        (lambda: run(reference=wide, **NO_WEIGHTS), r"AdaIN's reference holds a latent \[1, 8, 8, 12\]"),
        (lambda: run(reference=sdxl, **NO_WEIGHTS), "SDXL"),
        (lambda: run(reference=two), "one picture or as many as"),
        (lambda: run(reference=two, **NO_WEIGHTS), "one picture or as many as"),
        (lambda: run(reference=elsewhere), "another checkpoint"),
        (lambda: run(context=elsewhere), "another checkpoint"),
        (lambda: with_map(halves(3), halves(1)), "3 content maps for 1 pictures"),
        (lambda: with_map(halves(1), halves(3)), "3 style maps for 1 references"),
        (lambda: with_map(halves(3), halves(1), **NO_WEIGHTS), "3 content maps for 1 pictures"),
        (lambda: plain(model, context, **adain, semantic_map=SemanticMap(halves(3), halves(1))), "content labels"),
        (lambda: run(content_mask=part(64, 64, rows=slice(0))), "the content_mask is empty.* Paint the part"),
        (lambda: run(style_mask=part(64, 64, rows=slice(0))), "the style_mask is empty.* Paint the part"),
        (lambda: run(content_mask=torch.ones(2, 64, 64)), "2 content_masks for 1 pictures"),
        (lambda: run(style_mask=torch.ones(2, 64, 64)), "2 style_masks for 1 references"),
        (lambda: run(style_mask=torch.ones(2, 64, 64), **NO_WEIGHTS), "2 style_masks for 1 references"),
        (
            lambda: plain(model, context, adains=[{**off(reference), "style_mask": torch.ones(2, 8, 8)}]),
            "one is needed",
        ),
        (lambda: plain(model, context, adains=[off(two)]), "one picture or as many as"),
        (lambda: guided(model, context, energy(smaller, reference)), "same size"),
        (lambda: guided(model, context, energy(two, reference)), "one picture or as many as"),
        (lambda: guided(model, context, Energy(()), adain_reference=two), "one picture or as many as"),
        (lambda: plain(model, context, adain_reference=reference, adain_start=2.0), "between 0 and 1"),
        (lambda: transfer(small_sd15(model_type="FLOW"), context, reference), "is a flow model: what works with it"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not evaluations


def test_another_checkpoint_can_be_allowed(context, reference):
    other = small_sd15(seed=5)
    out, _, _ = transfer(other, context, reference, allow_other_model=True)
    assert torch.isfinite(out).all()


def test_guiders_of_one_graph_do_not_share_a_run(model, context, reference):
    """The host keeps a GUIDER and runs it again."""
    (guider,) = Guider.execute(model, PROMPT, EMPTY, CFG, energy(context, reference)).args
    assert isinstance(guider, EnergyGuider)
    reports = []
    guider.listen = reports.append
    first = sample(guider, context)
    assert torch.equal(sample(guider, context), first)
    assert [len(report.steps) for report in reports] == [STEPS, STEPS]
