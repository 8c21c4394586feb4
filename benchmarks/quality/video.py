"""Flicker of restyled moving Paperland scenes, each frame an image of its own on the plain demo model.

Clips of fixed seeds, restyled with the published video weights and with plain AdaIN replay, every frame with its own
noise and all with the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...paperland import motion
from ...paperland.scenes import REGIONS, scene
from ...pictures.flicker import flicker
from ...runner.graph import Graph
from .. import report
from .graphs import PRE, Builder
from .part import Found
from .queue import Made, Task
from .semantix import CFG, OFF, sampled

VARIANTS: dict[str, dict[str, Any]] = {  # inputs of the sampler node
    "exact replay": {**OFF, "adain_start": 1.0},
    "AdaIN replay": OFF,
    "video weights": {"weights": "published for video"},
}
NOISES = OWN, SAME = "own noise", "same noise"
LAYOUTS, STYLES, REFERENCES = 500, 600, (700, 800)  # first seeds


def words(labels: Tensor) -> str:
    """A caption that names the regions and nothing of their looks, so that it holds back no colours."""
    return ", ".join(REGIONS[i] for i in labels.unique().tolist())


@dataclass(frozen=True)
class Video:
    """A `Part`."""

    steps: int = 20
    frames: int = 4
    page = "semantix_video"
    what = "clips"
    count = 6

    def settings(self) -> dict[str, Any]:
        return {"steps": self.steps, "frames": self.frames}

    def clip(self, number: int) -> motion.Clip:
        return motion.clip(LAYOUTS + number, STYLES + number, self.frames)

    def graph(self) -> Graph:
        g = Builder()
        prompt = g.prompt("What the clip shows")
        seeds = {"layout_seed": g.number("Layout"), "style_seed": g.number("Style")}
        frames = g.link(f"{PRE}PaperlandClip", frames=self.frames, **seeds)
        g.save(frames, "context")
        inverted = {"model": g.model, "negative": g.empty, "steps": self.steps}
        unmapped = {"cfg": 1.0, "seed": 1, "noise_maps": False}
        picture = g.encoded(g.picture("Reference"))
        reference = g.link(f"{PRE}DDPMInversion", positive=g.empty, latent=picture, **inverted, **unmapped)
        latent, seed = g.encoded(frames), g.number("Seed")
        for noise in NOISES:
            how = {"cfg": CFG, "seed": seed, "same_noise": noise == SAME}
            context = g.link(f"{PRE}DDPMInversion", positive=prompt, latent=latent, **inverted, **how)
            for name, inputs in VARIANTS.items():
                sampled(g, f"{name}, {noise}", context, reference, prompt, cfg=CFG, **inputs)
        return g.graph

    def task(self, number: int) -> Task:
        layout, style = (first + number for first in REFERENCES)
        return Task(
            f"clip_{number:04d}",
            {
                "What the clip shows.text": words(self.clip(number).labels),
                "Layout.value": LAYOUTS + number,
                "Style.value": STYLES + number,
                "Reference.image": scene(layout, style).images[0],
                "Seed.value": number,
            },
        )

    def judged(self, number: int, made: Made) -> Found:
        """By variant and noise: excess flicker and change from the context; and frames to look at."""
        clip = self.clip(number)
        context = made.pictures("context")
        pictures = {"context": context}
        found = {}
        for name in (f"{variant}, {noise}" for noise in NOISES for variant in VARIANTS):
            pictures[name] = video = made.pictures(name)
            excess = flicker(video, context, clip.labels).excess
            found[name] = {"excess": excess, "change": (video - context).abs().mean().item()}
        layout, style = (first + number for first in REFERENCES)
        # Frames run down; a column for each variant, the last one the reference.
        pictures["reference"] = torch.ones_like(context)
        pictures["reference"][0] = scene(layout, style).images[0]
        return {"figures": found, "pictures": {name: report.as_bytes(p) for name, p in pictures.items()}}

    def gather(self, found: Sequence[Found]) -> dict[str, Any]:
        per_clip = report.by_name([f["figures"] for f in found])
        excess = {name: figures["excess"] for name, figures in per_clip.items()}
        return {
            "mean_and_standard_error": report.means(per_clip),
            "same_noise_flickers_less_by": {
                name: report.compared(excess[f"{name}, {OWN}"], excess[f"{name}, {SAME}"]) for name in VARIANTS
            },
        }

    def tables(self, gathered: Mapping[str, Any]) -> dict[str, str]:
        rows = []
        for name, f in gathered["mean_and_standard_error"].items():
            variant, noise = name.split(", ")
            less = gathered["same_noise_flickers_less_by"][variant]
            cells = (
                [report.with_error((less["mean"], less["error"]), "+.4f"), *report.won(less)[2:]]
                if noise == SAME
                else ["", ""]
            )
            rows.append([variant, noise, report.with_error(f["excess"], ".4f"), f"{f['change'][0]:.3f}", *cells])
        heads = ["variant", "noise of the frames", "excess flicker", "change from the context"]
        return {"flicker": report.table([*heads, "less than with own noise by", "p"], rows)}

    def sheet(self, found: Sequence[Found]) -> Image.Image:
        return report.grid(found[0]["pictures"])
