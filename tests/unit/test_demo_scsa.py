"""SCSA on the demo model: one call for the references, what it equals, what its inversion leaves behind."""

import pytest
import torch
from semantic_style.attention.layers import self_attention_layers, transformer_block
from semantic_style.attention.regional_attention import order_by_region
from semantic_style.attention.scsa_attention import References, Settings, prepare, scsa
from semantic_style.attention.scsa_patch import block_inputs
from semantic_style.benchmarks.scsa_denoiser import Pictures, ScsaDenoiser, invert
from semantic_style.paperland import scenes
from semantic_style.paperland.model import Paperland, encode_pixels, sigmas_normal
from semantic_style.paperland.unet import UNetConfig
from semantic_style.regions.semantic_map import SemanticMap
from semantic_style.samplers.ddim_inversion import ddim_inversion
from semantic_style.samplers.replay import replay

SIZE, STEPS = (32, 24), 3
TINY = UNetConfig(channels=32, multipliers=(1, 1, 1), head_channels=8, context_channels=16)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    net = Paperland(TINY).double().eval().requires_grad_(False)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype))
    return net


def drawn(count, seed):
    found = [scenes.scene(seed + i, seed + 50 + i, SIZE) for i in range(count)]
    return torch.cat([s.images for s in found]).double(), torch.cat([s.labels for s in found])


class Run:
    """Two contents and their styles, inverted."""

    def __init__(self, model):
        self.model, self.empty = model, model.text([""])
        self.sigmas = sigmas_normal(STEPS).double()
        self.read = {}
        (content, content_labels), (style, style_labels) = drawn(2, 1), drawn(2, 9)
        self.regions = SemanticMap(content_labels, style_labels)
        maps = (scenes.label_image(labels).double() for labels in (content_labels, style_labels))
        self.pictures = Pictures(*(self.invert(images) for images in (content, style, *maps)))

    def invert(self, images):
        return invert(self.model, encode_pixels(images), self.sigmas, self.empty, self.read)

    def denoiser(self, settings=None, **changes):
        arguments = {"positive": self.empty, "read": self.read} | changes
        return ScsaDenoiser(self.model, self.pictures, self.regions, settings or Settings(), **arguments)


@pytest.fixture(scope="module")
def run(model):
    with torch.no_grad():
        return Run(model)


def level(run, i, rows=2):
    return run.sigmas[i].expand(rows)


def calls_of(model, monkeypatch):
    seen = []
    forward = type(model).forward

    def counted(self, x, *args, **kwargs):
        seen.append(len(x))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    return seen


@torch.no_grad()
def test_one_call_for_all_references_at_a_level(run, monkeypatch):
    seen = calls_of(run.model, monkeypatch)
    model = run.denoiser(read={})
    x = run.pictures.content.trajectory[1]
    model(x, level(run, 1))
    assert seen == [8, 2]
    model(x, level(run, 1))
    assert seen == [8, 2, 2]
    model(x, level(run, 2))
    assert seen == [8, 2, 2, 8, 2]
    assert model.reference_calls == 2
    assert model.scsa.fired == 3 * len(model.layers)


@torch.no_grad()
def test_the_inversion_knows_what_its_own_calls_read(run, monkeypatch):
    plain = ddim_inversion(lambda x, sigma: run.model(x, sigma, run.empty), run.pictures.style.clean, run.sigmas)
    torch.testing.assert_close(run.pictures.style.trajectory, plain.trajectory, rtol=0, atol=0)
    seen = calls_of(run.model, monkeypatch)
    x = run.pictures.content.trajectory[1]
    known = run.denoiser(read=dict(run.read))
    fresh = run.denoiser(read={})
    for i in (1, 2):
        torch.testing.assert_close(known(x, level(run, i)), fresh(x, level(run, i)), rtol=1e-9, atol=1e-9)
    assert known.reference_calls == 0
    assert sorted(seen) == [2, 2, 2, 2, 8, 8]
    # The noisiest level's latent was made last and never looked at.
    known(x, level(run, 0))
    assert known.reference_calls == 1


