"""Semantic maps from the decoder features of two inversions, read through the host's model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import comfy.model_management
import torch

from ..attention.layers import feature_blocks
from ..regions.clustering import Clustering, check_regions, cluster, joint_vectors
from ..regions.semantic_map import SemanticMap
from ..samplers.features import Features
from ..samplers.inversion import Inversion
from .model_sampling import check_unet
from .models import check_same, identify
from .reading import MIDDLE_SIGMA, FeatureCall, check_sigma, read_features

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


@dataclass(frozen=True, eq=False)
class MapRequest:
    """What to make a map of, and how.

    Attributes:
        model: the host's MODEL; patches of its attention and its other hooks by this pack are left aside, weights'
            patches stay.
        content, style: one picture each or equally many, or several and one for all.
        conditioning: the prompt to read both with; None for what each was inverted with.
        sigma: noise level at which the features are read; the noise is drawn from the seed.
        regions, smoothing, seed: see `attention.clustering.cluster`.
        allow_other_model: the inversions may be of another checkpoint of the same structure.
    """

    model: "ModelPatcher"
    content: Inversion
    style: Inversion
    conditioning: list | None = None
    sigma: float = MIDDLE_SIGMA
    regions: int = 0
    smoothing: int = 1
    seed: int = 0
    allow_other_model: bool = False

    @property
    def sides(self) -> tuple[Inversion, Inversion]:
        return self.content, self.style


def auto_map(request: MapRequest) -> tuple[SemanticMap, list[Clustering]]:
    """Regions that content and style share, on the grid of the finest features.

    With several contents and one style (a video's frames) all are clustered together; with several of both every pair
    is by itself, and labels mean something within their pair only.

    Returns:
        the map, and what was found: one entry, or one for each pair.
    Raises:
        ValueError: a model, inversions or settings that do not go together, before any model call.
        FloatingPointError: features that are not finite.
    """
    _check(request)
    looks = [FeatureCall(side.clean, _prompt(request, side), request.seed) for side in request.sides]
    return _cluster(request, *read_features(request.model, looks, request.sigma))


def _check(request: MapRequest) -> None:
    check_unet(request.model)
    feature_blocks(request.model.model.diffusion_model)
    check_regions(request.regions)
    if request.smoothing < 0:
        raise ValueError(f"smoothing must be 0 (off) or more rounds, got {request.smoothing}")
    check_sigma(request.sigma)
    now = identify(request.model)
    for side, name in zip(request.sides, ("content", "style"), strict=True):
        check_same(side.model, now, request.allow_other_model)
        if side.clean.ndim != 4:
            raise ValueError(
                f"maps are made of pictures, or of clips whose frames are the batch [frames, C, H, W]; the {name}'s "
                f"latent is {list(side.clean.shape)}"
            )
        if request.conditioning is None and not side.positive:
            raise ValueError(
                f"the {name}'s inversion has no prompt: connect the conditioning to read the features with (the empty "
                "prompt is a good choice)"
            )
    counts = [len(side.clean) for side in request.sides]
    if counts[0] != counts[1] and 1 not in counts:
        raise ValueError(
            f"a map needs one style or one for each content: got {counts[0]} contents and {counts[1]} styles"
        )


def _prompt(request: MapRequest, side: Inversion) -> list:
    prompt = side.positive if request.conditioning is None else request.conditioning
    assert prompt is not None
    return prompt


def _cluster(request: MapRequest, content: Features, style: Features) -> tuple[SemanticMap, list[Clustering]]:
    for side, name in ((content, "content"), (style, "style")):
        if not all(torch.isfinite(stage).all() for stage in side.stages):
            raise FloatingPointError(f"the {name}'s features contain NaN or infinity: try the model in float32")
    pairs = content.count if content.count == style.count else 1
    found, check = [], comfy.model_management.throw_exception_if_processing_interrupted
    for i in range(pairs):
        rows = slice(i, i + 1) if pairs > 1 else slice(None)
        vectors = [joint_vectors(side.rows(rows).stages) for side in (content, style)]
        found.append(cluster(*vectors, request.regions, request.smoothing, request.seed + i, check))
    # What lives on in the graph must be ordinary tensors.
    with torch.inference_mode(False):
        sides = (torch.cat([getattr(f.regions, name) for f in found]).clone() for name in ("content", "style"))
        return SemanticMap(*sides), found


def summary(found: list[Clustering]) -> str:
    """How many regions there are, and by what they were chosen, a line for each pair."""
    lines = []
    for i, clustering in enumerate(found, 1):
        line = f"{f'Pair {i}: ' if len(found) > 1 else ''}{clustering.count} regions"
        if clustering.silhouettes:
            rated = ", ".join(f"{k}: {s:.3f}" for k, s in clustering.silhouettes.items())
            line += f"; mean silhouette by number of regions: {rated}"
        lines.append(line)
    return "\n".join(lines)
