"""SCSA through the hook protocol, on a small UNet in float64 and without ComfyUI."""

from dataclasses import replace

import pytest
import torch
from semantic_style.attention.layers import self_attention_layers, transformer_block
from semantic_style.attention.regional_attention import order_by_region
from semantic_style.attention.scsa_attention import References, ScsaSettings, SelfAttention, prepare, scsa
from semantic_style.attention.scsa_patch import Reader, Scsa, block_inputs, check_free, uses_map_pictures
from semantic_style.paperland.unet import PaperlandUNet, UNetConfig
from semantic_style.regions.semantic_map import SemanticMap
from torch import nn

SIZE, STYLE_SIZE = (8, 12), (12, 8)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    net = PaperlandUNet(UNetConfig(channels=32, multipliers=(1, 1, 2), context_channels=16, head_channels=16))
    return net.double().eval().requires_grad_(False)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def call(unet, x, options=None, seed=1):
    t = torch.full((len(x),), 300.0, dtype=torch.float64)
    return unet(x, t, random(1, 5, 16, seed=seed).expand(len(x), -1, -1), options)


def label_maps():
    content, style = torch.zeros(1, *SIZE, dtype=torch.long), torch.zeros(1, *STYLE_SIZE, dtype=torch.long)
    content[:, :, 4:], style[:, 6:] = 1, 1
    content[:, :4, 8:] = 7  # the style has none of these
    return SemanticMap(content, style)


def read(unet, layers, latents):
    with block_inputs(unet, layers) as seen:
        found = []
        for latent in latents:
            reader = Reader(layers, seen)
            call(unet, latent, reader.options())
            found.append(reader.read())
    return found


def latents():
    return [random(1, 48, *s, seed=i + 2) for i, s in enumerate((SIZE, STYLE_SIZE, SIZE, STYLE_SIZE))]


class Upsample(nn.Module):
    pass


