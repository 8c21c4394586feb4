"""Injection through the hook protocol, on a small UNet in float64 and without ComfyUI: every layer against attention
written out, the negative rows bit for bit, and what chains with it.
"""

import pytest
import torch
from semantic_style.attention.injection_patch import Chunk, Injection, check_tokens, scaled
from semantic_style.attention.layers import all_cross_attention, cross_attention_layers, feature_blocks
from semantic_style.paperland.model import Paperland
from semantic_style.paperland.unet import PaperlandUNet, UNetConfig, attention
from semantic_style.samplers.features import FeatureTap
from torch import nn

SIZE, WIDTH = (9, 14), 16  # odd: 9, 5, 3 rows of places on the three levels


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    config = UNetConfig(
        channels=32, multipliers=(1, 1, 2), depth_in=(1, 1, 1), context_channels=WIDTH, head_channels=16
    )
    net = PaperlandUNet(config)
    return net.double().eval().requires_grad_(False)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def half(rows=1, size=SIZE):
    """Everything right of a line through the middle of a place of the coarse grids."""
    mask = torch.zeros(rows, *size, dtype=torch.float64)
    for i in range(rows):
        mask[i, :, 5 + i :] = 1
    return mask


BACKGROUND, REFERENCE, NEGATIVE = random(1, 5, WIDTH, seed=1), random(1, 7, WIDTH, seed=2), random(1, 5, WIDTH, seed=3)


def call(unet, x, context, options=None):
    t = torch.full((len(x),), 300.0, dtype=torch.float64)
    return unet(x, t, context, options)


def both(rows=1, negative_first=True):
    """A CFG call's latents, context and options."""
    x = random(rows, 48, *SIZE, seed=4).repeat(2, 1, 1, 1)
    parts = [NEGATIVE.expand(rows, -1, -1), BACKGROUND.expand(rows, -1, -1)]
    order = [1, 0] if negative_first else [0, 1]
    return x, torch.cat(parts if negative_first else parts[::-1]), {"cond_or_uncond": order}


def inject(unet, mask=None, tokens=REFERENCE, **settings):
    return Injection(unet, tokens, half() if mask is None else mask, attention, **settings)


def written_out(q, k, v, heads):
    """Attention [N, C] of one picture's queries, head by head and place by place."""
    d = q.shape[-1] // heads
    out = torch.zeros_like(q)
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        for i in range(len(q)):
            logits = (k[:, part] * q[i, part]).sum(dim=1) / d**0.5
            weights = logits.exp() / logits.exp().sum()
            out[i, part] = (weights[:, None] * v[:, part]).sum(dim=0)
    return out


def column_weights(width):
    """Share of each of `width` cells on a line of 14 places that lies at 5 and more."""
    return [min(1.0, max(0.0, (j + 1) * 14 / width - 5) / (14 / width)) for j in range(width)]


