"""SCSA on the host's MODEL (Shang et al., CVPR 2025): a patch that works under any of its samplers and guiders."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import comfy.model_patcher
import comfy.patcher_extension
from torch import Tensor

from ..attention.layers import Layer, Options, layers_of_blocks, name_of, self_attention_layers
from ..attention.scsa_attention import ScsaSettings
from ..attention.scsa_patch import Scsa, block_inputs, check_free, uses_map_pictures
from ..regions.semantic_map import SemanticMap
from ..samplers.inversion import Inversion
from .conditioning import REFERENCE
from .invert import InversionSampler
from .levels import levels_of
from .model_sampling import check_unet
from .models import check_same, identify
from .reference_cache import ReferenceCache
from .scsa_references import ScsaReferences
from .versions import without_clones
from .windows import window_of_call

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

KEY = "semantic_style_scsa"
OUTER_SAMPLE = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
CALC_COND_BATCH = comfy.patcher_extension.WrappersMP.CALC_COND_BATCH
# The stock node (Kohya Deep Shrink).
CHANGES_GRIDS = "PatchModelAddDownscale"


@dataclass(frozen=True, eq=False)
class Pictures:
    """The four references of SCSA: content, style, and the pictures of their semantic maps, inverted.

    The maps' pictures may be left out where the settings give them no weight.
    """

    content: Inversion
    style: Inversion
    content_map: Inversion | None = None
    style_map: Inversion | None = None


@dataclass(frozen=True, eq=False)
class Patch:
    """What is put on a MODEL: values only, a run makes its own state of them.

    Attributes:
        pictures, regions, settings: see there.
        blocks: numbers of output blocks; None for those of the two finest decoder levels with attention.
        start, end: the part of the run in which it acts, in the host's percent.
        allow_other_model: the inversions may be of another checkpoint of the same structure.
    """

    pictures: Pictures
    regions: SemanticMap
    settings: ScsaSettings = field(default_factory=ScsaSettings)
    blocks: tuple[int, ...] | None = None
    start: float = 0.0
    end: float = 1.0
    allow_other_model: bool = False

    @property
    def references(self) -> list[Inversion]:
        """The pictures that have any weight, in the order of `scsa_references.NAMES`."""
        p = self.pictures
        maps = (p.content_map, p.style_map) if uses_map_pictures(self.settings) else ()
        return [p.content, p.style, *(m for m in maps if m is not None)]


def apply_scsa(model: "ModelPatcher", patch: Patch, cache: ReferenceCache | None = None) -> "ModelPatcher":
    """A clone of the model with SCSA in its decoder's self-attention.

    Args:
        cache: of what enters the blocks for the references, kept from inversions and between runs; None for none.
    Raises:
        ValueError: a model, inversions, regions or blocks that do not fit together.
    """
    check_unet(model)
    unet = model.model.diffusion_model
    layers = self_attention_layers(unet) if patch.blocks is None else layers_of_blocks(unet, patch.blocks)
    if not 0.0 <= patch.start <= patch.end <= 1.0:
        raise ValueError(f"SCSA acts from {patch.start} to {patch.end}: both between 0 and 1, start not after end")
    now = identify(model)
    _check_pictures(patch)
    for picture in patch.references:
        check_same(picture.model, now, patch.allow_other_model)
    _check_maps(patch)
    if model.get_wrappers(OUTER_SAMPLE, KEY):
        raise ValueError(
            "this MODEL has SCSA already: connect the model from before that node. For several styles stitch their "
            "pictures, and the pictures of their maps, into one each (see the node's help)"
        )
    check_free(layers, model.model_options.get("transformer_options", {}))
    patched = model.clone()
    patched.add_wrapper_with_key(OUTER_SAMPLE, KEY, _Sampling(patch, layers, cache))
    return patched


def _check_pictures(patch: Patch) -> None:
    pictures = patch.pictures
    for mine, its_map, name in (
        (pictures.content, pictures.content_map, "content"),
        (pictures.style, pictures.style_map, "style"),
    ):
        if not uses_map_pictures(patch.settings):
            continue
        if its_map is None:
            raise ValueError(f"SCSA needs the picture of the {name}'s map, inverted, unless a1 is 0")
        a, b = list(mine.clean.shape), list(its_map.clean.shape)
        if a[1:] != b[1:] or b[0] not in (1, a[0]):
            raise ValueError(
                f"the {name}'s latent is {a} (batch, channels, size), that of its map picture {b}: both must have one "
                "size; draw the map at the size of the picture"
            )
    if len(pictures.style.clean) not in (1, len(pictures.content.clean)):
        raise ValueError(
            f"SCSA needs one style or one for each content: got {len(pictures.content.clean)} contents and "
            f"{len(pictures.style.clean)} styles"
        )


def _check_maps(patch: Patch) -> None:
    for labels, picture, name in (
        (patch.regions.content, patch.pictures.content, "content"),
        (patch.regions.style, patch.pictures.style, "style"),
    ):
        if len(labels) not in (1, len(picture.clean)):
            raise ValueError(
                f"the semantic map has {len(labels)} {name} maps for {len(picture.clean)} pictures: it needs one, or "
                "one for each"
            )


class _Sampling:
    """OUTER_SAMPLE: makes a run's state, and says so when the run never used it."""

    def __init__(self, patch: Patch, layers: tuple[Layer, ...], cache: ReferenceCache | None) -> None:
        self.patch, self.layers, self.cache = patch, layers, cache

    def __call__(
        self, executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, *args: Any, **kwargs: Any
    ) -> Tensor:
        guider, content = executor.class_obj, self.patch.pictures.content.clean
        if isinstance(sampler, InversionSampler):
            raise ValueError("this MODEL has SCSA, which makes pictures: invert with the model from before that node")
        if noise.shape[1] == content.shape[1] and noise.ndim == 4 and noise.shape[2:] != content.shape[2:]:
            (h, w), (theirs_h, theirs_w) = noise.shape[2:], content.shape[2:]
            raise ValueError(
                f"SCSA was made for a content latent of {theirs_w}x{theirs_h}, the one being sampled is {w}x{h}. For a "
                "pass at another size (hires fix) add four nodes: Upscale Image of the content's picture to that size, "
                "VAE Encode, DDIM Inversion of it (the same prompt and steps), and its own Apply SCSA with that "
                "inversion as content, the same style and semantic_map, on the MODEL from before the first Apply SCSA; "
                "that one's MODEL goes to this sampler"
            )
        if noise.shape[1:] != content.shape[1:] or len(noise) % len(content):
            raise ValueError(
                f"SCSA was made for a content latent {list(content.shape)}, the one being sampled is "
                f"{list(noise.shape)}: sample at the content's size, one picture or a multiple of the contents"
            )
        to = guider.model_options.get("transformer_options", {})
        check_free(self.layers, to)
        check_grids(to)
        run = _ScsaRun(self.patch, self.layers, guider, self.cache)
        # The options are this run's own copy.
        comfy.patcher_extension.add_wrapper_with_key(
            CALC_COND_BATCH, KEY, run, guider.model_options, is_model_options=True
        )
        out = executor(noise, latent_image, sampler, *args, **kwargs)
        if reason := run.why_nothing():
            logging.warning("Semantic Style: SCSA never acted in this run: %s.", reason)
        return out


