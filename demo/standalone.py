"""The demo graphs without ComfyUI: the same files of workflows/api, run by the pure PyTorch core.

Each node that the demo graphs use has its counterpart here, a function of the node's inputs, with the same names, that
gives the tuple of its outputs. So both ways to make the contact sheet share seeds, captions and settings, because they
share the graphs.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..attention.adain import adain, region_adain
from ..attention.regions import SemanticMap
from ..samplers.ddim_inversion import ddim_inversion
from ..samplers.ddpm_inversion import ddpm_inversion
from ..samplers.guidance import Stream
from ..samplers.inversion import Inversion
from ..samplers.replay import replay
from ..samplers.report_plot import report_plot
from ..samplers.semantix import FOR_IMAGES, FOR_VIDEO, Weights, semantix_energy
from ..samplers.step_adain import PUBLISHED_START, StepAdaIN
from . import model as paperland
from . import motion, scenes
from .client import Graph, Progress, node_title, progress_of
from .guided import EnergyGuided
from .standalone_scsa import NODES as SCSA_NODES
from .standalone_spin import NODES as SPIN_NODES
from .standalone_spin import Captions, EnergyGuider, MaskedLatent, sample_masked

PUBLISHED_WEIGHTS = {"published for images": FOR_IMAGES, "published for video": FOR_VIDEO}
# Levels per model call on an accelerator; on a CPU one image of 32x32 places keeps the cores busy.
GPU_LEVELS = 16

Report = Callable[[int, int], None]
Picture = tuple[str, Image.Image]


class Missing(ValueError):
    """A graph uses a node or a setting that there is no counterpart of."""


@dataclass(frozen=True)
class Replaying:
    """What the Replay node hands to the sampler: the inversion and how to go along it."""

    inversion: Inversion
    skip: int
    exact: bool
    start: Tensor
    adain: StepAdaIN | None = None


def run_graph(graph: Graph, progress: Callable[[Progress], None] | None = None) -> list[Picture]:
    """The pictures of a graph in API format, with the titles of the nodes that show them, in order of node ids.

    Raises `Missing` for a graph that needs more than the nodes listed in `NODES`.
    """
    return _Run(graph, progress or (lambda _: None)).pictures()


class _Run:
    """One evaluation of a graph: every node once, only what the pictures need."""

    def __init__(self, graph: Graph, progress: Callable[[Progress], None]) -> None:
        self.graph = graph
        self.progress = progress
        self.outputs: dict[str, tuple] = {}

    def pictures(self) -> list[Picture]:
        found = []
        for node_id in sorted((i for i, node in self.graph.items() if node["class_type"] in SHOW), key=int):
            images = self.output(node_id)[SHOW[self.graph[node_id]["class_type"]]]
            found += [(node_title(self.graph, node_id), _to_picture(image)) for image in images]
        return found

    def output(self, node_id: str) -> tuple:
        if node_id not in self.outputs:
            node = self.graph[node_id]
            if node["class_type"] not in NODES:
                raise Missing(f"{node['class_type']} (node {node_id}) runs in ComfyUI only")
            inputs = {name: self.value(value) for name, value in node["inputs"].items()}
            self.report(node_id, 0, 0)
            self.outputs[node_id] = NODES[node["class_type"]](
                lambda value, maximum: self.report(node_id, value, maximum), **inputs
            )
        return self.outputs[node_id]

    def value(self, value: Any) -> Any:
        if isinstance(value, list):
            node_id, index = value
            return self.output(node_id)[index]
        return value

    def report(self, node_id: str, value: int, maximum: int) -> None:
        self.progress(progress_of(self.graph, self.outputs, node_id, value, maximum))


def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load_model(report: Report, precision: str = "fp32") -> tuple:
    model = paperland.load(
        device=device(), dtype={"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    )
    return model, Captions(model.text), paperland


def draw_scene(
    report: Report,
    layout_seed: int,
    style_seed: int,
    width: int = scenes.SIZE,
    height: int = scenes.SIZE,
    only: str = scenes.ONLY[0],
) -> tuple:
    drawn = scenes.chosen(only, layout_seed, style_seed, (height, width))
    labels = drawn.labels
    return drawn.images, labels, drawn.captions[0], scenes.label_image(labels), scenes.object_mask(labels)


def draw_clip(
    report: Report,
    layout_seed: int,
    style_seed: int,
    frames: int,
    speed: float = 1.0,
    width: int = scenes.SIZE,
    height: int = scenes.SIZE,
) -> tuple:
    drawn = motion.clip(layout_seed, style_seed, frames, (height, width), speed)
    return drawn.images, drawn.labels, drawn.caption, scenes.label_image(drawn.labels)


def encode_caption(report: Report, clip: Any, caption: str = "", text: str = "") -> tuple:
    return clip([caption or text]), ""


def empty_latent(report: Report, width: int, height: int, batch_size: int = 1) -> tuple:
    return (torch.zeros(batch_size, paperland.LATENT_CHANNELS, height // paperland.PATCH, width // paperland.PATCH),)


def number(report: Report, value: int) -> tuple:
    return (value,)


def encode_pixels(report: Report, pixels: Tensor, vae: Any) -> tuple:
    return (vae.encode_pixels(pixels),)


def decode_pixels(report: Report, samples: Tensor, vae: Any) -> tuple:
    return (vae.decode_pixels(samples),)


def guide(report: Report, model: Any, positive: Tensor, negative: Tensor, cfg: float) -> tuple:
    return (model.guided(positive, negative, cfg),)


def invert_ddpm(
    report: Report,
    model: Any,
    positive: Tensor,
    negative: Tensor,
    latent: Tensor,
    steps: int,
    scheduler: str,
    cfg: float,
    seed: int,
    batch_steps: int = 0,
    same_noise: bool = False,
) -> tuple:
    on, sigmas = device(), _levels(scheduler, steps)
    noise = None
    if same_noise:
        noise = torch.randn(len(sigmas) - 1, 1, *latent.shape[1:], generator=torch.Generator().manual_seed(seed))
        noise = noise.expand(-1, *latent.shape)
    inversion = ddpm_inversion(
        model.guided(positive, negative, cfg),
        latent.to(on),
        sigmas,
        noise=noise,
        seed=seed,
        batch_steps=batch_steps or (1 if on.type == "cpu" else GPU_LEVELS),
        callback=lambda state: report(state["i"] + 1, state["total"]),
    )
    # As the host's inversions do, it remembers its prompt, here the model's own tensor.
    return (replace(inversion, positive=[[positive, {}]]),)


def invert_ddim(
    report: Report,
    model: Any,
    positive: Tensor,
    negative: Tensor,
    latent: Tensor,
    steps: int,
    scheduler: str,
    cfg: float,
    seed: int = 0,
    refine: int = 0,
) -> tuple:
    inversion = ddim_inversion(
        model.guided(positive, negative, cfg),
        latent.to(device()),
        _levels(scheduler, steps),
        refine=refine,
        callback=lambda state: report(state["i"] + 1, state["total"]),
    )
    return (replace(inversion, positive=[[positive, {}]]),)


def inversion_latent(report: Report, inversion: Inversion, step: int) -> tuple:
    return (inversion.trajectory[step],)


def prepare_replay(
    report: Report,
    inversion: Inversion,
    skip: int,
    exact: bool,
    start: Tensor | None = None,
    allow_other_model: bool = False,
    adain_reference: Inversion | None = None,
    adain_start: float = PUBLISHED_START,
    semantic_map: SemanticMap | None = None,
) -> tuple:
    first = inversion.trajectory[skip] if start is None else start.to(inversion.clean)
    adain = None
    if adain_reference is not None:
        adain = StepAdaIN(adain_reference, inversion.steps, adain_start, semantic_map)
    going = Replaying(inversion, skip, exact, first, adain)
    return going, going, inversion.sigmas[skip:], inversion.clean


def sample_from_noise(
    report: Report,
    model: Any,
    positive: Tensor,
    negative: Tensor,
    latent_image: Tensor | MaskedLatent,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    denoise: float,
) -> tuple:
    if sampler_name != "dpmpp_2m" or denoise != 1:
        raise Missing(f"KSampler with {sampler_name!r}, denoise {denoise} runs in ComfyUI only; here 'dpmpp_2m', 1")
    guided = model.guided(positive, negative, cfg)
    return (sample_masked(guided, latent_image, _noise(latent_image, seed), _levels(scheduler, steps), report),)


def _noise(latent: Tensor | MaskedLatent, seed: int) -> Tensor:
    like = latent.samples if isinstance(latent, MaskedLatent) else latent
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(device())


def levels(report: Report, model: Any, scheduler: str, steps: int, denoise: float) -> tuple:
    if denoise != 1:
        raise Missing(f"Basic Scheduler with denoise {denoise} runs in ComfyUI only; here 1")
    return (_levels(scheduler, steps),)


def sample(
    report: Report,
    noise: Replaying | int,
    guider: Any,
    sampler: Replaying | str,
    sigmas: Tensor,
    latent_image: Tensor | MaskedLatent,
) -> tuple:
    if isinstance(guider, EnergyGuider):
        guider = guider.on(sigmas)
    if not isinstance(sampler, Replaying) or not isinstance(noise, Replaying):
        if isinstance(sampler, Replaying) or isinstance(noise, Replaying):
            raise Missing("a replay's noise with another sampler, or the reverse, runs in ComfyUI only")
        out = sample_masked(guider, latent_image, _noise(latent_image, noise), sigmas, report)
        return out, out
    out = replay(
        guider,
        noise.start,
        sigmas,
        inversion=sampler.inversion,
        exact=sampler.exact,
        after_step=sampler.adain,
        callback=lambda state: report(state["i"] + 1, state["total"]),
    )
    return out, out


def restyle_by_energy(
    report: Report,
    model: Any,
    positive: Tensor,
    negative: Tensor,
    context: Inversion,
    reference: Inversion,
    cfg: float,
    weights: str,
    style_weight: float,
    spatial_weight: float,
    semantic_weight: float,
    position_weight: float,
    adain_start: float = PUBLISHED_START,
    semantic_map: SemanticMap | None = None,
    skip: int = 0,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    exact: bool = True,
    checkpointing: bool = False,
    allow_other_model: bool = False,
) -> tuple:
    own = Weights(style_weight, spatial_weight, semantic_weight, position_weight)
    assert reference.positive is not None
    energy = semantix_energy(
        Stream(context),
        Stream(reference, reference.positive[0][0]),
        PUBLISHED_WEIGHTS.get(weights, own),
        start_percent,
        end_percent,
        semantic_map,
    )
    sigmas = context.sigmas[skip:]
    guided = EnergyGuided(model, positive, negative, cfg, energy, sigmas)
    out = replay(
        guided,
        context.trajectory[skip],
        sigmas,
        inversion=context,
        exact=exact,
        after_step=StepAdaIN(reference, context.steps, adain_start, semantic_map),
        callback=lambda state: report(state["i"] + 1, state["total"]),
    )
    table = guided.report.table()
    return out, report_plot(table), f"{len(table['sigma'])} guided steps"


def batch_images(report: Report, image1: Tensor, image2: Tensor) -> tuple:
    return (torch.cat([image1, image2]),)


def inversion_from_batch(report: Report, inversion: Inversion, batch_index: int, length: int) -> tuple:
    return (inversion.rows(batch_index, length),)


def pair_labels(report: Report, content: Tensor, style: Tensor) -> tuple:
    return (SemanticMap(content, style),)


def restyle(
    report: Report, content: Tensor, style: Tensor, strength: float = 1.0, semantic_map: SemanticMap | None = None
) -> tuple:
    if semantic_map is None:
        return (adain(content, style, strength=strength),)
    at = semantic_map.at(tuple(content.shape[-2:]), tuple(style.shape[-2:]))
    return (region_adain(content, style, at.content, at.style, strength=strength),)


def show(report: Report, images: Tensor, filename_prefix: str = "") -> tuple:
    return (images,)


def show_moving(
    report: Report, images: Tensor, filename_prefix: str, fps: float, lossless: bool, quality: int, method: str
) -> tuple:
    """One animation of all frames."""
    frames = [_to_picture(image) for image in images]
    file = io.BytesIO()
    frames[0].save(
        file,
        "WEBP",
        save_all=True,
        append_images=frames[1:],
        duration=int(1000 / fps),
        lossless=lossless,
        quality=quality,
    )
    return ([Image.open(file)],)


# Nodes that show pictures, with the output that those are.
SHOW = {
    "PreviewImage": 0,
    "SaveImage": 0,
    "SaveAnimatedWEBP": 0,
    "SemanticStylePreviewMap": 0,
    "SemanticStyleSaliency": 1,
}
NODES: dict[str, Callable[..., tuple]] = {
    **dict.fromkeys(("PreviewImage", "SaveImage"), show),
    **SCSA_NODES,
    **SPIN_NODES,
    "BasicScheduler": levels,
    "CFGGuider": guide,
    "CLIPTextEncode": encode_caption,
    "ImageBatch": batch_images,
    "KSampler": sample_from_noise,
    "PrimitiveInt": number,
    "SamplerCustomAdvanced": sample,
    "SaveAnimatedWEBP": show_moving,
    "SemanticStyleAdaIN": restyle,
    "SemanticStyleDDIMInversion": invert_ddim,
    "SemanticStyleDDPMInversion": invert_ddpm,
    "SemanticStyleInversionFromBatch": inversion_from_batch,
    "SemanticStyleInversionLatent": inversion_latent,
    "SemanticStyleKSampler": restyle_by_energy,
    "SemanticStyleMapFromLabels": pair_labels,
    "SemanticStylePaperlandClip": draw_clip,
    "SemanticStylePaperlandEncode": encode_caption,
    "SemanticStylePaperlandLatent": empty_latent,
    "SemanticStylePaperlandModel": load_model,
    "SemanticStylePaperlandScene": draw_scene,
    "SemanticStyleReplay": prepare_replay,
    "VAEDecode": decode_pixels,
    "VAEEncode": encode_pixels,
}


def _levels(scheduler: str, steps: int) -> Tensor:
    if scheduler != "normal":
        raise Missing(f"the scheduler {scheduler!r} runs in ComfyUI only; the demo graphs use 'normal'")
    return paperland.sigmas_normal(steps)


def _to_picture(image: Tensor | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    return Image.fromarray((image.float().cpu().numpy() * 255).clip(0, 255).astype(np.uint8))
