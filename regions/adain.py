"""Adaptive instance normalisation, of whole images and per semantic region.

AdaIN: Huang and Belongie, "Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization", ICCV 2017, eq.
8. S-AdaIN, the same per region: Shang et al., "SCSA: A Plug-and-Play Semantic Continuous-Sparse Attention for Arbitrary
Semantic Style Transfer", CVPR 2025. Variances are biased and get `eps` inside the root on both sides, so that constant
regions and regions of one pixel are well defined.
"""

import torch
from einops import rearrange, repeat
from torch import Tensor

from .masks import cells_inside, mask_on_grid
from .semantic_map import SemanticMap, check_labels

EPS = 1e-5
# A standard deviation of fewer pixels says nothing about a style; such regions take the statistics of the whole style.
MIN_TOKENS = 4


def adain(content: Tensor, style: Tensor, eps: float = EPS, strength: float = 1.0) -> Tensor:
    """Content with the channel means and standard deviations of the style.

    `(c - mu(c)) / sqrt(var(c) + eps) * sqrt(var(s) + eps) + mu(s)`, the statistics over all pixels of each image.

    Args:
        content: [B, C, *S], any number of space (and time) axes.
        style: [B', C, *S'], B' = B or 1, another size is fine.
        eps: added to both variances.
        strength: 0 gives the content back, 1 the full effect, linear between.
    Returns:
        [B, C, *S] in the content's dtype; computed in float32 at least.
    Raises:
        ValueError: shapes that do not fit, or a strength outside 0..1.
    """
    _check_pair(content, style, strength)
    c, s = _flat(content), _flat(style)
    out = _restyle(c, *_moments(c), *_moments(s), eps)
    return _blend(content, out, strength)


def region_adain(
    content: Tensor,
    style: Tensor,
    content_labels: Tensor,
    style_labels: Tensor,
    min_tokens: int = MIN_TOKENS,
    eps: float = EPS,
    strength: float = 1.0,
    content_mask: Tensor | None = None,
    style_mask: Tensor | None = None,
    present: Tensor | None = None,
) -> Tensor:
    """S-AdaIN: every region of the content takes mean and standard deviation of the same region of the style.

    Content is always normalised by its own region. A region that the style lacks, or where the style has fewer than
    `min_tokens` pixels, takes the statistics of the whole style image (our reading: the published code divides by
    zero).

    Args:
        content: [B, C, H, W]; style: [B', C, H', W'], B' = B or 1.
        content_labels: integers [B or 1, H, W]; style_labels: integers [B' or 1, H', W'].
        min_tokens: fewest pixels that a style region needs to count (at least 1).
        eps, strength: as in `adain`.
        content_mask: [B or 1, H, W] in 0..1, where it acts and how much; what lies outside has no part in the content's
            statistics either. None for everywhere.
        style_mask: booleans [B' or 1, H', W'], the style's pixels whose statistics count, all of them where they are
            fewer than `min_tokens`. None for all.
        present: the content's labels, each once, on its device; None to find them, for which the host waits for the
            device that the labels are on.
    Returns:
        [B, C, H, W] in the content's dtype; computed in float32 at least. Finite for finite inputs.
    Raises:
        ValueError: shapes that do not fit (resample the labels first), a strength outside 0..1, min_tokens below 1.
    """
    _check_pair(content, style, strength)
    _check_region_shapes(content, content_labels, "content")
    _check_region_shapes(style, style_labels, "style")
    _check_mask_shapes(content, content_mask, "content")
    _check_mask_shapes(style, style_mask, "style")
    if min_tokens < 1:
        raise ValueError(f"min_tokens must be at least 1, got {min_tokens}")
    c, s = _flat(content), _flat(style)
    b = len(content)
    found = torch.unique(content_labels) if present is None else present
    regions, ours, theirs = (
        t.to(content.device, non_blocking=content.is_cuda) for t in (found, content_labels, style_labels)
    )
    inside_c = _membership(ours, regions, b, c.dtype)
    inside_s = _membership(theirs, regions, len(style), c.dtype)
    mean_all, var_all = _moments(s)
    if content_mask is not None:
        content_mask = rearrange(content_mask, "b h w -> b 1 (h w)").to(c)
        inside_c = inside_c * (content_mask > 0)
    if style_mask is not None:
        chosen = rearrange(style_mask, "b h w -> b 1 (h w)").to(c)
        enough = chosen.sum(dim=-1, keepdim=True) >= min_tokens
        everything = torch.where(enough, chosen, 1.0).expand(len(s), -1, -1)
        mean_all, var_all, _ = _region_moments(s, everything)
        inside_s = inside_s * everything
    mean_c, var_c, _ = _region_moments(c, inside_c)
    mean_s, var_s, pixels = _region_moments(s, inside_s)
    known = (pixels >= min_tokens)[:, None, :]
    mean_s = torch.where(known, mean_s, mean_all)
    var_s = torch.where(known, var_s, var_all)
    # The membership is one-hot, so this product picks for every pixel the statistics of its own region.
    own_mean, own_var, new_mean, new_var = (
        stat.expand(b, -1, -1) @ inside_c for stat in (mean_c, var_c, mean_s, var_s)
    )
    out = _restyle(c, own_mean, own_var, new_mean, new_var, eps)
    if content_mask is not None:
        out = torch.lerp(c, out, content_mask)
    return _blend(content, out, strength)


