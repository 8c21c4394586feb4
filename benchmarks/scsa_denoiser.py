"""SCSA on the demo model without ComfyUI (Shang et al., CVPR 2025; the mathematics is in attention/scsa.py)."""

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..attention.layers import Options, self_attention_layers
from ..attention.scsa_attention import Settings
from ..attention.scsa_patch import Entered, Reader, Scsa, block_inputs, uses_map_pictures
from ..paperland.model import Paperland
from ..regions.semantic_map import SemanticMap
from ..samplers.ddim_inversion import ddim_inversion
from ..samplers.inversion import Inversion

# What entered the blocks for a picture at a level, by (inversion, level). Share one between runs with the same empty
# prompt to pay for references once; keep the inversions alive as long as it.
Read: TypeAlias = MutableMapping[tuple[int, float], Entered]


@dataclass(frozen=True, eq=False)
class Pictures:
    """The four references, inverted: content, style, and the pictures of their semantic maps; latents of one size.

    The maps' pictures may be left out where SCSA does not look at them (a1 0, or t1 0).
    """

    content: Inversion
    style: Inversion
    content_map: Inversion | None = None
    style_map: Inversion | None = None

    @property
    def given(self) -> list[Inversion]:
        """Those that there are, in this order."""
        return [p for p in (self.content, self.style, self.content_map, self.style_map) if p is not None]


@torch.no_grad()
def invert(model: Paperland, clean: Tensor, sigmas: Tensor, prompt: Tensor, read: Read) -> Inversion:
    """DDIM inversion whose own calls tell what enters the blocks: no other is needed at its levels but the noisiest.

    Args:
        clean: [B, C, h, w] of `encode_pixels`; sigmas: [N+1]; prompt: [1, tokens, channels].
        read: added to.
    """
    layers = self_attention_layers(model.unet)
    levels: dict[float, Entered] = {}
    with block_inputs(model.unet, layers) as seen:

        def call(x: Tensor, sigma: Tensor) -> Tensor:
            reader = Reader(layers, seen)
            denoised = model(x, sigma, prompt.expand(len(x), -1, -1), reader.options())
            # The first call, of the clean latent, is at the level of the second, which then takes its place here.
            levels[float(sigma[0])] = reader.read()
            return denoised

        inversion = ddim_inversion(call, clean, sigmas)
    if inversion.steps > 1:
        read.update({(id(inversion), level): entered for level, entered in levels.items()})
    return inversion


class ScsaDenoiser:
    """`model(x, sigma) -> denoised` with SCSA in the self-attention of the decoder's two finest levels.

    Args:
        model: runs where its weights are.
        pictures: one style for all contents or one for each; x has as many rows as contents, or a multiple.
        regions: content and style maps at any resolution.
        settings: see `attention.scsa.Settings`.
        positive, negative: [1 or B, tokens, channels] of `model.text`; the negative may be None at cfg 1.
        reference: [1, tokens, channels], the prompt that the references were inverted with; None for `positive`.
        cfg: guidance scale.
        read: what is known of the references from earlier runs, added to.
        options: other patches of the image being made; the references run without.
    Raises:
        ValueError: references that are missing or of different sizes, no negative prompt where cfg needs one.
    """

    def __init__(
        self,
        model: Paperland,
        pictures: Pictures,
        regions: SemanticMap,
        settings: Settings,
        positive: Tensor,
        negative: Tensor | None = None,
        reference: Tensor | None = None,
        cfg: float = 1.0,
        read: Read | None = None,
        options: Options | None = None,
    ) -> None:
        if uses_map_pictures(settings) and len(pictures.given) != 4:
            raise ValueError("SCSA needs the inverted pictures of both semantic maps, unless a1 or t1 is 0")
        sizes = {tuple(p.clean.shape[1:]) for p in pictures.given}
        if len(sizes) != 1:
            raise ValueError(f"the references must have latents of one size, got {sorted(sizes)}")
        if negative is None and cfg != 1.0:
            raise ValueError(f"cfg {cfg} needs a negative prompt; at cfg 1 there is none")
        self.model, self.cfg = model, cfg
        self.pictures = pictures.given if uses_map_pictures(settings) else [pictures.content, pictures.style]
        self.positive, self.negative = positive, positive if negative is None else negative
        self.reference = positive if reference is None else reference
        self.read: Read = {} if read is None else read
        self.base = options
        self.layers = self_attention_layers(model.unet)
        self.scsa = Scsa(model.unet, self.layers, regions, settings, {})
        self.reference_calls = 0
        self._level: float | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        level = float(sigma[0])
        with block_inputs(self.model.unet, self.layers) as seen:
            self.scsa.seen = seen
            if level != self._level:
                self.scsa.at_level(*self._entered(level, x, seen))
                self._level = level
            options = self.scsa.options(self.base)
            return self.model.guided(self.positive, self.negative, self.cfg, options)(x, sigma)

    def _entered(self, level: float, like: Tensor, seen: dict) -> list[Entered]:
        """Of all references at a level; those not known yet in one call of the model."""
        missing = {id(p): p for p in self.pictures if (id(p), level) not in self.read}
        if missing:
            latents = [p.at(level).to(like) for p in missing.values()]
            x = torch.cat(latents)
            reader = Reader(self.layers, seen)
            self.model(x, x.new_full((len(x),), level), self.reference.expand(len(x), -1, -1), reader.options())
            self.reference_calls += 1
            entered, start = reader.read(), 0
            for key, latent in zip(missing, latents, strict=True):
                self.read[key, level] = entered.rows(slice(start, start + len(latent)))
                start += len(latent)
        return [self.read[id(p), level] for p in self.pictures]
