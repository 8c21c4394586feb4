"""SCSA in a block: the authors' golden results in every stage, and a masked float64 computation of the formulas."""

from dataclasses import replace

import pytest
import torch
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import load_file
from semantic_style.attention.regional_attention import order_by_region
from semantic_style.attention.scsa_attention import (
    Prepared,
    References,
    ScsaSettings,
    SelfAttention,
    align,
    instance_norm,
    prepare,
    scsa,
    sparse,
)
from semantic_style.regions.semantic_map import SemanticMap
from torch.nn.functional import gelu, layer_norm, linear

PLACES, CHANNELS, HEADS = (6, 7), 8, 2


class Golden:
    """One of the authors' files: weights, inputs and results of a transformer block."""

    def __init__(self, path):
        self.values = load_file(path)
        with safe_open(path, "pt") as file:
            meta = file.metadata()
        shares = {name: float(meta[name]) for name in ("t1", "t2", "a1", "a2")}
        self.settings = ScsaSettings(temperature=float(meta["T"]), **shares)
        self.block = SelfAttention(
            norm=self.norm("norm1"),
            to_q=self.linear("attn1.to_q"),
            to_k=self.linear("attn1.to_k"),
            to_v=self.linear("attn1.to_v"),
            to_out=self.linear("attn1.to_out.0"),
            heads=int(meta["heads"]),
        )
        labels = (self.values[f"labels_{name}"][None] for name in ("content", "style"))
        self.order = order_by_region(SemanticMap(*labels))
        self.references = References(
            *(self.values[f"x_{name}"] for name in ("content", "style", "content_map", "style_map"))
        )

    def linear(self, name):
        weight, bias = self.values[f"weights.{name}.weight"], self.values.get(f"weights.{name}.bias")
        return lambda x: linear(x, weight, bias)

    def norm(self, name):
        weight, bias = (self.values[f"weights.{name}.{part}"] for part in ("weight", "bias"))
        return lambda x: layer_norm(x, weight.shape, weight, bias, 1e-5)

    def rest_of_block(self, x):
        """Cross-attention and feed-forward of a Stable Diffusion transformer block."""
        y, context = self.norm("norm2")(x), self.values["context"]
        q, k, v = (self.linear(f"attn2.to_{n}")(y if n == "q" else context) for n in "qkv")
        q, k, v = (rearrange(z, "b n (h d) -> b h n d", h=self.block.heads) for z in (q, k, v))
        out = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        x = x + self.linear("attn2.to_out.0")(rearrange(out, "b h n d -> b n (h d)"))
        value, gate = self.linear("ff.net.0.proj")(self.norm("norm3")(x)).chunk(2, dim=-1)
        return x + self.linear("ff.net.2")(value * gelu(gate))


@pytest.fixture(params=["a", "b"])
def golden(shared, request):
    return Golden(shared / "golden" / f"scsa_block_{request.param}.safetensors")


def test_authors_block_in_every_stage(golden):
    block, order, settings, x = golden.block, golden.order, golden.settings, golden.values["x"]
    prepared = prepare(block, golden.references, order, settings)
    after = x + scsa(block, x, prepared, order, settings)
    stages = {
        "s_adain": align(golden.references.content, golden.references.style, order),
        "sca": prepared.continuous,
        "ssa": sparse(block, x, prepared, order, settings.a2),
        "after_attn1": after,
        "block_output": golden.rest_of_block(after),
    }
    for name, stage in stages.items():
        torch.testing.assert_close(
            stage, golden.values[name], rtol=0, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*shape, regions=3, seed=0):
    return torch.randint(0, regions, shape, generator=torch.Generator().manual_seed(seed))


def random_block():
    weights = random(4, CHANNELS, CHANNELS, seed=5) / CHANNELS**0.5
    bias = random(CHANNELS, seed=6)
    q, k, v = (lambda x, w=w: x @ w for w in weights[:3])
    return SelfAttention(lambda x: layer_norm(x, (CHANNELS,)), q, k, v, lambda x: x @ weights[3] + bias, HEADS)


def random_references(content=1, style=1, style_tokens=42):
    n = PLACES[0] * PLACES[1]
    return References(
        random(content, n, CHANNELS, seed=1),
        2 * random(style, style_tokens, CHANNELS, seed=2) + 1,
        random(content, n, CHANNELS, seed=3),
        random(style, style_tokens, CHANNELS, seed=4),
    )


