"""Flicker of restyled moving Paperland scenes, each frame an image of its own on the plain demo model.

    python tools/run.py benchmarks.flicker_quality [--clips 4] [--frames 4] [--steps 20]

For fixed seeds: clips restyled with the published video weights and with plain AdaIN replay, every frame with its own
noise and all with the same. Writes a table into docs/semantix_video.md and a strip of the first clip beside it.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from ..paperland import model as paperland
from ..paperland.motion import clip
from ..paperland.scenes import REGIONS, scene
from ..pictures.flicker import Flicker, flicker
from ..samplers.ddpm_inversion import ddpm_inversion
from ..samplers.replay import replay
from ..samplers.semantix_energy import FOR_VIDEO, semantix_energy
from ..samplers.step_adain import StepAdaIN
from ..samplers.terms import Energy, Stream
from .guided import EnergyGuided

CFG = 3.5
VARIANTS = ("exact replay", "AdaIN replay", "video weights")
NOISES = ("own noise", "same noise")


def words(labels: Tensor) -> str:
    """A caption that names the regions and nothing of their looks, so that it holds back no colours."""
    return ", ".join(REGIONS[i] for i in labels.unique().tolist())


def restyled(model: paperland.Paperland, seed: int, frames: int, steps: int) -> tuple[dict, Tensor, Tensor, Tensor]:
    """Of one clip: frames by (variant, noise), the context's frames, the reference, the labels."""
    moving = clip(500 + seed, 600 + seed, frames)
    reference = scene(700 + seed, 800 + seed)
    prompt, empty = model.text([words(moving.labels)]), model.text([""])
    sigmas = paperland.sigmas_normal(steps)
    style = ddpm_inversion(model.guided(empty, empty, 1.0), paperland.encode_pixels(reference.images), sigmas, seed=1)
    clean = paperland.encode_pixels(moving.images)
    made = {}
    for noise_name in NOISES:
        rows = frames if noise_name == NOISES[0] else 1
        noise = torch.randn(steps, rows, *clean.shape[1:], generator=torch.Generator().manual_seed(seed))
        noise = noise.expand(steps, frames, *clean.shape[1:])
        context = ddpm_inversion(model.guided(prompt, empty, CFG), clean, sigmas, noise=noise)
        energy = semantix_energy(Stream(context), Stream(style, empty), FOR_VIDEO)
        for variant in VARIANTS:
            guided = EnergyGuided(model, prompt, empty, CFG, energy if variant == VARIANTS[2] else Energy(()), sigmas)
            adain = None if variant == VARIANTS[0] else StepAdaIN(style, steps)
            out = replay(guided, context.trajectory[0], sigmas, inversion=context, after_step=adain)
            made[variant, noise_name] = paperland.decode_pixels(out)
    return made, moving.images, reference.images, moving.labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args()
    model = paperland.load()
    measured: dict[tuple[str, str], list[Flicker]] = {}
    changed: dict[tuple[str, str], list[float]] = {}
    for number in range(options.clips):
        start = time.perf_counter()
        made, context, reference, labels = restyled(model, number, options.frames, options.steps)
        for key, frames in made.items():
            measured.setdefault(key, []).append(flicker(frames, context, labels))
            changed.setdefault(key, []).append(float((frames - context).abs().mean()))
        if number == 0:
            _strip(made, context, reference, options.out / "semantix_video.png")
        print(f"clip {number + 1} of {options.clips}: {time.perf_counter() - start:.0f} s", flush=True)
    table = _table(measured, changed)
    print(table)
    (options.out / "semantix_video.md").write_text(_page(table, options), encoding="utf-8")


def _table(measured: dict, changed: dict) -> str:
    lines = [
        "| variant | noise of the frames | excess flicker | change from the context |",
        "| --- | --- | --- | --- |",
    ]
    for (variant, noise), found in measured.items():
        excess = torch.tensor([f.excess for f in found])
        error = excess.std() / len(found) ** 0.5
        change = sum(changed[variant, noise]) / len(found)
        lines.append(f"| {variant} | {noise} | {excess.mean():.4f} ± {error:.4f} | {change:.3f} |")
    return "\n".join(lines)


def _page(table: str, options: argparse.Namespace) -> str:
    command = (
        f"python tools/run.py benchmarks.flicker_quality --clips {options.clips} --frames {options.frames} "
        f"--steps {options.steps}"
    )
    return f"""# Flicker of restyled video

`{command}` on the shipped demo model, every frame an image of its own (no motion model). Moving
Paperland scenes of fixed seeds: the sun, clouds and water move, all else stands still, and so does every pixel there
in the context. Excess flicker is the mean absolute difference (colours 0 to 1) of neighbouring frames where the context
stands still; ± is the standard error over the clips. A restyling that changes little flickers little: the last column
is the mean difference from the context.

{table}

One noise for all frames (`same_noise` in *DDPM Inversion*) gives what stands still the same edit in every frame as far
as the model's view of the whole picture is the same. A motion model such as AnimateDiff ties the frames together beyond
that; it needs an SD1.5 checkpoint and was not measured here.

![Frames of the first clip: context, then each variant; right, the reference](semantix_video.png)

*The first clip, not chosen. Rows: context, then the table's rows in their order; the last column is the reference.*
"""


def _strip(made: dict, context: Tensor, reference: Tensor, path: Path) -> None:
    from PIL import Image

    blank = torch.ones_like(reference)
    rows = [torch.cat([*context, reference[0]], dim=1)]
    rows += [torch.cat([*frames, blank[0]], dim=1) for frames in made.values()]
    Image.fromarray((torch.cat(rows) * 255).round().byte().numpy()).save(path)


if __name__ == "__main__":
    main()