def check_grids(options: Options) -> None:
    """Raise ValueError where a patch in `transformer_options` makes the network work on other grids than the
    references'.
    """
    patches = options.get("patches", {})
    for patch in [p for kind in ("input_block_patch", "input_block_patch_after_skip") for p in patches.get(kind, ())]:
        if CHANGES_GRIDS in name_of(patch):
            raise ValueError(
                f"SCSA compares tokens of the picture with those of its references, and {CHANGES_GRIDS} on this MODEL "
                "makes the picture's grid smaller for a part of the run: take that node out"
            )


class _ScsaRun:
    """CALC_COND_BATCH: the references' call at every new level, then the picture's with its patches."""

    def __init__(self, patch: Patch, layers: tuple[Layer, ...], guider: Any, cache: ReferenceCache | None) -> None:
        self.patch, self.layers = patch, layers
        self.references = ScsaReferences(guider, patch.references, layers, cache)
        self.scsa: Scsa | None = None
        self.level: float | None = None

    def why_nothing(self) -> str:
        """Why the run did not use SCSA, empty where it did."""
        if self.scsa is None:
            return "no step lies in its start to end range"
        return "" if self.scsa.fired else "none of its blocks was called"

    def __call__(
        self,
        executor: Callable,
        model: Any,
        conds: list,
        x: Tensor,
        timestep: Tensor,
        model_options: dict,
        *args: Any,
        **kwargs: Any,
    ) -> list[Tensor]:
        to = model_options.get("transformer_options", {})
        if to.get(REFERENCE):
            return executor(model, conds, x, timestep, model_options, *args, **kwargs)
        level, *others = levels_of(timestep, to)
        if not self._acts(model, level):
            if self.scsa is not None:
                self.scsa.prepared.clear()
            self.level = None
            return executor(model, conds, x, timestep, model_options, *args, **kwargs)
        if any(other != level for other in others):
            raise ValueError("SCSA takes one noise level per call; use it with a sampler, not with an inversion node")
        if window_of_call(to) is not None:
            raise ValueError("SCSA does not know context windows: sample the whole clip at once, or frame by frame")
        if any(cond.get("area") is not None for branch in conds for cond in branch or ()):
            raise ValueError("SCSA works on whole pictures: use masks in place of prompts for areas")
        unet, model_options = model.diffusion_model, without_clones(model_options)
        with block_inputs(unet, self.layers) as seen:
            if self.scsa is None:
                self.scsa = Scsa(unet, self.layers, self.patch.regions, self.patch.settings, seen)
            self.scsa.seen = seen
            # Once for a level, however many calls a sampler makes at it.
            if self.level != level:
                self.scsa.at_level(*self.references.at(executor, model, x, level, timestep, model_options, seen))
                self.level = level
            options = comfy.model_patcher.create_model_options_clone(model_options)
            options["transformer_options"] = self.scsa.options(options.get("transformer_options"))
            return executor(model, conds, x, timestep, options, *args, **kwargs)

    def _acts(self, model: Any, level: float) -> bool:
        at = model.model_sampling.percent_to_sigma
        return at(self.patch.end) <= level <= at(self.patch.start)