def test_every_layer_attends_to_the_reference_inside_and_to_the_background_outside(unet):
    layers, seen = all_cross_attention(unet), {}
    assert {name for name, *_ in layers} == {"input", "middle", "output"}
    handles = []
    for layer, attn2 in layers.items():
        handles.append(attn2.to_q.register_forward_hook(lambda m, a, out, at=layer: seen.update({(at, "q"): out})))
        handles.append(attn2.to_out.register_forward_pre_hook(lambda m, a, at=layer: seen.update({(at, "out"): a[0]})))
    x, context, options = both()
    injection = inject(unet)
    call(unet, x, context, injection.options(options))
    for handle in handles:
        handle.remove()
    assert injection.fired
    grids = set()
    for layer, attn2 in layers.items():
        q, out = seen[layer, "q"], seen[layer, "out"]
        width = {9 * 14: 14, 5 * 7: 7, 3 * 4: 4}[q.shape[1]]
        grids.add(width)
        weight = torch.tensor(column_weights(width), dtype=torch.float64).repeat(q.shape[1] // width)[:, None]
        k, v = (attn2.to_k, attn2.to_v)
        by_background, by_reference = (
            written_out(q[1], k(c[0]), v(c[0]), attn2.heads) for c in (BACKGROUND, REFERENCE)
        )
        torch.testing.assert_close(out[1], (1 - weight) * by_background + weight * by_reference)
        torch.testing.assert_close(out[0], written_out(q[0], k(NEGATIVE[0]), v(NEGATIVE[0]), attn2.heads))
    assert grids == {14, 7, 4}


@pytest.mark.parametrize("negative_first", [True, False])
def test_negative_rows_are_bit_for_bit_those_of_a_plain_call(unet, negative_first):
    x, context, options = both(2, negative_first)
    plain = call(unet, x, context, dict(options))
    out = call(unet, x, context, inject(unet).options(options))
    negative, positive = (slice(0, 2), slice(2, 4)) if negative_first else (slice(2, 4), slice(0, 2))
    assert torch.equal(out[negative], plain[negative])
    assert (out[positive] - plain[positive]).abs().amax(dim=(1, 2, 3)).min() > 0.01


def test_a_full_mask_is_a_call_with_the_references_prompt(unet):
    x = random(2, 48, *SIZE, seed=4)
    full = inject(unet, torch.ones(1, 4, 4))
    expected = call(unet, x, REFERENCE.expand(2, -1, -1))
    out = call(unet, x, BACKGROUND.expand(2, -1, -1), full.options())
    torch.testing.assert_close(out, expected)
    assert (out - call(unet, x, BACKGROUND.expand(2, -1, -1))).abs().max() > 0.01


def test_nothing_changes_where_there_is_nothing_to_change(unet):
    x, context, options = both()
    plain = call(unet, x, context, dict(options))
    nothing = inject(unet, scaled(half(), 0.0))
    assert torch.equal(call(unet, x, context, nothing.options(options)), plain)
    assert not nothing.fired
    same = inject(unet, tokens=BACKGROUND)
    torch.testing.assert_close(call(unet, x, context, same.options(options)), plain)
    given = {"patches_replace": {"attn2": {}}}
    assert inject(unet).options(given, [None, None]) == given
    # The same options do for calls of either prompt by itself.
    options, alone = inject(unet).options(), call(unet, x[:1], context[1:])
    for which, changed in (([0], True), ([1], False)):
        out = call(unet, x[:1], context[1:], {**options, "cond_or_uncond": which})
        assert torch.equal(out, alone) != changed
    for strength in (-0.1, 1.5):
        with pytest.raises(ValueError, match="between 0"):
            scaled(half(), strength)


def test_strength_lies_between(unet):
    x, context, options = both()

    def out(strength):
        return call(unet, x, context, inject(unet, scaled(half(), strength)).options(options))

    assert (out(0.5) - out(0.0)).norm() < (out(1.0) - out(0.0)).norm()
    assert (out(0.5) - out(1.0)).norm() < (out(0.0) - out(1.0)).norm()


def test_pictures_of_a_batch_are_made_as_alone(unet):
    masks, tokens = half(3), random(3, 7, WIDTH, seed=8)
    x = random(3, 48, *SIZE, seed=4)
    context, options = random(6, 5, WIDTH, seed=9), {"cond_or_uncond": [0, 1]}
    together = call(unet, x.repeat(2, 1, 1, 1), context, inject(unet, masks, tokens).options(options))
    for i in range(3):
        one = inject(unet, masks[i : i + 1], tokens[i : i + 1])
        alone = call(unet, x[[i, i]], context[[i, i + 3]], one.options(options))
        torch.testing.assert_close(together[[i, i + 3]], alone)
    # A window holds some frames of the clip, in its own order.
    window = inject(unet, masks, tokens)
    options = window.options(options, [Chunk((2, 0)), None])
    part = call(unet, x[[2, 0]].repeat(2, 1, 1, 1), context[[2, 0, 5, 3]], options)
    torch.testing.assert_close(part, together[[2, 0, 5, 3]])


def test_a_call_for_an_area_takes_that_part_of_the_mask(unet):
    size, part = (16, 24), (8, 12, 4, 10)
    mask = half(size=size)
    mask[:, :, 15:] = 0
    x = random(1, 48, 8, 12, seed=4)
    whole = inject(unet, mask, size=size)
    out = call(unet, x, BACKGROUND, whole.options({}, [Chunk(area=part)]))
    cropped = inject(unet, mask[:, 4:12, 10:22])
    assert torch.equal(out, call(unet, x, BACKGROUND, cropped.options()))
    assert whole.options({}, [Chunk(area=(8, 8, 0, 16))]) == {}, "nothing of the mask is there"
    with pytest.raises(ValueError, match="give the injection `size`"):
        call(unet, x, BACKGROUND, inject(unet).options({}, [Chunk(area=part)]))


def test_what_replaces_the_attention_already_is_asked_for_both(unet):
    asked = []

    def other(q, k, v, extra):
        asked.append((len(q), k.shape[1], extra["cond_or_uncond"], extra["uuids"]))
        return attention(q, k, v, extra["n_heads"]) + 1.0

    layers = list(all_cross_attention(unet))
    # Set for one transformer block, and for all of its numbered block.
    table = {layers[0]: other, layers[-1][:2]: other}
    x, context, options = both()
    given = {**options, "uuids": ["n", "p"], "patches_replace": {"attn2": dict(table), "attn1": {}}}
    out = call(unet, x, context, inject(unet).options(given))
    assert asked == [(1, 7, [0], ["p"]), (2, 5, [1, 0], ["n", "p"])] * 2
    assert given["patches_replace"]["attn2"] == table
    # As a sum: what it adds does not depend on the tokens, so the blend leaves it whole.
    shifted = Injection(unet, REFERENCE, half(), attention)
    own = shifted._own
    chained = {layers[0], layers[-1]}

    def adding(q, k, v, extra):
        return own(q, k, v, extra) + (1.0 if (*extra["block"], extra["block_index"]) in chained else 0.0)

    shifted._own = adding
    torch.testing.assert_close(out, call(unet, x, context, shifted.options(options)))


def test_the_demo_s_cfg_tells_whose_rows_are_whose(unet):
    model = Paperland(unet.config).double().eval()
    model.unet.load_state_dict(unet.state_dict())
    told = random(1, 5, WIDTH, seed=12)
    x, sigma = random(2, 48, *SIZE, seed=4), torch.full((2,), 0.7, dtype=torch.float64)
    options = Injection(model.unet, told, torch.ones(1, 4, 4), attention).options()
    for cfg in (1.0, 3.5):
        out = model.guided(BACKGROUND, NEGATIVE, cfg, options)(x, sigma)
        torch.testing.assert_close(out, model.guided(told, NEGATIVE, cfg)(x, sigma))
        assert (out - model.guided(BACKGROUND, NEGATIVE, cfg)(x, sigma)).abs().max() > 1e-3


def test_of_two_injections_the_last_lies_in_front(unet):
    x, context, options = both()
    other = random(1, 4, WIDTH, seed=11)
    behind, front = half(), 1 - half()
    front[:, :, 4:8] = 1

    def out(*injections):
        given = options
        for injection in injections:
            given = injection.options(given)
        return call(unet, x, context, given)

    both_masks = out(inject(unet, behind), inject(unet, front, other))
    full = torch.ones_like(front)
    torch.testing.assert_close(out(inject(unet, behind), inject(unet, full, other)), out(inject(unet, full, other)))
    assert (both_masks - out(inject(unet, front, other))).abs().max() > 0.01
    assert (both_masks - out(inject(unet, behind))).abs().max() > 0.01


def test_a_tap_below_keeps_the_backgrounds_map_and_gradients_pass(unet):
    x = random(1, 48, *SIZE, seed=4)

    def stages(x, tokens, mask):
        tap = FeatureTap(feature_blocks(unet), cross_attention_layers(unet), attention, cut=True)
        options = Injection(unet, tokens, mask, attention).options(tap.options({"cond_or_uncond": [0]}))
        call(unet, x, BACKGROUND, options)
        (seen,) = tap.read(SIZE).values()
        return seen

    seen = stages(x, REFERENCE, half())
    assert {m.shape[-1] for m in seen.maps} == {5}
    small = torch.zeros(1, *SIZE, dtype=torch.float64)
    small[:, 2:6, 3:8] = 0.7

    def energy(x):
        seen = stages(x, REFERENCE, small)
        return sum(s.square().sum() for s in seen.stages) + sum(m.square().sum() for m in seen.maps)

    x.requires_grad_()
    (gradient,) = torch.autograd.grad(energy(x), x)
    direction, step = random(*x.shape, seed=6), 1e-5
    with torch.no_grad():
        slope = (energy(x + step * direction) - energy(x - step * direction)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-6)


def test_tensors_made_in_inference_mode_may_be_used_with_gradient(unet):
    with torch.inference_mode():
        injection = inject(unet, half().clone(), REFERENCE.clone())
        call(unet, random(1, 48, *SIZE, seed=4), BACKGROUND, injection.options())
    x = random(1, 48, *SIZE, seed=4).requires_grad_()
    out = call(unet, x, BACKGROUND, injection.options())
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.abs().max() > 0


def test_networks_and_tokens_that_do_not_fit_are_refused(unet):
    with pytest.raises(ValueError, match="no numbered blocks"):
        all_cross_attention(nn.Linear(2, 2))
    bare = nn.Module()
    bare.input_blocks, bare.output_blocks = nn.ModuleList([nn.Sequential()]), nn.ModuleList([nn.Sequential()])
    bare.middle_block = nn.Sequential()
    with pytest.raises(ValueError, match="no cross-attention"):
        all_cross_attention(bare)
    video = nn.Module()
    video.time_stack = nn.ModuleList()
    bare.middle_block = nn.Sequential(video)
    with pytest.raises(ValueError, match="attention over time"):
        all_cross_attention(bare)
    layers = all_cross_attention(unet)
    for tokens, message in (
        (random(7, WIDTH), "must be"),
        (random(1, 7, WIDTH + 1), "takes 16: encode it with the CLIP"),
        (random(1, 7, WIDTH) / 0, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            check_tokens(tokens, layers)
    x = random(3, 48, *SIZE, seed=4)
    with pytest.raises(ValueError, match="2 masks for 3 pictures"):
        call(unet, x, BACKGROUND.expand(3, -1, -1), inject(unet, half(2)).options())
    with pytest.raises(ValueError, match="2 rows for 3 pictures"):
        call(unet, x, BACKGROUND.expand(3, -1, -1), inject(unet, tokens=random(2, 7, WIDTH)).options())


def test_a_patch_that_stacks_or_cuts_rows_is_named(unet):
    def couple(n, context, value, extra):
        return n.repeat(2, 1, 1), context.repeat(2, 1, 1), value.repeat(2, 1, 1)

    options = inject(unet).options({"patches": {"attn2_patch": [couple]}})
    with pytest.raises(ValueError, match=r"another patch on this MODEL.*couple"):
        call(unet, random(1, 48, *SIZE, seed=4), BACKGROUND, options)
