"""Flicker of restyled moving Paperland scenes, each frame an image of its own on the plain demo model.

    python tools/run.py benchmarks.flicker_quality [--count 3] [--frames 4] [--steps 20] [--write]

Runs the nodes that ship, in ComfyUI, for clips of fixed seeds: restyled with the published video weights and with plain
AdaIN replay, every frame with its own noise and all with the same. Every finished clip is kept in --out.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..paperland.scenes import REGIONS, scene
from . import pool, report
from .host import call, demo

CFG = 3.5
OFF = {"style_weight": 0.0, "spatial_weight": 0.0, "semantic_weight": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {  # inputs of the sampler node
    "exact replay": {**OFF, "adain_start": 1.0},
    "AdaIN replay": OFF,
    "video weights": {"weights": "published for video"},
}
NOISES = {"own noise": False, "same noise": True}


def words(labels: Tensor) -> str:
    """A caption that names the regions and nothing of their looks, so that it holds back no colours."""
    return ", ".join(REGIONS[i] for i in labels.unique().tolist())


def measure(frames: int, steps: int, number: int) -> dict[str, Any]:
    """Of one clip, by variant and noise: excess flicker and change from the context; and frames to look at."""
    from ..nodes.nodes_inversion import DDPMInversion
    from ..nodes.nodes_paperland import DrawClip
    from ..nodes.nodes_semantix import KSampler
    from ..nodes.nodes_video import MeasureFlicker

    model = demo()
    moving = call(DrawClip, layout_seed=500 + number, style_seed=600 + number, frames=frames)
    picture = scene(700 + number, 800 + number).images
    prompt, empty = model.prompt(words(moving.labels)), model.prompt("")
    inverted = {"model": model.model, "negative": empty, "steps": steps}
    looked_at = {"latent": model.encode(picture), "cfg": 1.0, "seed": 1, "noise_maps": False}
    style = call(DDPMInversion, **inverted, positive=empty, **looked_at).inversion
    made, figures = {}, {}
    for noise, same in NOISES.items():
        context = call(
            DDPMInversion,
            **inverted,
            positive=prompt,
            latent=model.encode(moving.images),
            cfg=CFG,
            seed=number,
            same_noise=same,
        ).inversion
        for variant, inputs in VARIANTS.items():
            out = call(
                KSampler,
                model=model.model,
                positive=prompt,
                negative=empty,
                context=context,
                reference=style,
                cfg=CFG,
                **inputs,
            )
            video = model.decode(out.latent)
            seen = call(MeasureFlicker, video=video, context=moving.images, labels=moving.labels)
            change = (video - moving.images).abs().mean().item()
            made[f"{variant}, {noise}"] = report.as_bytes(video)
            figures[f"{variant}, {noise}"] = {"excess": seen.excess, "change": change}
    rows = {"context": report.as_bytes(moving.images), **made, "reference": report.as_bytes(picture)}
    return {"figures": figures, "pictures": rows}


def tables(found: dict[str, dict[str, tuple[float, float]]]) -> dict[str, str]:
    rows = [
        [*name.split(", "), report.with_error(f["excess"], 4), f"{f['change'][0]:.3f}"] for name, f in found.items()
    ]
    heads = ["variant", "noise of the frames", "excess flicker", "change from the context"]
    return {"flicker": report.table(heads, rows)}


def main() -> None:
    parser = report.parser(__doc__, "flicker_quality", 3, "clips")
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    settings = options.frames, options.steps
    mark, work = pool.fingerprint(settings), partial(measure, *settings)
    found = pool.measured(work, report.numbers(options), options.out, mark, options.workers)
    per_clip = report.by_name([f["figures"] for f in found])
    rows = dict(found[0]["pictures"])
    reference = rows.pop("reference")
    # Frames run down; a column for each variant, the last one the reference.
    rows["reference"] = torch.cat([reference, torch.full_like(rows["context"][1:], 255)])
    average = report.means(per_clip)
    figures = {"clips": options.count, "frames": options.frames, "steps": options.steps}
    everything = {**figures, "mean_and_standard_error": average, "per_clip": per_clip}
    report.publish(options, "semantix_video", tables(average), report.grid(rows), everything)
