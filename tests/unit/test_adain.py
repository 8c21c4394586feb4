"""AdaIN and S-AdaIN in float64 against a place-by-place computation, and the authors' golden results."""

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file
from semantic_style.regions.adain import adain, adain_latents, region_adain
from semantic_style.regions.semantic_map import SemanticMap

EPS = 1e-5


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*shape, regions, seed=0):
    return torch.randint(0, regions, shape, generator=torch.Generator().manual_seed(seed))


def brute_force(content, style, content_labels, style_labels, min_tokens):
    out = torch.empty_like(content)
    for b in range(len(content)):
        s_b, ls_b = min(b, len(style) - 1), style_labels[min(b, len(style_labels) - 1)]
        lc_b = content_labels[min(b, len(content_labels) - 1)]
        for label in lc_b.unique():
            for c in range(content.shape[1]):
                mine = content[b, c][lc_b == label]
                theirs = style[s_b, c][ls_b == label]
                if len(theirs) < min_tokens:
                    theirs = style[s_b, c].flatten()
                normal = (mine - mine.mean()) / (mine.var(unbiased=False) + EPS).sqrt()
                out[b, c][lc_b == label] = normal * (theirs.var(unbiased=False) + EPS).sqrt() + theirs.mean()
    return out


@pytest.mark.parametrize("style_batch", [1, 3])
def test_regions_match_brute_force(style_batch):
    content, style = random(3, 5, 9, 7), 3 + 2 * random(style_batch, 5, 6, 11, seed=1)
    lc, ls = labels(3, 9, 7, regions=5), labels(style_batch, 6, 11, regions=3, seed=2)
    out = region_adain(content, style, lc, ls, min_tokens=4)
    torch.testing.assert_close(out, brute_force(content, style, lc, ls, 4), rtol=1e-10, atol=1e-10)


def test_global_is_region_adain_with_one_region():
    content, style = random(2, 4, 8, 6), 2 * random(2, 4, 5, 5, seed=1) - 1
    one = region_adain(content, style, torch.zeros(1, 8, 6, dtype=torch.int64), torch.zeros(1, 5, 5, dtype=torch.int64))
    torch.testing.assert_close(adain(content, style), one, rtol=1e-10, atol=1e-10)


def test_global_statistics_become_the_styles():
    content, style = random(2, 4, 8, 6), 2 * random(1, 4, 15, 5, seed=1) - 1
    out = adain(content, style)
    torch.testing.assert_close(out.mean((2, 3)), style.mean((2, 3)).expand(2, -1))
    torch.testing.assert_close(
        out.std((2, 3), unbiased=False), style.std((2, 3), unbiased=False).expand(2, -1), rtol=1e-4, atol=0
    )


def test_video_latents_have_one_statistic_over_time_and_space():
    content, style = random(1, 4, 3, 5, 6), 1 + random(1, 4, 7, 7, seed=1)
    out = adain(content, style)
    assert out.shape == content.shape
    torch.testing.assert_close(out, adain(rearrange(content, "b c t h w -> b c (t h) w"), style).reshape(content.shape))


def test_strength_blends():
    content, style = random(1, 2, 6, 6), 5 + random(1, 2, 6, 6, seed=1)
    full = adain(content, style)
    assert torch.equal(adain(content, style, strength=0.0), content)
    torch.testing.assert_close(adain(content, style, strength=0.25), 0.75 * content + 0.25 * full)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_never_nan_on_degenerate_regions(dtype):
    content, style = torch.full((1, 2, 4, 4), 100.0, dtype=dtype), torch.full((1, 2, 4, 4), -300.0, dtype=dtype)
    lc, ls = torch.zeros(1, 4, 4, dtype=torch.int64), torch.zeros(1, 4, 4, dtype=torch.int64)
    lc[0, 0, 0] = 1  # one place, in both
    lc[0, 3, 3] = 9  # not in the style
    ls[0, 2, 2] = 1
    for min_tokens in (1, 4):
        out = region_adain(content, style, lc, ls, min_tokens=min_tokens)
        assert out.dtype == dtype
        torch.testing.assert_close(out, style, rtol=1e-2, atol=0)
    assert torch.isfinite(adain(content, style)).all()


