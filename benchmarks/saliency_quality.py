"""How well a picture's subject is found, on Paperland scenes where it is known: overlap with the object's own pixels.

    python tools/run.py benchmarks.saliency_quality [--count 40] [--seed 200] [--write]

Runs the node that ships, in this process (the one cut needs the features that the node keeps to itself), on scenes of
one sun, tree or house alone (layout seeds from --seed on) and on the first landscapes from that seed on that hold
exactly one house or tree, whatever else they hold. Besides it: one cut as the paper has it (the side of the second
eigenvector, split at its mean, that touches the border less). The node is also told the thing's name, alone and with
its parts: a house of this world has a roof that captions name by itself.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from ..paperland import scenes
from ..paperland.scenes import Scenes
from ..pictures.overlay import overlay_subject
from ..regions.masks import grow
from . import report
from .host import Demo, bring_in_host, call, demo

SIGMA, LOOKS = 0.3, 4  # the node's defaults, for the one cut
FOUND = 0.4  # overlap from which the thing was found, at least
STYLES = 5000  # a scene's style seed is its layout seed and this
OLD_THRESHOLD, WEAK = 0.2, 1e-5
SHOWN = 6
ONE_CUT, METHOD, WORD, PARTS = "one cut", "method", "word", "word and parts"
SMALLER = "method, 4 px smaller"  # the node's grow
LANDSCAPE = "landscape with one house or tree"


def landscape_seeds(first: int, count: int) -> list[int]:
    """The first seeds of whole scenes with one house or tree that is seen."""
    found: list[int] = []
    seed = first
    while len(found) < count:
        layouts = scenes.sample_layouts(1, scenes.seeded(seed))
        if int(layouts.has_house) + int(layouts.has_tree.sum()) == 1 and truth(scenes.scene(seed, seed + STYLES)).any():
            found.append(seed)
        seed += 1
    return found


def truth(landscape: Scenes) -> Tensor:
    """Where its house or tree is, bool [1, H, W]."""
    return scenes.object_mask(landscape.labels).bool() & (landscape.labels != scenes.SUN)


def subjects(model: Demo, image: Tensor, kind: str) -> dict[str, Tensor]:
    """Masks [H, W] of a picture's subject by one cut and by the node: as large as it is, smaller, told its kind."""
    from ..host.reading import FeatureCall, read_features
    from ..nodes.nodes_saliency import FindSubject

    latent, prompt = model.encode(image), model.prompt("")
    with torch.inference_mode():
        looks = read_features(
            model.model, [FeatureCall(latent["samples"], prompt, seed) for seed in range(LOOKS)], SIGMA
        )
        mean = torch.stack([F.normalize(look.stages[-1], dim=1) for look in looks]).mean(dim=0)[0]
        places = one_cut(mean)[None, None].float()
    found = {ONE_CUT: F.interpolate(places, image.shape[1:3], mode="bilinear")[0, 0] > 0.5}
    parts = ", ".join(scenes.REGIONS[region] for region in scenes.OBJECTS[kind])
    told = {METHOD: "", WORD: kind, PARTS: parts}
    for name, word in told.items():
        if name == PARTS and parts == kind:
            found[PARTS] = found[WORD]
            continue
        given = {"clip": model.clip, "class_word": word}
        mask = call(FindSubject, model=model.model, latent=latent, prompt=prompt, image=image, **given).mask[0]
        found[name] = mask > 0.5
        if name == METHOD:
            found[SMALLER] = grow(mask[None], -4)[0] > 0.5
    return found


def one_cut(f: Tensor) -> Tensor:
    """[H, W] of features [C, H, W]: the paper's cut, without what regions/saliency.py adds."""
    h, w = f.shape[1:]
    places = F.normalize(rearrange(f - f.mean(dim=(1, 2), keepdim=True), "c h w -> (h w) c"), dim=1).double()
    affinity = torch.where(places @ places.T > OLD_THRESHOLD, 1.0, WEAK).double()
    root = affinity.sum(dim=1).rsqrt()
    laplacian = torch.eye(h * w, dtype=torch.float64) - root[:, None] * affinity * root
    vector = (torch.linalg.eigh(laplacian).eigenvectors[:, 1] * root).view(h, w)
    high = vector > vector.mean()
    border = torch.ones_like(high)
    border[1:-1, 1:-1] = False
    return ~high if high[border].float().mean() > 0.5 else high


def overlap(a: Tensor, b: Tensor) -> float:
    """Intersection over union."""
    return ((a & b).sum() / (a | b).sum().clamp(min=1)).item()


def measure(first: int, landscapes: list[int], number: int) -> dict[str, Any]:
    """Overlaps of a scene of each kind, and pictures: the scene, where the thing is and where it was found."""
    seed = first + number
    drawn = {}
    for kind in scenes.OBJECTS:
        alone = scenes.single(kind, seed, seed + STYLES)
        drawn[f"one {kind}"] = kind, alone.images, scenes.object_mask(alone.labels).bool()
    landscape = scenes.scene(landscapes[number], landscapes[number] + STYLES)
    kind = "house" if (landscape.labels == scenes.HOUSE).any() else "tree"
    drawn[LANDSCAPE] = kind, landscape.images, truth(landscape)
    figures, pictures = {}, {}
    for name, (kind, image, true) in drawn.items():
        found = subjects(demo(), image, kind)
        figures[name] = {way: overlap(mask, true[0]) for way, mask in found.items()}
        shown = [image, *(overlay_subject(m.float(), image) for m in (true, found[METHOD][None], found[WORD][None]))]
        pictures[name] = report.as_bytes(torch.cat(shown))
    return {"figures": figures, "pictures": pictures}


def tables(figures: dict[str, dict[str, list[float]]]) -> dict[str, str]:
    """Mean overlap with its standard error, and the share of scenes where the thing was found."""
    rows = []
    for name, ways in figures.items():
        cells = [f"{name} ({len(ways[METHOD])})"]
        for overlaps in ways.values():
            cells += [
                report.with_error(report.mean_and_error(overlaps), ".2f"),
                f"{np.mean(np.array(overlaps) >= FOUND):.0%}",
            ]
        rows.append(cells)
    heads = ["scenes", *(head for way in next(iter(figures.values())) for head in (way, "found"))]
    return {"overlap": report.table(heads, rows)}


def main() -> None:
    parser = report.parser(__doc__, "saliency_quality", 40, "scenes of each kind")
    parser.add_argument("--seed", type=int, default=200, help="the first layout seed (200)")
    options = parser.parse_args()
    landscapes = landscape_seeds(options.seed, options.first + options.count)
    bring_in_host()
    numbers = range(options.first, options.first + options.count)
    found = [measure(options.seed, landscapes, number) for number in tqdm(numbers, mininterval=10)]
    figures = report.by_name([f["figures"] for f in found])
    parts = ("picture", "true mask", "found", "by its word")
    columns = {
        f"{name.split(' with ')[0]}, {part}": torch.stack([f["pictures"][name][i] for f in found[:SHOWN]])
        for name in figures
        for i, part in enumerate(parts)
    }
    report.publish(options, "saliency", tables(figures), report.grid(columns), figures)
