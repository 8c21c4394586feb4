"""The energies of Semantix (He et al., ICLR 2025) as functions of decoder features and attention maps.

Each is a sum over the positions of the image that is being made, one value per image; which terms are added with which
weight is the guidance's business. Gradients flow to the image that is being made only, never to the context or the
reference.

`1 - cos(u, v)` is computed as `|u - v|^2 / 2`, the same for unit vectors. Where the features agree this form and its
gradient are exactly zero, though the normalisation is smooth at zero and its vectors are a little shorter than 1.
"""

import torch
from einops import rearrange
from torch import Tensor

EPS = 1e-4


def unit(f: Tensor, eps: float = EPS) -> Tensor:
    """Features of unit length over the channels, smooth at zero: `f / sqrt(|f|^2 + eps^2)`.

    A zero vector stays zero, and no gradient exceeds `1 / eps` times the incoming one.

    Args:
        f: [B, C, ...].
    Returns:
        Same shape, in float32 at least.
    """
    f = f.to(torch.promote_types(f.dtype, torch.float32))
    return f / (f.square().sum(dim=1, keepdim=True) + eps**2).sqrt()


def style_feature_energy(out: Tensor, reference: Tensor, matches: Tensor, mask: Tensor | None = None) -> Tensor:
    """Style feature guidance `F_ref = sum_i mask[i] (1 - cos(f_out[i], sg f_ref[m(i)]))`.

    Args:
        out: [B, C, h, w] features of the image that is being made.
        reference: [B or 1, C, h', w'], another resolution or aspect ratio is fine; no gradient flows to it.
        matches: [B, h*w] integers, `m(i)` as a row-major index into the h'*w' positions: what `find_matches` gives.
        mask: [B or 1, h, w], how much each position of out counts; None for all alike.
    Returns:
        [B], in float32 at least.
    Raises:
        ValueError: shapes that do not fit. Whether the indices are those of positions is not asked: it would make the
            host wait for the device.
    """
    check_features(out, reference, "reference")
    positions = out.shape[-2:].numel()
    if matches.dtype != torch.int64 or matches.shape != (len(out), positions):
        raise ValueError(
            f"matches must be int64 [{len(out)}, {positions}], one for every position of out {list(out.shape)}, got "
            f"{matches.dtype} {list(matches.shape)}"
        )
    f_ref = rearrange(unit(reference.detach()), "b c h w -> b c (h w)").expand(len(out), -1, -1)
    matched = f_ref.gather(2, matches[:, None].expand(-1, f_ref.shape[1], -1))
    return _distance(rearrange(unit(out), "b c h w -> b c (h w)"), matched, mask)


def spatial_feature_energy(out: Tensor, context: Tensor) -> Tensor:
    """Spatial feature guidance `F_c = sum_i 1 - cos(f_out[i], sg f_c[i])`.

    Args:
        out: [B, C, h, w] features of the image that is being made.
        context: [B or 1, C, h, w]; no gradient flows to it.
    Returns:
        [B], in float32 at least.
    Raises:
        ValueError: shapes that do not fit.
    """
    check_features(out, context, "context")
    if out.shape[-2:] != context.shape[-2:]:
        raise ValueError(
            f"out {list(out.shape)} and context {list(context.shape)} are compared position by position "
            f"and must have the "
            "same grid; give the context the size of the image that is made"
        )
    return _distance(unit(out), unit(context.detach()))


def semantic_distance(out_map: Tensor, context_map: Tensor) -> Tensor:
    """Semantic distance `F_reg = sum_i |A_out[i] - sg A_c[i]|^2` of cross-attention maps, without the first token.

    Our reading: the available text names it as a regulariser, without a formula.

    Args:
        out_map: [B, P, T], share of attention that each of P positions gives each of T tokens, in the image being made.
        context_map: [B or 1, P, T]; no gradient flows to it.
    Returns:
        [B], in float32 at least.
    Raises:
        ValueError: shapes that do not fit, or fewer than two tokens.
    """
    _check_maps(out_map, context_map)
    dtype = torch.promote_types(out_map.dtype, torch.float32)
    # The first token is the start-of-text token: it takes most of the attention and names nothing.
    change = (out_map.to(dtype) - context_map.detach().to(dtype))[..., 1:]
    return change.square().sum(dim=(1, 2))


def check_features(out: Tensor, other: Tensor, name: str) -> None:
    """Raise ValueError unless both are features [B, C, h, w] of the same channels, `other` one or one for each out."""
    for f, which in ((out, "out"), (other, name)):
        if f.ndim != 4 or 0 in f.shape or not f.is_floating_point():
            raise ValueError(
                f"features of {which} must be a floating-point tensor [B, C, h, w] with no empty axis, got {f.dtype} "
                f"{list(f.shape)}"
            )
    if out.shape[1] != other.shape[1]:
        raise ValueError(
            f"out has {out.shape[1]} channels and {name} {other.shape[1]}: take both from the same stage of the same "
            "model"
        )
    if len(other) not in (1, len(out)):
        raise ValueError(f"one {name} is needed or one for each image: got {len(out)} images and {len(other)}")


def _distance(f: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum over positions of `1 - cos` of unit vectors, [B, C, ...] each, weighted by a mask [B or 1, ...] -> [B]."""
    squares = (f - target).square()
    if mask is not None:
        squares = squares.flatten(2) * mask.flatten(1)[:, None].to(squares)
    return squares.flatten(1).sum(dim=1) / 2


def _check_maps(out_map: Tensor, context_map: Tensor) -> None:
    if out_map.ndim != 3 or context_map.ndim != 3 or 0 in out_map.shape or 0 in context_map.shape:
        raise ValueError(
            f"attention maps must be [B, positions, tokens] with no empty axis, got out "
            f"{list(out_map.shape)} and context "
            f"{list(context_map.shape)}"
        )
    if out_map.shape[2] != context_map.shape[2]:
        raise ValueError(
            f"the attention map of out is over {out_map.shape[2]} tokens and that of context over "
            f"{context_map.shape[2]}: give both the same prompt, or prompts that are cut into as many tokens"
        )
    if out_map.shape[2] < 2:
        raise ValueError(
            "the first token is left out of the semantic distance, and these attention maps have no other; switch the "
            "semantic distance off (weight 0)"
        )
    if out_map.shape[1] != context_map.shape[1]:
        raise ValueError(
            f"the attention map of out has {out_map.shape[1]} positions and that of context "
            f"{context_map.shape[1]}: give "
            "the context the size of the image that is made"
        )
    if len(context_map) not in (1, len(out_map)):
        raise ValueError(
            f"one context map is needed or one for each image: got {len(out_map)} images and {len(context_map)}"
        )
