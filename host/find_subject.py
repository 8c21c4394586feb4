"""The subject of a picture through the host's model: decoder features are read and `regions.saliency` cuts them, or
`regions.word_subject` finds what a word names."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import comfy.model_management
import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.layers import feature_blocks, word_layers
from ..regions.saliency import THRESHOLD, Saliency, check_threshold, find_subject
from ..regions.word_subject import check_share, find_by_word
from ..samplers.inversion import Inversion
from .class_word import empty_prompt, word_prompt
from .model_sampling import check_unet
from .models import check_channels, check_same, identify
from .reading import FeatureCall, WordMaps, check_sigma, read_features

if TYPE_CHECKING:
    import comfy.sd
    from comfy.model_patcher import ModelPatcher

SIGMA = 0.3
LOOKS = 4
# At which a word's attention is read, each with as many looks: where it is told where things go, not how they look.
WORD_SIGMAS = (0.6, 1.0, 1.5)
# Newer hosts' latent formats tell; SD's is this.
DOWNSCALE = 8


@dataclass(frozen=True, eq=False)
class SubjectRequest:
    """Whose subject is looked for, and how.

    Attributes:
        model: the host's MODEL; see `host.reading.read_features`.
        reference: the pictures, as LATENT samples [B, C, H, W] in the host's coordinates or as an inversion.
        conditioning: the prompt to read with; None for what the inversion was made with, or with a word for the empty
            one.
        sigma: noise level at which features are read.
        looks: how many noises they are averaged over. seed: of the first noise, the next number is the next one's.
        threshold: see `regions.saliency.find_subject`, and with a word `share` of `regions.word_subject.find_by_word`.
        allow_other_model: the inversion may be of another checkpoint of the same structure.
        clip: the model's CLIP, for a word.
        class_word: what the subject is, in a word or a few; empty for whatever stands out.
    """

    model: "ModelPatcher"
    reference: Tensor | Inversion
    conditioning: list | None = None
    sigma: float = SIGMA
    looks: int = LOOKS
    seed: int = 0
    threshold: float = THRESHOLD
    allow_other_model: bool = False
    clip: "comfy.sd.CLIP | None" = None
    class_word: str = ""

    @property
    def word(self) -> str:
        return self.class_word.strip()


def find_subjects(request: SubjectRequest) -> list[Saliency | str]:
    """The subject of each of the pictures, on the grid of the model's finest features; where there is none, why.

    Raises:
        ValueError: a model, a reference or settings that do not go together, before any model call.
        FloatingPointError: features that are not finite.
    """
    clean, prompt = _check(request)
    told = word_prompt(request.clip, request.word) if request.clip is not None and request.word else None
    looks = [FeatureCall(clean, prompt, request.seed + i) for i in range(request.looks)]
    stages = [features.stages[-1] for features in read_features(request.model, looks, request.sigma)]
    _check_finite(stages)
    mean = torch.stack([F.normalize(stage, dim=1) for stage in stages]).mean(dim=0)
    check = comfy.model_management.throw_exception_if_processing_interrupted
    if told is None:
        return [_or_why(partial(find_subject, f, request.threshold, check=check)) for f in mean]
    levels = _attention(request, clean, *told)
    found = []
    for i, f in enumerate(mean):
        check()
        found.append(_or_why(partial(find_by_word, f, [[m[i] for m in level] for level in levels], request.threshold)))
    return found


def _or_why(find: Callable[[], Saliency]) -> Saliency | str:
    try:
        return find()
    except ValueError as error:
        return str(error)


def _check_finite(read: list[Tensor]) -> None:
    if not all(torch.isfinite(t).all() for t in read):
        raise FloatingPointError("the reference's features contain NaN or infinity: try the model in float32")


def _attention(request: SubjectRequest, clean: Tensor, prompt: list, tokens: tuple[int, ...]) -> list[list[Tensor]]:
    """The word's attention [B, h, w] of each layer of each decoder level, the mean over noise levels and looks."""
    levels = word_layers(request.model.model.diffusion_model)
    word = WordMaps(tuple(layer for level in levels for layer in level), tokens)
    looks = [FeatureCall(clean, prompt, request.seed + i) for i in range(request.looks)]
    read = [features for sigma in WORD_SIGMAS for features in read_features(request.model, looks, sigma, word)]
    means = [torch.stack(maps).mean(dim=0) for maps in zip(*(features.maps for features in read), strict=True)]
    _check_finite(means)
    on_grids = iter([m[..., 0].unflatten(1, grid) for m, grid in zip(means, read[0].grids, strict=True)])
    return [[next(on_grids) for _ in level] for level in levels]


def pixel_size(model: "ModelPatcher", reference: Tensor | Inversion) -> tuple[int, int]:
    """Height and width in pixels of the picture that a reference holds."""
    ratio = getattr(model.get_model_object("latent_format"), "spacial_downscale_ratio", DOWNSCALE)
    h, w = (reference.clean if isinstance(reference, Inversion) else reference).shape[-2:]
    return h * ratio, w * ratio


def _check_word(request: SubjectRequest) -> None:
    if not request.word:
        check_threshold(request.threshold)
        return
    if request.clip is None:
        raise ValueError(
            f"to find {request.word!r} in the picture its text encoder is needed: connect the model's CLIP to clip, or "
            "leave class_word empty"
        )
    check_share(request.threshold)
    word_layers(request.model.model.diffusion_model)


def _check(request: SubjectRequest) -> tuple[Tensor, list]:
    """The clean latents in the model's coordinates and the prompt."""
    model, reference = request.model, request.reference
    check_unet(model)
    feature_blocks(model.model.diffusion_model)
    check_sigma(request.sigma)
    _check_word(request)
    if request.looks < 1:
        raise ValueError(f"looks must be 1 or more, got {request.looks}")
    prompt = request.conditioning
    if isinstance(reference, Inversion):
        check_same(reference.model, identify(model), request.allow_other_model)
        clean = reference.clean
        prompt = prompt or reference.positive
    else:
        check_channels(model, reference)
        clean = model.get_model_object("latent_format").process_in(reference)
    if not prompt and request.word:
        prompt = empty_prompt(request.clip)
    if not prompt:
        raise ValueError(
            "connect a prompt to look at the reference with: the empty prompt (CLIP Text Encode without words) is a "
            "good choice. Only an inversion that was made in this session brings its own"
        )
    if clean.ndim != 4:
        raise ValueError(
            "subjects are found in pictures, or in clips whose frames are the batch [frames, C, H, W]; the "
            f"reference's latent is {list(clean.shape)}"
        )
    if not torch.isfinite(clean).all():
        raise ValueError("the reference's latent contains NaN or infinity: encode the picture again")
    return clean, prompt
