"""The subject of a picture through the host's model: decoder features are read, `attention.saliency` cuts them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import comfy.model_management
import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.layers import feature_blocks
from ..regions.saliency import THRESHOLD, Saliency, check_threshold, find_subject
from ..samplers.inversion import Inversion
from .model_sampling import check_unet
from .models import check_channels, check_same, identify
from .reading import FeatureCall, check_sigma, read_features

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

SIGMA = 0.3
LOOKS = 4
# Newer hosts' latent formats tell; SD's is this.
DOWNSCALE = 8


@dataclass(frozen=True, eq=False)
class SubjectRequest:
    """Whose subject is looked for, and how.

    Attributes:
        model: the host's MODEL; see `host.reading.read_features`.
        reference: the pictures, as LATENT samples [B, C, H, W] in the host's coordinates or as an inversion.
        conditioning: the prompt to read with; None for what the inversion was made with.
        sigma: noise level at which features are read.
        looks: how many noises they are averaged over. seed: of the first noise, the next number is the next one's.
        threshold: see `attention.saliency.find_subject`.
        allow_other_model: the inversion may be of another checkpoint of the same structure.
    """

    model: "ModelPatcher"
    reference: Tensor | Inversion
    conditioning: list | None = None
    sigma: float = SIGMA
    looks: int = LOOKS
    seed: int = 0
    threshold: float = THRESHOLD
    allow_other_model: bool = False


def find_subjects(request: SubjectRequest) -> list[Saliency | str]:
    """The subject of each of the pictures, on the grid of the model's finest features; where there is none, why.

    Raises:
        ValueError: a model, a reference or settings that do not go together, before any model call.
        FloatingPointError: features that are not finite.
    """
    clean, prompt = _check(request)
    looks = [FeatureCall(clean, prompt, request.seed + i) for i in range(request.looks)]
    stages = [features.stages[-1] for features in read_features(request.model, looks, request.sigma)]
    if not all(torch.isfinite(stage).all() for stage in stages):
        raise FloatingPointError("the reference's features contain NaN or infinity: try the model in float32")
    check = comfy.model_management.throw_exception_if_processing_interrupted
    mean = torch.stack([F.normalize(stage, dim=1) for stage in stages]).mean(dim=0)
    found: list[Saliency | str] = []
    for features in mean:
        try:
            found.append(find_subject(features, request.threshold, check=check))
        except ValueError as error:
            found.append(str(error))
    return found


def pixel_size(model: "ModelPatcher", reference: Tensor | Inversion) -> tuple[int, int]:
    """Height and width in pixels of the picture that a reference holds."""
    ratio = getattr(model.get_model_object("latent_format"), "spacial_downscale_ratio", DOWNSCALE)
    h, w = (reference.clean if isinstance(reference, Inversion) else reference).shape[-2:]
    return h * ratio, w * ratio


def _check(request: SubjectRequest) -> tuple[Tensor, list]:
    """The clean latents in the model's coordinates and the prompt."""
    model, reference = request.model, request.reference
    check_unet(model)
    feature_blocks(model.model.diffusion_model)
    check_sigma(request.sigma)
    check_threshold(request.threshold)
    if request.looks < 1:
        raise ValueError(f"looks must be 1 or more, got {request.looks}")
    prompt = request.conditioning
    if isinstance(reference, Inversion):
        check_same(reference.model, identify(model), request.allow_other_model)
        clean = reference.clean
        prompt = reference.positive if prompt is None else prompt
    else:
        check_channels(model, reference)
        clean = model.get_model_object("latent_format").process_in(reference)
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
