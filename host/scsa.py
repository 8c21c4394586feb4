"""SCSA on the host's MODEL (Shang et al., CVPR 2025): a patch that works under any of its samplers and guiders."""

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import torch
from torch import Tensor

from ..attention.regions import SemanticMap
from ..attention.scsa import Settings
from ..samplers.features import Layer, Options
from ..samplers.inversion import Inversion
from ..samplers.scsa import Entered, Reader, Scsa, block_inputs, self_attention_layers
from .models import check_invertible, check_same, identify
from .references import REFERENCE, merged_conds, stream_conds
from .windows import frames_of_call

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

KEY = "semantic_style_scsa"
NAMES = ("content", "style", "content map", "style map")


@dataclass(frozen=True, eq=False)
class Pictures:
    """The four references of SCSA: content, style, and the pictures of their semantic maps, inverted."""

    content: Inversion
    style: Inversion
    content_map: Inversion
    style_map: Inversion

    def __iter__(self):
        return iter((self.content, self.style, self.content_map, self.style_map))


@dataclass(frozen=True, eq=False)
class Patch:
    """What is put on a MODEL: values only, a run makes its own state of them.

    Attributes:
        pictures, regions, settings: see there.
        layers: transformer blocks; None for those of the two finest decoder levels.
        start, end: the part of the run in which it acts, in the host's percent.
        allow_other_model: the inversions may be of another checkpoint of the same structure.
    """

    pictures: Pictures
    regions: SemanticMap
    settings: Settings = field(default_factory=Settings)
    layers: tuple[Layer, ...] | None = None
    start: float = 0.0
    end: float = 1.0
    allow_other_model: bool = False


def apply_scsa(model: "ModelPatcher", patch: Patch) -> "ModelPatcher":
    """A clone of the model with SCSA in its decoder's self-attention.

    Raises:
        ValueError: a model, inversions, regions or blocks that do not fit together.
    """
    check_invertible(model)
    unet = model.model.diffusion_model
    layers = self_attention_layers(unet) if patch.layers is None else patch.layers
    known = set(self_attention_layers(unet, levels=len(unet.output_blocks)))
    if unknown := [layer for layer in layers if layer not in known]:
        blocks = sorted({layer[1] for layer in known})
        raise ValueError(
            f"this model has no self-attention in output block(s) {sorted({u[1] for u in unknown})}; those with "
            f"attention are {blocks}"
        )
    if not 0.0 <= patch.start <= patch.end <= 1.0:
        raise ValueError(f"SCSA acts from {patch.start} to {patch.end}: both between 0 and 1, start not after end")
    now = identify(model)
    for picture in patch.pictures:
        check_same(picture.model, now, patch.allow_other_model)
    _check_pictures(patch.pictures)
    _check_maps(patch)
    if KEY in model.model_options.get("transformer_options", {}).get("wrappers", {}).get("outer_sample", {}):
        raise ValueError("this MODEL has SCSA already: connect the model from before that node")
    patched = model.clone()
    kind = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
    patched.add_wrapper_with_key(kind, KEY, _Sampling(replace(patch, layers=layers)))
    return patched


