"""Counterparts of SCSA's nodes for the demo graphs without ComfyUI; see standalone.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..attention.color_maps import regions_from_colors
from ..attention.regions import SemanticMap
from ..attention.scsa import Settings
from ..samplers.ddim_inversion import ddim_inversion
from ..samplers.inversion import Inversion
from .map_pictures import draw_map
from .model import Paperland
from .overlay import overlay_map
from .scsa import Pictures, ScsaDenoiser

Report = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class WithScsa:
    """The MODEL that Apply SCSA gives: to be guided, not to be inverted with."""

    model: Paperland
    pictures: Pictures
    regions: SemanticMap
    settings: Settings
    prompt: Tensor

    def guided(self, positive: Tensor, negative: Tensor | None, cfg: float) -> ScsaDenoiser:
        return ScsaDenoiser(
            self.model, self.pictures, self.regions, self.settings, positive, negative, self.prompt, cfg
        )


def map_from_colors(report: Report, content: Tensor, style: Tensor, number: int = 0, smallest: float = 0.5) -> tuple:
    return regions_from_colors(content, style, number, smallest / 100).regions, ""


def preview_map(
    report: Report,
    semantic_map: SemanticMap,
    opacity: float = 0.5,
    content: Tensor | None = None,
    style: Tensor | None = None,
) -> tuple:
    return (overlay_map(semantic_map, content, style, opacity),)


def apply_scsa(
    report: Report,
    model: Paperland,
    content: Inversion,
    style: Inversion,
    semantic_map: SemanticMap,
    temperature: float,
    t1: float,
    t2: float,
    a1: float,
    a2: float,
    blocks: str = "",
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    vae: Any = None,
    content_map: Inversion | None = None,
    style_map: Inversion | None = None,
    allow_other_model: bool = False,
) -> tuple:
    if blocks or (start_percent, end_percent) != (0.0, 1.0):
        raise ValueError("SCSA in some blocks, or in a part of the run, works in ComfyUI only")
    assert content.positive is not None
    prompt = content.positive[0][0]
    if content_map is None or style_map is None:
        # Not needed where they have no weight, but the run without ComfyUI is not where time is saved.
        drawn = _map_pictures(report, model, (content, style), semantic_map, prompt, vae)
        content_map, style_map = content_map or drawn[0], style_map or drawn[1]
    pictures = Pictures(content, style, content_map, style_map)
    return (WithScsa(model, pictures, semantic_map, Settings(temperature, t1, t2, a1, a2), prompt),)


def _map_pictures(
    report: Report,
    model: Paperland,
    pictures: tuple[Inversion, Inversion],
    regions: SemanticMap,
    prompt: Tensor,
    vae: Any,
) -> tuple[Inversion, Inversion]:
    """Both maps as pictures of one size, inverted as one batch."""
    like = pictures[0].clean
    h, w = (vae.PATCH * side for side in like.shape[-2:])
    latents = [vae.encode_pixels(picture).to(like) for picture in draw_map(regions, (h, w), (h, w))]
    both = ddim_inversion(
        model.guided(prompt, prompt, 1.0),
        torch.cat(latents),
        pictures[0].sigmas,
        callback=lambda state: report(state["i"] + 1, state["total"]),
    )
    first = len(latents[0])
    content, style = (
        replace(both, clean=both.clean[rows], trajectory=both.trajectory[:, rows])
        for rows in (slice(0, first), slice(first, None))
    )
    return content, style


NODES: dict[str, Callable[..., tuple]] = {
    "SemanticStyleApplySCSA": apply_scsa,
    "SemanticStyleMapFromColors": map_from_colors,
    "SemanticStylePreviewMap": preview_map,
}