class Transformer(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.transformer_blocks = nn.ModuleList(nn.Identity() for _ in range(depth))


def decoder(depths, upsamplers):
    unet = nn.Module()
    unet.output_blocks = nn.ModuleList(
        nn.Sequential(*[Transformer(d)] * bool(d), *[Upsample()] * (i in upsamplers)) for i, d in enumerate(depths)
    )
    return unet


@pytest.mark.parametrize(
    ("depths", "upsamplers", "expected"),
    [
        ((0,) * 3 + (1,) * 9, (2, 5, 8), [(i, 0) for i in range(6, 12)]),
        (
            (10,) * 3 + (2,) * 3 + (0,) * 3,
            (2, 5),
            [(i, j) for i in range(3) for j in range(10)] + [(i, j) for i in range(3, 6) for j in range(2)],
        ),
        ((0, 1, 0, 0), (1,), [(1, 0)]),
    ],
    ids=["SD1.x", "SDXL", "one level with attention"],
)
def test_blocks_are_those_of_the_two_finest_levels_with_attention(depths, upsamplers, expected):
    assert self_attention_layers(decoder(depths, upsamplers)) == tuple(("output", *e) for e in expected)


def test_networks_without_such_blocks_are_refused():
    with pytest.raises(ValueError, match="no decoder blocks"):
        self_attention_layers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no attention in its decoder"):
        self_attention_layers(decoder((0, 0), (0,)))


def test_block_inputs_are_read_without_a_trace(unet):
    layers = self_attention_layers(unet)
    x = random(2, 48, *SIZE)
    entered = {}
    handles = [
        transformer_block(unet, layer).register_forward_pre_hook(
            lambda module, args, layer=layer: entered.update({layer: args[0]})
        )
        for layer in layers
    ]
    plain = call(unet, x)
    for handle in handles:
        handle.remove()
    with block_inputs(unet, layers) as seen:
        reader = Reader(layers, seen)
        base = {"patches": {"attn1_output_patch": [lambda n, extra: n]}}
        assert torch.equal(call(unet, x, reader.options(base)), plain)
        found = reader.read()
    assert len(base["patches"]["attn1_output_patch"]) == 1
    assert seen == {}, "nothing is kept after the call"
    assert not any(m._forward_pre_hooks for m in unet.modules())
    assert found.tokens.keys() == set(layers)
    for layer in layers:
        assert torch.equal(found.tokens[layer], entered[layer])
        assert found.grids[layer][0] * found.grids[layer][1] == entered[layer].shape[1]
        assert torch.equal(found.rows(slice(1, 2)).tokens[layer], entered[layer][1:])
    with pytest.raises(RuntimeError, match="on purpose"), block_inputs(unet, layers):
        raise RuntimeError("on purpose")
    assert not any(m._forward_pre_hooks for m in unet.modules())


@pytest.mark.parametrize(
    "settings", [ScsaSettings(), ScsaSettings(a1=0.0), ScsaSettings(t1=0.0), ScsaSettings(t2=0.0, t1=1.3)]
)
def test_blocks_take_scsa_of_what_enters_them(unet, settings):
    layers = self_attention_layers(unet)
    references = read(unet, layers, latents())
    x, after = random(4, 48, *SIZE, seed=9), {}

    def watch(n, extra):
        after.setdefault((*extra["block"], extra["block_index"]), n)
        return n

    base = {"patches": {"attn1_output_patch": [watch]}}
    entered = {}
    handles = [
        transformer_block(unet, layer).register_forward_pre_hook(
            lambda module, args, layer=layer: entered.update({layer: args[0]})
        )
        for layer in layers
    ]
    with block_inputs(unet, layers) as seen:
        patch = Scsa(unet, layers, label_maps(), settings, seen)
        patch.at_level(*(references if uses_map_pictures(settings) else references[:2]))
        call(unet, x, patch.options(base))
    for handle in handles:
        handle.remove()
    assert patch.fired
    for layer in layers:
        block = transformer_block(unet, layer)
        order = order_by_region(label_maps().at(references[0].grids[layer], references[1].grids[layer]))
        a = block.attn1
        attention = SelfAttention(block.norm1, a.to_q, a.to_k, a.to_v, a.to_out, block.heads)
        ready = prepare(attention, References(*(r.tokens[layer] for r in references)), order, settings)
        torch.testing.assert_close(after[layer], scsa(attention, entered[layer], ready, order, settings))
    assert len(base["patches"]["attn1_output_patch"]) == 1
    assert "attn1_patch" not in base["patches"]


def test_strength_mixes_scsa_with_the_block_s_own_attention(unet):
    layer = self_attention_layers(unet)[-1]
    references, x = read(unet, (layer,), latents()), random(1, 48, *SIZE, seed=9)
    plain, given = call(unet, x), {}
    for strength in (0.0, 0.25, 1.0):
        after = []
        watch = {"patches": {"attn1_output_patch": [lambda n, extra, after=after: after.append(n) or n]}}
        with block_inputs(unet, (layer,)) as seen:
            patch = Scsa(unet, (layer,), label_maps(), ScsaSettings(strength=strength), seen)
            patch.at_level(*references)
            out = call(unet, x, patch.options(watch))
        given[strength] = after[-1]
        assert torch.equal(out, plain) == (strength == 0.0)
    torch.testing.assert_close(given[0.25], torch.lerp(given[0.0], given[1.0], 0.25))


def test_one_map_picture_serves_a_batch(unet):
    layers = self_attention_layers(unet)
    content, style, content_map, style_map = latents()
    batch = torch.cat([content, random(1, 48, *SIZE, seed=20)])
    results = []
    for maps in ((content_map, style_map), (content_map.repeat(2, 1, 1, 1), style_map)):
        references = read(unet, layers, (batch, style, *maps))
        with block_inputs(unet, layers) as seen:
            patch = Scsa(unet, layers, label_maps(), ScsaSettings(), seen)
            patch.at_level(*references)
            results.append(call(unet, random(2, 48, *SIZE, seed=9), patch.options()))
    torch.testing.assert_close(*results)


def test_the_gradient_passes_a_patched_block_by_its_residual_only(unet):
    layers = self_attention_layers(unet)
    references = read(unet, layers, latents())
    x = random(1, 48, *SIZE, seed=9).requires_grad_()
    direction = random(1, 48, *SIZE, seed=10)

    def constant(n, extra):
        return n.detach() if (*extra["block"], extra["block_index"]) in layers else n

    def gradient(settings, patches):
        with block_inputs(unet, layers) as seen:
            patch = Scsa(unet, layers, label_maps(), settings, seen)
            patch.at_level(*references)
            out = call(unet, x, patch.options({"patches": {"attn1_output_patch": patches}}))
            return torch.autograd.grad((out * direction).sum(), x)[0], patch

    full = torch.autograd.grad((call(unet, x) * direction).sum(), x)[0]
    (residual, _), (held, _) = gradient(ScsaSettings(), []), gradient(ScsaSettings(), [constant])
    assert torch.equal(residual, held)
    assert (full - residual).norm() > 0.05 * full.norm()

    # With the sparse part's choices out of the way that is the true gradient.
    exact, patch = gradient(ScsaSettings(t2=0.0), [])
    v, h = random(1, 48, *SIZE, seed=11), 1e-5
    with torch.no_grad(), block_inputs(unet, layers) as patch.seen:
        ends = [(call(unet, x + s * h * v, patch.options()) * direction).sum() for s in (1, -1)]
    assert float((exact * v).sum()) == pytest.approx(float(ends[0] - ends[1]) / (2 * h), rel=1e-6)


def taker(q, k, v, extra):
    return v


def test_another_taker_of_a_block_is_named(unet):
    layers = self_attention_layers(unet)
    index = layers[0][1]
    for key in (("output", index), ("output", index, 0)):
        with pytest.raises(ValueError, match=rf"SCSA .* output block {index}.*test_scsa_patch.taker"):
            check_free(layers, {"patches_replace": {"attn1": {key: taker}}})
    check_free(layers, {"patches_replace": {"attn1": {("middle", 0): taker}, "attn2": {("output", index): taker}}})
    check_free(layers[1:], {"patches_replace": {"attn1": {("output", index): taker}}})


def test_places_that_another_patch_merges_are_refused(unet):
    layers = self_attention_layers(unet)
    references = read(unet, layers, latents())

    def merge(n, context, value, extra):
        if (*extra["block"], extra["block_index"]) not in layers:
            return n, context, value
        return n[:, ::2], context[:, ::2], value[:, ::2]

    with block_inputs(unet, layers) as seen:
        patch = Scsa(unet, layers, label_maps(), ScsaSettings(), seen)
        patch.at_level(*references)
        with pytest.raises(ValueError, match=r"merges or tiles .*merge"):
            call(unet, random(1, 48, *SIZE), patch.options({"patches": {"attn1_patch": [merge]}}))


def test_another_size_is_refused(unet):
    layers = self_attention_layers(unet)
    references = read(unet, layers, latents())
    with block_inputs(unet, layers) as seen:
        patch = Scsa(unet, layers, label_maps(), ScsaSettings(), seen)
        patch.at_level(*references)
        with pytest.raises(ValueError, match="one size"):
            call(unet, random(1, 48, 8, 8), patch.options())
        content = replace(references[0], tokens={k: t.repeat(2, 1, 1) for k, t in references[0].tokens.items()})
        patch.at_level(content, *references[1:])
        with pytest.raises(ValueError, match="a multiple of the 2"):
            call(unet, random(3, 48, *SIZE), patch.options())