def _check_pictures(pictures: Pictures) -> None:
    for mine, its_map, name in (
        (pictures.content, pictures.content_map, "content"),
        (pictures.style, pictures.style_map, "style"),
    ):
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

    def __init__(self, patch: Patch) -> None:
        self.patch = patch

    def __call__(self, executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        content = self.patch.pictures.content.clean
        if noise.shape[1:] != content.shape[1:] or len(noise) % len(content):
            raise ValueError(
                f"SCSA was made for a content latent {list(content.shape)}, the one being sampled is "
                f"{list(noise.shape)}: sample at the content's size, one picture or a multiple of the contents"
            )
        guider = executor.class_obj
        run = _Run(self.patch, guider)
        kind = comfy.patcher_extension.WrappersMP.CALC_COND_BATCH
        # The options are this run's own copy.
        comfy.patcher_extension.add_wrapper_with_key(kind, KEY, run, guider.model_options, is_model_options=True)
        out = executor(noise, *args, **kwargs)
        if not run.fired:
            logging.warning(
                "Semantic Style: SCSA never acted in this run: %s.",
                "no step lies in its start to end range"
                if not run.levels
                else "none of its blocks was called; was it made for another model?",
            )
        return out


class _Run:
    """CALC_COND_BATCH: the references' call at every new level, then the picture's with its patches."""

    def __init__(self, patch: Patch, guider: Any) -> None:
        self.patch, self.guider = patch, guider
        self.scsa: Scsa | None = None
        self.at: Hashable = None
        self.conds: dict[int, list[dict]] = {}
        self.levels = 0

    @property
    def fired(self) -> int:
        return 0 if self.scsa is None else self.scsa.fired

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
        level = float(timestep[0])
        if model_options.get("transformer_options", {}).get(REFERENCE) or not self._acts(model, level):
            return executor(model, conds, x, timestep, model_options, *args, **kwargs)
        if (timestep != timestep[0]).any():
            raise ValueError("SCSA takes one noise level per call; use it with a sampler, not with an inversion node")
        if frames_of_call(model_options.get("transformer_options", {})) is not None:
            raise ValueError("SCSA does not know context windows: sample the whole clip at once, or frame by frame")
        unet = model.diffusion_model
        assert self.patch.layers is not None
        with block_inputs(unet, self.patch.layers) as seen:
            if self.scsa is None:
                self.scsa = Scsa(unet, self.patch.layers, self.patch.regions, self.patch.settings, seen)
            self.scsa.seen = seen
            self._prepare(executor, level, x, timestep, model_options)
            options = comfy.model_patcher.create_model_options_clone(model_options)
            options["transformer_options"] = self.scsa.options(options.get("transformer_options"))
            return executor(model, conds, x, timestep, options, *args, **kwargs)

    def _acts(self, model: Any, level: float) -> bool:
        at = model.model_sampling.percent_to_sigma
        return at(self.patch.end) <= level <= at(self.patch.start)

    def _prepare(self, executor: Callable, level: float, x: Tensor, timestep: Tensor, model_options: dict) -> None:
        """Once for a level, however many calls a sampler makes at it."""
        assert self.scsa is not None
        if self.at == level:
            return
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.scsa.prepared.clear()
        pictures = self.patch.pictures
        # Tensors that a guided run's graph may keep must be ordinary ones.
        with torch.inference_mode(False), torch.no_grad():
            entered: dict[int, Entered] = {}
            for group in _groups(list(pictures)):
                latents = [list(pictures)[i].at(level).to(x) for i in group]
                for part, seen in zip(
                    group, self._read(executor, group, latents, timestep, model_options), strict=True
                ):
                    entered[part] = seen
            self.scsa.at_level(*(entered[i] for i in range(len(NAMES))))
        self.at = level
        self.levels += 1

    def _read(
        self, executor: Callable, group: list[int], latents: list[Tensor], timestep: Tensor, model_options: dict
    ) -> list[Entered]:
        """What enters the blocks for pictures of one size, in one call where their prompts allow it."""
        assert self.scsa is not None
        prompts = [self._conds(i, latent) for i, latent in zip(group, latents, strict=True)]
        rows = [len(latent) for latent in latents]
        merged = merged_conds(prompts, rows)
        calls = [([merged], torch.cat(latents))] if merged else list(zip(prompts, latents, strict=True))
        read = []
        for conds, latent in calls:
            reader = Reader(self.scsa.layers, self.scsa.seen)
            options = comfy.model_patcher.create_model_options_clone(model_options)
            to: Options = {
                k: v for k, v in options.get("transformer_options", {}).items() if not k.startswith("patches")
            }
            options["transformer_options"] = {**reader.options(to), REFERENCE: True}
            with torch.inference_mode():
                sigma = timestep[:1].expand(len(latent)).clone()
                executor(self.guider.inner_model, [conds], latent.clone(), sigma, options)
            read.append(reader.read())
        if not merged:
            return read
        starts = [sum(rows[:i]) for i in range(len(rows))]
        return [read[0].rows(slice(start, start + n)) for start, n in zip(starts, rows, strict=True)]

    def _conds(self, which: int, like: Tensor) -> list[dict]:
        if which not in self.conds:
            given = list(self.patch.pictures)[which].positive
            prompt = self.guider.original_conds.get("negative") if given is None else None
            if given is None and prompt is None:
                raise ValueError(f"the {NAMES[which]}'s inversion has no prompt: invert it again, do not load it")
            self.conds[which] = stream_conds(self.guider, given, like, prompt)
        return self.conds[which]


def _groups(pictures: list[Inversion]) -> list[list[int]]:
    """Pictures of one latent size share a call."""
    sizes: dict[torch.Size, list[int]] = {}
    for i, picture in enumerate(pictures):
        sizes.setdefault(picture.clean.shape[1:], []).append(i)
    return list(sizes.values())
