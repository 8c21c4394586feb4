"""Semantic maps from the decoder features of two inversions, read through the host's model."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ..attention.clustering import Clustering, check_regions, cluster, joint_vectors
from ..attention.regions import SemanticMap
from ..samplers.features import Features, FeatureTap, feature_blocks
from ..samplers.guidance import NOT_SEEN
from ..samplers.inversion import Inversion
from .models import check_invertible, check_same, identify
from .references import REFERENCE, stream_conds

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

MIDDLE_SIGMA = 0.6
OURS = "semantic_style"


@dataclass(frozen=True, eq=False)
class Request:
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


def auto_map(request: Request) -> tuple[SemanticMap, list[Clustering]]:
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
    guider = comfy.samplers.CFGGuider(_unpatched(request.model))
    prompts = [_prompt(request, side) for side in request.sides]
    guider.set_conds(prompts[0], prompts[0])
    sampler = _Reading(request, prompts)
    # The host prepares for a latent of this shape; the sampler takes the inversions' own.
    shape = max((side.clean for side in request.sides), key=Tensor.numel)
    blank = torch.zeros(shape.shape)
    sigmas = torch.tensor([request.sigma, 0.0])
    guider.sample(blank, blank, sampler, sigmas, disable_pbar=True, seed=request.seed)
    return _cluster(request, *sampler.features)


def _check(request: Request) -> None:
    check_invertible(request.model)
    feature_blocks(request.model.model.diffusion_model)
    check_regions(request.regions)
    if request.smoothing < 0:
        raise ValueError(f"smoothing must be 0 (off) or more rounds, got {request.smoothing}")
    if not (math.isfinite(request.sigma) and request.sigma > 0):
        raise ValueError(f"sigma must be a noise level above 0, got {request.sigma}")
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


def _prompt(request: Request, side: Inversion) -> list:
    prompt = side.positive if request.conditioning is None else request.conditioning
    assert prompt is not None
    return prompt


def _unpatched(model: "ModelPatcher") -> "ModelPatcher":
    """A clone with the weights' patches of `model`, without patches of its attention and this pack's wrappers."""
    clone = model.clone()
    to = {k: v for k, v in clone.model_options.get("transformer_options", {}).items() if not k.startswith("patches")}
    to["wrappers"] = {
        kind: {key: w for key, w in keyed.items() if not str(key).startswith(OURS)}
        for kind, keyed in to.get("wrappers", {}).items()
    }
    clone.model_options["transformer_options"] = to
    clone.wrappers = {
        kind: {key: w for key, w in keyed.items() if not str(key).startswith(OURS)}
        for kind, keyed in clone.wrappers.items()
    }
    return clone


def noised(clean: Tensor, sigma: float, seed: int) -> Tensor:
    """`clean + sigma * noise` [B, C, *S], the same noise for every picture.

    Not the inversion's own latent: what DDIM inversion makes is no noise to the model. On Paperland regions found from
    it agree less with the true ones (docs/scsa.md).
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(clean.shape[1:], generator=generator, dtype=torch.float32)
    return clean + sigma * noise.to(clean)


class _Reading(comfy.samplers.Sampler):
    """A host sampler that reads features instead of sampling. One object for one run: it keeps the run's result."""

    def __init__(self, request: Request, prompts: list[list]) -> None:
        self.request, self.prompts = request, prompts
        self.features: list[Features] = []

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        bar = comfy.utils.ProgressBar(len(self.prompts))
        for side, prompt in zip(self.request.sides, self.prompts, strict=True):
            comfy.model_management.throw_exception_if_processing_interrupted()
            latent = noised(side.clean, self.request.sigma, self.request.seed).to(noise)
            self.features.append(self._read(model_wrap, latent, prompt, extra_args["model_options"]))
            bar.update(1)
        return noise

    def _read(self, guider: Any, latent: Tensor, prompt: list, model_options: dict[str, Any]) -> Features:
        unet = guider.inner_model.diffusion_model
        tap = FeatureTap(feature_blocks(unet))
        options = comfy.model_patcher.create_model_options_clone(model_options)
        options["transformer_options"] = {**tap.options(options.get("transformer_options")), REFERENCE: True}
        conds = stream_conds(guider, prompt, latent)
        sigma = latent.new_full((len(latent),), self.request.sigma)
        comfy.samplers.calc_cond_batch(guider.inner_model, [conds], latent, sigma, options)
        seen = tap.read(latent.shape[2:])
        if not seen:
            raise RuntimeError(NOT_SEEN)
        return seen[0].each(lambda t: t.float().cpu())


def _cluster(request: Request, content: Features, style: Features) -> tuple[SemanticMap, list[Clustering]]:
    for side, name in ((content, "content"), (style, "style")):
        if not all(torch.isfinite(stage).all() for stage in side.stages):
            raise FloatingPointError(f"the {name}'s features contain NaN or infinity: try the model in float32")
    pairs = content.count if content.count == style.count else 1
    found = []
    for i in range(pairs):
        rows = slice(i, i + 1) if pairs > 1 else slice(None)
        vectors = [joint_vectors(side.rows(rows).stages) for side in (content, style)]
        found.append(cluster(vectors[0], vectors[1], request.regions, request.smoothing, request.seed + i))
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