def adain_latents(
    content: Tensor,
    style: Tensor,
    regions: SemanticMap | None = None,
    strength: float = 1.0,
    content_mask: Tensor | None = None,
    style_mask: Tensor | None = None,
) -> Tensor:
    """AdaIN of images or video, region by region where a semantic map is given.

    Args:
        content: [B, C, H, W] or [B, C, T, H, W].
        style: the same, another size is fine; one for all or one for each image or frame.
        regions: maps at any resolution. Every frame has its own, or all share one.
        strength: as in `adain`.
        content_mask, style_mask: [1 or B, H, W] in 0..1 at any resolution, where in the content it acts and which part
            of the style counts (none of its masks is empty); None for everywhere.
    Returns:
        The content's shape and dtype.
    Raises:
        ValueError: shapes that do not fit, or a strength outside 0..1.
    """
    style = style.to(content.device, non_blocking=content.is_cuda)
    if regions is None and content_mask is None and style_mask is None:
        return adain(content, style, strength=strength)
    if regions is None:
        one = torch.zeros(1, 1, 1, dtype=torch.int64)
        regions = SemanticMap(one, one)
    frames, theirs = _frames(content), _frames(style)
    if len(theirs) not in (1, len(frames)):
        raise ValueError(f"AdaIN per region needs one style frame or one for each of {len(frames)}, got {len(theirs)}")
    grids = [(x.shape[-2], x.shape[-1]) for x in (content, style)]
    at = regions.at(*grids)
    out = region_adain(
        frames,
        theirs,
        _per_frame(at.content, content),
        _per_frame(at.style, style),
        strength=strength,
        content_mask=None if content_mask is None else _per_frame(mask_on_grid(content_mask, grids[0]), content),
        style_mask=None if style_mask is None else _per_frame(cells_inside(style_mask, grids[1]), style),
    )
    return out if content.ndim == 4 else rearrange(out, "(b t) c h w -> b c t h w", b=len(content))


def _frames(latent: Tensor) -> Tensor:
    return latent if latent.ndim == 4 else rearrange(latent, "b c t h w -> (b t) c h w")


def _per_frame(labels: Tensor, latent: Tensor) -> Tensor:
    """One map or mask per video serves all its frames."""
    if latent.ndim == 5 and 1 < len(labels) == len(latent):
        return repeat(labels, "b h w -> (b t) h w", t=latent.shape[2])
    return labels


def _flat(x: Tensor) -> Tensor:
    """[B, C, *S] -> [B, C, pixels] in float32 at least: sums of squares overflow half precision."""
    return rearrange(x, "b c ... -> b c (...)").to(torch.promote_types(x.dtype, torch.float32))


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over pixels, [B, C, 1] each."""
    mean = x.mean(dim=-1, keepdim=True)
    return mean, (x - mean).square().mean(dim=-1, keepdim=True)


def _membership(labels: Tensor, regions: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    """One-hot [B, R, pixels] of which pixel belongs to which of the R regions."""
    flat = rearrange(labels, "b h w -> b 1 (h w)")
    return (flat == regions[:, None]).to(dtype).expand(batch, -1, -1)


def _region_moments(x: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance per region [B, C, R], and how many pixels each has [B, R]; zeros where it has none."""
    pixels = inside.sum(dim=-1)
    members = rearrange(inside, "b r n -> b n r") / pixels.clamp(min=1)[:, None, :]
    mean = x @ members
    # Two passes: the mean of squares minus the squared mean cancels badly for noisy latents far from zero.
    centred = x - mean @ inside
    return mean, centred.square() @ members, pixels


def _restyle(c: Tensor, mean_c: Tensor, var_c: Tensor, mean_s: Tensor, var_s: Tensor, eps: float) -> Tensor:
    return (c - mean_c) / (var_c + eps).sqrt() * (var_s + eps).sqrt() + mean_s


def _blend(content: Tensor, out: Tensor, strength: float) -> Tensor:
    out = out.reshape(content.shape).to(content.dtype)
    if strength == 1.0:
        return out
    return torch.lerp(content, out, strength)


def _check_pair(content: Tensor, style: Tensor, strength: float) -> None:
    if content.ndim < 3 or style.ndim < 3:
        raise ValueError(
            f"AdaIN needs [B, C, ...] tensors with pixels, got content {list(content.shape)} and style "
            f"{list(style.shape)}"
        )
    if content.shape[1] != style.shape[1]:
        raise ValueError(
            f"content has {content.shape[1]} channels and style {style.shape[1]}: both must come from the same kind of "
            "model"
        )
    if len(style) not in (1, len(content)):
        raise ValueError(
            f"AdaIN needs one style or one for each content: got {len(content)} contents, {len(style)} styles"
        )
    if 0 in content.shape or 0 in style.shape:
        raise ValueError(f"AdaIN on an empty tensor: content {list(content.shape)}, style {list(style.shape)}")
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength must be between 0 and 1, got {strength}")


def _check_region_shapes(x: Tensor, labels: Tensor, name: str) -> None:
    check_labels(labels, f"{name} labels")
    if x.ndim != 4:
        raise ValueError(f"region AdaIN needs {name} [B, C, H, W], got {list(x.shape)}")
    if labels.shape[1:] != x.shape[2:] or len(labels) not in (1, len(x)):
        raise ValueError(
            f"{name} labels {list(labels.shape)} do not fit {name} {list(x.shape)}: expected [{len(x)} or 1, "
            f"{x.shape[2]}, {x.shape[3]}]; resample_labels brings them to that grid"
        )


def _check_mask_shapes(x: Tensor, mask: Tensor | None, name: str) -> None:
    if mask is not None and (mask.shape[1:] != x.shape[2:] or len(mask) not in (1, len(x))):
        raise ValueError(
            f"{name}_masks {list(mask.shape)} do not fit {name} {list(x.shape)}: one is needed, or one for each of "
            f"{len(x)}, on the grid {list(x.shape[2:])}"
        )
