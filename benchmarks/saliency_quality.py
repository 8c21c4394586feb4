"""How well a picture's subject is found, on Paperland scenes where it is known: overlap with the object's own pixels.

    python tools/run.py benchmarks.saliency_quality [--count 40] [--first 100] [--out output]

Scenes of one sun, tree or house alone (layout seeds from --first on) and the first landscapes from that seed on that
hold exactly one house or tree, whatever else they hold. Besides the method: one cut as METHODS states it (the side of
the second eigenvector, split at its mean, that touches the border less). Writes `saliency.json`, `saliency.md` (the
table) and `saliency.png` (the first scenes of each kind, none picked) to --out.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..paperland import model as paperland
from ..paperland import scenes
from ..paperland.evaluate import features
from ..pictures.overlay import overlay_subject
from ..regions.saliency import THRESHOLD, find_subject

SIGMA, LOOKS = 0.3, 4  # the node's defaults
FOUND = 0.4  # overlap from which the thing was found, at least
STYLES = 5000  # a scene's style seed is its layout seed and this
OLD_THRESHOLD, WEAK = 0.2, 1e-5
SHOWN, GAP, HEAD = 6, 4, 20
WAYS = ("one cut", "method", "method, 4 px smaller")
Found = dict[str, Tensor]


def singles(kind: str, first: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images [1, H, W, 3] and the object's masks [1, H, W]."""
    for seed in range(first, first + count):
        drawn = scenes.single(kind, seed, seed + STYLES)
        yield drawn.images, scenes.object_mask(drawn.labels).bool()


def landscapes(first: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first whole scenes with one house or tree; its masks."""
    seed = first
    while count:
        layouts = scenes.sample_layouts(1, scenes.seeded(seed))
        if int(layouts.has_house) + int(layouts.has_tree.sum()) == 1:
            drawn = scenes.scene(seed, seed + STYLES)
            mask = scenes.object_mask(drawn.labels).bool() & (drawn.labels != scenes.SUN)
            if mask.any():
                count -= 1
                yield drawn.images, mask
        seed += 1


@torch.no_grad()
def subjects(model: paperland.Paperland, image: Tensor) -> Found:
    """Masks [H, W] of the picture by each of `WAYS`."""
    looks = [F.normalize(features(model, image, [""], SIGMA, seed)[-1], dim=1) for seed in range(LOOKS)]
    mean = torch.stack(looks).mean(dim=0)[0]
    size = tuple(image.shape[1:3])

    def pixels(places: Tensor) -> Tensor:
        return F.interpolate(places[None, None].float(), size, mode="bilinear")[0, 0] > 0.5

    found = pixels(find_subject(mean, THRESHOLD).hard)
    smaller = -F.max_pool2d(-found[None, None].float(), 9, 1, 4)[0, 0] > 0.5
    return dict(zip(WAYS, (pixels(one_cut(mean)), found, smaller), strict=True))


def one_cut(f: Tensor) -> Tensor:
    """[H, W]: METHODS 4.1 to the letter, without what attention/saliency.py adds."""
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


def measure(model: paperland.Paperland, count: int, first: int) -> tuple[dict, list[list[Tensor]]]:
    """Overlaps by kind of scene and way, and rows of pictures of the first scenes."""
    kinds: dict[str, Callable[[], Iterator[tuple[Tensor, Tensor]]]] = {
        **{f"one {kind}": lambda kind=kind: singles(kind, first, count) for kind in scenes.OBJECTS},
        "landscape with one house or tree": lambda: landscapes(first, count),
    }
    figures: dict[str, dict[str, list[float]]] = {}
    rows: list[list[Tensor]] = []
    for name, made in kinds.items():
        figures[name] = {way: [] for way in WAYS}
        row: list[Tensor] = []
        for i, (image, truth) in enumerate(made()):
            found = subjects(model, image)
            for way, mask in found.items():
                figures[name][way].append(overlap(mask, truth[0]))
            if i < SHOWN:
                shown = [image[0], *(overlay_subject(m[None], image)[0] for m in (truth[0], found["method"]))]
                row.append(torch.cat(shown, dim=0))
        rows.append(row)
        means = {way: round(float(np.mean(v)), 3) for way, v in figures[name].items()}
        print(name, len(figures[name]["method"]), means, flush=True)
    return figures, rows


def table(figures: dict[str, dict[str, list[float]]]) -> str:
    """Markdown: mean overlap with its standard error, and the share of scenes where the thing was found."""
    lines = ["| scenes | " + " | ".join(f"{way} | found" for way in WAYS) + " |"]
    lines.append("|" + " --- |" * (1 + 2 * len(WAYS)))
    for name, ways in figures.items():
        cells = []
        for way in WAYS:
            v = np.array(ways[way])
            cells += [f"{v.mean():.2f} ± {v.std() / len(v) ** 0.5:.2f}", f"{(v >= FOUND).mean():.0%}"]
        lines.append(f"| {name} ({len(ways[WAYS[0]])}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def sheet(rows: list[list[Tensor]]) -> Image.Image:
    """Two kinds beside each other: picture, true mask and found mask, one below the other."""
    h, w = rows[0][0].shape[:2]
    width = 2 * (SHOWN * (w + GAP) + 3 * GAP)
    out = Image.new("RGB", (width, 2 * (h + HEAD + 2 * GAP)), (250, 247, 240))
    draw = ImageDraw.Draw(out)
    for r, (row, name) in enumerate(zip(rows, ("sun", "tree", "house", "landscape"), strict=True)):
        left, top = (r % 2) * width // 2 + GAP, (r // 2) * (h + HEAD + 2 * GAP)
        title = f"{name}: picture, true mask, found mask"
        draw.text((left, top + 3), title, (40, 36, 32), ImageFont.load_default(13))
        for i, cell in enumerate(row):
            picture = Image.fromarray((cell.numpy() * 255).round().astype(np.uint8))
            out.paste(picture, (left + i * (w + GAP), top + HEAD))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="scenes of each kind (40)")
    parser.add_argument("--first", type=int, default=200, help="the first layout seed (200)")
    parser.add_argument("--out", type=Path, default=Path("output"), help="folder for the files (output)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    figures, rows = measure(paperland.load(), arguments.count, arguments.first)
    (arguments.out / "saliency.json").write_text(json.dumps(figures, indent=1))
    (arguments.out / "saliency.md").write_text(table(figures) + "\n")
    print(table(figures))
    sheet(rows).save(arguments.out / "saliency.png")


if __name__ == "__main__":
    main()