def test_large_half_precision_values_do_not_overflow():
    content = torch.tensor([-3e4, 3e4], dtype=torch.float16).reshape(1, 1, 1, 2)
    assert torch.isfinite(adain(content, content)).all()


@pytest.mark.parametrize("name", ["a", "b"])
def test_authors_s_adain(shared, name):
    golden = load_file(shared / "golden" / f"scsa_block_{name}.safetensors")
    content, style, expected = (
        rearrange(golden[key], "b (h w) c -> b c h w", h=32) for key in ("x_content", "x_style", "s_adain")
    )
    out = region_adain(content, style, golden["labels_content"][None], golden["labels_style"][None])
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("content", "style", "message"),
    [
        ((1, 4, 8, 8), (1, 16, 8, 8), "4 channels and style 16"),
        ((3, 4, 8, 8), (2, 4, 8, 8), "3 contents, 2 styles"),
        ((1, 4), (1, 4), "with pixels"),
        ((1, 4, 0, 8), (1, 4, 8, 8), "empty"),
    ],
)
def test_refusals_name_the_shapes(content, style, message):
    with pytest.raises(ValueError, match=message):
        adain(torch.zeros(content), torch.zeros(style))


def test_refusals_of_settings_and_labels():
    x = torch.zeros(1, 4, 8, 8)
    fits = torch.zeros(1, 8, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="strength"):
        adain(x, x, strength=1.5)
    with pytest.raises(ValueError, match="resample_labels"):
        region_adain(x, x, torch.zeros(1, 64, 64, dtype=torch.int64), fits)
    with pytest.raises(ValueError, match="min_tokens"):
        region_adain(x, x, fits, fits, min_tokens=0)


def test_masks_say_whose_statistics_count_and_where():
    content, style = random(2, 3, 4, 6), 3 + 2 * random(1, 3, 5, 5, seed=1)
    left, top = torch.zeros(1, 4, 6), torch.zeros(1, 5, 5)
    left[..., :3], top[:, :2] = 1.0, 1.0
    out = adain_latents(content, style, content_mask=left, style_mask=top)
    torch.testing.assert_close(out[..., :3], adain(content[..., :3], style[:, :, :2]), rtol=0, atol=1e-9)
    assert torch.equal(out[..., 3:], content[..., 3:])
    soft = adain_latents(content, style, content_mask=left * 0.25, style_mask=top)
    torch.testing.assert_close(soft, torch.lerp(content, out, 0.25), rtol=0, atol=1e-9)


def test_a_style_mask_limits_regions_and_what_lacking_ones_take():
    content, style = random(1, 3, 4, 6), 3 + 2 * random(1, 3, 6, 6, seed=1)
    lc, ls = torch.zeros(1, 4, 6, dtype=torch.int64), torch.zeros(1, 6, 6, dtype=torch.int64)
    lc[..., 3:], ls[..., 3:] = 1, 1
    mask = torch.zeros(1, 6, 6)
    mask[..., :2] = 1.0  # a part of region 0, nothing of region 1
    out = adain_latents(content, style, SemanticMap(lc, ls), style_mask=mask)
    for side in (slice(0, 3), slice(3, 6)):
        torch.testing.assert_close(out[..., side], adain(content[..., side], style[..., :2]), rtol=0, atol=1e-9)
    speck = torch.zeros(1, 6, 6)
    speck[0, 2, 2] = 1.0
    out = adain_latents(content, style, style_mask=speck)
    torch.testing.assert_close(out, adain(content, style), rtol=0, atol=1e-9, msg="too few to have statistics")


def test_masks_of_a_video_and_those_that_do_not_fit():
    video, style = random(1, 3, 2, 4, 6), random(1, 3, 1, 5, 5, seed=1)
    masks = torch.zeros(2, 4, 6)
    masks[0, :2], masks[1, 2:] = 1.0, 1.0
    out = adain_latents(video, style, content_mask=masks)
    for frame in range(2):
        alone = adain_latents(video[:, :, frame], style[:, :, 0], content_mask=masks[frame : frame + 1])
        torch.testing.assert_close(out[:, :, frame], alone, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match=r"content_masks .* one is needed, or one for each of 3"):
        adain_latents(random(3, 3, 4, 6), style[:, :, 0], content_mask=masks)