def by_formula(block, x, refs, regions, settings):
    """One image, a dense masked computation; every region has enough places."""
    content, style = (labels.flatten() for labels in (regions.content[0], regions.style[0]))
    same = content[:, None] == style[None, :]
    aligned = torch.empty_like(refs.content)
    for label in content.unique():
        c, s = refs.content[:, content == label], refs.style[:, style == label]
        normal = (c - c.mean(1, True)) / (c.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        aligned[:, content == label] = normal * (s.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt() + s.mean(1, True)
    n, heads = block.norm, lambda y: rearrange(y, "b n (h d) -> b h n d", h=HEADS)
    a1, a2 = settings.a1, settings.a2
    q = a1 * block.to_q(n(refs.content_map)) + (1 - a1) * block.to_q(n(aligned))
    k = a1 * block.to_k(n(refs.style_map)) + (1 - a1) * block.to_k(n(refs.style))
    v = block.to_v(n(refs.style))
    logits = settings.temperature * (CHANNELS / HEADS) ** -0.5 * heads(q) @ heads(k).mT
    sca = logits.masked_fill(~same, -torch.inf).softmax(-1) @ heads(v)
    normal = (x - x.mean(1, True)) / (x.var(1, keepdim=True) + 1e-5).sqrt()
    q = a2 * block.to_q(n(aligned)) + (1 - a2) * block.to_q(normal)
    logits = heads(q) @ heads(block.to_k(n(refs.style))).mT
    best = logits.masked_fill(~same, -torch.inf).argmax(-1)
    ssa = torch.nn.functional.one_hot(best, len(style)).double() @ heads(v)
    sca, ssa = (block.to_out(rearrange(y, "b h n d -> b n (h d)")) for y in (sca, ssa))
    return settings.t1 * sca + settings.t2 * ssa


@pytest.mark.parametrize(
    "settings", [ScsaSettings(), ScsaSettings(t1=0.0), ScsaSettings(t2=0.0), ScsaSettings(2.0, 0.3, 1.1, 0.0, 1.0)]
)
def test_formula_with_a_style_of_another_size(settings):
    regions = SemanticMap(labels(1, *PLACES), labels(1, 5, 9, seed=1))
    block, refs, x = random_block(), random_references(style_tokens=45), 3 * random(1, 42, CHANNELS) + 2
    order = order_by_region(regions)
    out = scsa(block, x, prepare(block, refs, order, settings), order, settings)
    torch.testing.assert_close(out, by_formula(block, x, refs, regions, settings), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("contents", "styles", "rows"), [(1, 1, 3), (3, 3, 3), (3, 1, 3), (3, 3, 6), (3, 1, 6)])
def test_batches_are_images_one_by_one(contents, styles, rows):
    block, refs, settings = random_block(), random_references(contents, styles), ScsaSettings()
    x = random(rows, 42, CHANNELS, seed=8)
    regions = SemanticMap(labels(contents, *PLACES), labels(styles, *PLACES, seed=1))
    order = order_by_region(regions)
    out = scsa(block, x, prepare(block, refs, order, settings), order, settings)
    for i in range(rows):
        c, s = slice(i % contents, i % contents + 1), slice(i % styles, i % styles + 1)
        own = References(refs.content[c], refs.style[s], refs.content_map[c], refs.style_map[s])
        alone = by_formula(block, x[i : i + 1], own, SemanticMap(regions.content[c], regions.style[s]), settings)
        torch.testing.assert_close(out[i : i + 1], alone, rtol=1e-10, atol=1e-10)


def test_gradient_reaches_the_style_but_not_the_image():
    block, settings = random_block(), ScsaSettings()
    refs = random_references()
    refs.style.requires_grad_()
    x = random(1, 42, CHANNELS).requires_grad_()
    order = order_by_region(SemanticMap(labels(1, *PLACES), labels(1, *PLACES, seed=1)))
    (x + scsa(block, x, prepare(block, refs, order, settings), order, settings)).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert refs.style.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close_and_finite(dtype):
    half = {
        name: (lambda x, f=f: f(x.double()).to(dtype)) for name, f in vars(random_block()).items() if name != "heads"
    }
    refs, x, settings = random_references(), 100 * random(1, 42, CHANNELS), ScsaSettings(t2=0.0)
    regions = SemanticMap(labels(1, *PLACES), labels(1, *PLACES, seed=1))
    order = order_by_region(regions)
    block = SelfAttention(**half, heads=HEADS)
    low = References(*(y.to(dtype) for y in vars(refs).values()))
    out = scsa(block, x.to(dtype), prepare(block, low, order, settings), order, settings)
    assert out.dtype == dtype
    exact = by_formula(random_block(), x, refs, regions, settings)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=0.03 if dtype == torch.float16 else 0.2)
    assert torch.isfinite(
        scsa(block, x.to(dtype), prepare(block, low, order, ScsaSettings()), order, ScsaSettings())
    ).all()


def test_instance_norm_of_one_place_and_of_large_half_precision_values():
    assert torch.equal(instance_norm(random(2, 1, 4)), torch.zeros(2, 1, 4, dtype=torch.float64))
    x = (3e4 * random(1, 9, 4)).clamp(-6e4, 6e4)
    normal = (x - x.mean(1, True)) / x.std(1, keepdim=True)
    torch.testing.assert_close(instance_norm(x.half()).double(), normal, rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"t1": float("inf")}, "t1 must be a finite"),
        ({"a1": 1.5}, "a1 is a share"),
        ({"a2": -0.1}, "a2 is a share"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ScsaSettings(**settings)


def test_refused_shapes():
    order = order_by_region(SemanticMap(labels(1, *PLACES), labels(1, *PLACES)))
    block, refs = random_block(), random_references()
    with pytest.raises(ValueError, match="resample the semantic map"):
        prepare(block, random_references(style_tokens=10), order, ScsaSettings())
    with pytest.raises(ValueError, match="the style map's features"):
        prepare(block, replace(refs, style_map=refs.style_map[:, 1:]), order, ScsaSettings())
    prepared: Prepared = prepare(block, random_references(2, 2), order, ScsaSettings())
    for shape in ((2, 41, CHANNELS), (3, 42, CHANNELS)):
        with pytest.raises(ValueError, match="multiple of the 2 content"):
            scsa(block, torch.zeros(shape, dtype=torch.float64), prepared, order, ScsaSettings())