@torch.no_grad()
def test_the_first_block_is_the_paper_s(run):
    """What leaves the first block's self-attention, computed from the blocks' inputs alone."""
    unet, layers = run.model.unet, self_attention_layers(run.model.unet)
    x, sigma = run.pictures.content.trajectory[1], level(run, 1)
    with block_inputs(unet, layers) as seen:
        entered = []
        for picture in (*run.pictures.given, None):
            latent = x if picture is None else picture.at(sigma[0])
            run.model(latent, sigma, run.empty)
            entered.append(seen[layers[0]].clone())
    *references, entering = entered
    caught = {}
    options = {"patches": {"attn1_output_patch": [lambda n, extra: caught.setdefault(extra["block"], n)]}}
    run.denoiser(options=options)(x, sigma)
    denoiser = run.denoiser()
    block = denoiser.scsa._projections(layers[0])
    assert transformer_block(unet, layers[0]).attn1.to_q is block.to_q
    grid = (SIZE[0] // 8, SIZE[1] // 8)
    order = order_by_region(run.regions.at(grid, grid))
    prepared = prepare(block, References(*references), order, Settings())
    expected = scsa(block, entering, prepared, order, Settings())
    torch.testing.assert_close(caught[layers[0][:2]], expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_guidance_and_multiples_of_the_contents(run):
    x = run.pictures.content.trajectory[1]
    once = run.denoiser()(x, level(run, 1))
    twice = run.denoiser()(x.repeat(2, 1, 1, 1), level(run, 1, 4))
    torch.testing.assert_close(twice, once.repeat(2, 1, 1, 1))
    prompt = run.model.text(["red and blue striped sky"])
    changes = {"positive": prompt, "negative": run.empty, "reference": run.empty}
    guided = run.denoiser(cfg=3.0, **changes)(x, level(run, 1))
    c = run.denoiser(positive=prompt, reference=run.empty)(x, level(run, 1))
    torch.testing.assert_close(guided, once + 3.0 * (c - once))
    assert (guided - once).abs().max() > 1e-4


@torch.no_grad()
def test_map_pictures_are_asked_for_only_where_they_count(run, monkeypatch):
    run_without = Pictures(run.pictures.content, run.pictures.style)
    x = run.pictures.content.trajectory[1]
    for settings in (Settings(a1=0.0), Settings(t1=0.0)):
        model = ScsaDenoiser(run.model, run_without, run.regions, settings, run.empty, read={})
        seen = calls_of(run.model, monkeypatch)
        out = model(x, level(run, 1))
        assert seen == [4, 2]
        torch.testing.assert_close(out, run.denoiser(settings)(x, level(run, 1)), rtol=1e-9, atol=1e-9)
        monkeypatch.undo()
    with pytest.raises(ValueError, match="pictures of both semantic maps"):
        ScsaDenoiser(run.model, run_without, run.regions, Settings(), run.empty)


@torch.no_grad()
def test_regions_decide_and_a_run_goes_through(run):
    def made(regions):
        model = ScsaDenoiser(run.model, run.pictures, regions, Settings(), run.empty, read=run.read)
        return replay(model, run.pictures.content.trajectory[1], run.sigmas[1:], inversion=run.pictures.content)

    one = SemanticMap(*(torch.zeros_like(m) for m in (run.regions.content, run.regions.style)))
    a, b = made(run.regions), made(one)
    assert a.isfinite().all()
    assert (a - b).abs().max() > 1e-3


def test_refusals(run):
    other = run.invert(drawn(1, 30)[0][:, :, :16])
    with pytest.raises(ValueError, match="of one size"):
        ScsaDenoiser(run.model, Pictures(run.pictures.content, other), run.regions, Settings(a1=0.0), run.empty)
    with pytest.raises(ValueError, match="needs a negative prompt"):
        run.denoiser(cfg=2.0)
