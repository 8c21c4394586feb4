"""How good the demo model is, in numbers and pictures (see paperland/README.md).

    python tools/run.py benchmarks.demo_model [--write] [--weights FILE] [--out FOLDER]

`--write` puts the tables into paperland/README.md and the samples into docs/paperland_samples.webp.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from ..attention.layers import feature_blocks
from ..paperland import scenes
from ..paperland.model import PATCH, WEIGHTS, Paperland, encode_pixels, load
from ..paperland.scenes import REGIONS, Scenes
from ..paperland.text import parse
from ..paperland.train import sample, validate
from ..regions.semantic_map import resample_labels
from ..samplers.features import FeatureTap
from .report import DOCS, as_bytes, as_json, table, write_tables

ROW = 8  # samples in a row of the sheet
MIDDLE_SIGMA = 0.6
ENOUGH = 4  # places of 32x32 that a region needs to count as found
FOUND = ("found", "found in real scenes", "found in blank pictures")
DOT_SHARE = 0.34  # of the second colour in a dotted region: pi * 0.33^2


def drawn(count: int, seed: int) -> Scenes:
    """Unseen scenes: training draws its own from seeds of another range."""
    g = scenes.seeded(1_234_567_890 + seed)
    return scenes.draw(scenes.sample_layouts(count, g), scenes.sample_styles(count, g))


def features(model: Paperland, images: Tensor, captions: Sequence[str], sigma: float, seed: int = 0) -> list[Tensor]:
    """Decoder features of noised images, one tensor [B, C, h, w] per stage."""
    clean = encode_pixels(images)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    tap = FeatureTap(feature_blocks(model.unet))
    model(clean + sigma * noise, clean.new_full((len(clean),), sigma), model.text(list(captions)), tap.options())
    return [tap.features[b] for b in tap.blocks]


def nearest(queries: Tensor, keys: Tensor) -> Tensor:
    """Index of the key [M, C] of highest cosine for every query [N, C] -> [N]."""
    return (F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).T).argmax(dim=1)


class Tally:
    """Hits and tries per region."""

    def __init__(self) -> None:
        self.hits, self.tries = torch.zeros(len(REGIONS)), torch.zeros(len(REGIONS))

    def add(self, labels: Tensor, right: Tensor) -> None:
        self.hits += torch.bincount(labels, right.float(), len(REGIONS))
        self.tries += torch.bincount(labels, minlength=len(REGIONS))

    def result(self) -> dict[str, float]:
        share = self.hits / self.tries.clamp_min(1)
        return {
            "overall": (self.hits.sum() / self.tries.sum()).item(),
            "mean of classes": share[self.tries > 0].mean().item(),
            **dict(zip(REGIONS, share.tolist(), strict=True)),
        }


@torch.no_grad()
def correspondence(model: Paperland, pairs: int = 32, sigma: float = MIDDLE_SIGMA) -> dict[str, dict[str, float]]:
    """Do nearest neighbours between two random scenes carry the right region label?

    Each place of scene A takes the label of its nearest neighbour among scene B's places. Places whose region B lacks
    are left out. Besides both feature stages (without a caption and with each scene's own): chance, raw pixels (the
    clean 4x4 patches) and the same position.
    """
    a, b = drawn(pairs, 1), drawn(pairs, 2)
    inputs: dict[str, list[tuple[Tensor, Tensor]]] = {"pixels": [(_patches(a.images), _patches(b.images))]}
    for name, captioned in (("features", False), ("features, captioned", True)):
        captions = [s.captions if captioned else [""] * pairs for s in (a, b)]
        inputs[name] = list(
            zip(
                features(model, a.images, captions[0], sigma),
                features(model, b.images, captions[1], sigma, 1),
                strict=True,
            )
        )
    results: dict[str, dict[str, float]] = {}
    for name, stages in inputs.items():
        for fa, fb in stages:
            grid = fa.shape[-2:]
            la, lb = resample_labels(a.labels, grid).flatten(1), resample_labels(b.labels, grid).flatten(1)
            found, chance, same = Tally(), Tally(), Tally()
            for i in range(pairs):
                known = (la[i][:, None] == lb[i][None]).any(dim=1)
                labels = la[i][known]
                queries, keys = (rearrange(f[i], "c h w -> (h w) c") for f in (fa, fb))
                distance = nearest if name != "pixels" else _closest
                found.add(labels, lb[i][distance(queries[known], keys)] == labels)
                chance.add(labels, (labels[:, None] == lb[i][None]).float().mean(dim=1))
                same.add(labels, lb[i][known] == labels)
            label = f"{name}, {grid[0]}x{grid[1]}"
            results[label] = found.result()
            if name == "pixels":
                results["chance"], results["same position"] = chance.result(), same.result()
    return results


def _patches(images: Tensor) -> Tensor:
    return rearrange(images, "b (h p) (w q) c -> b (p q c) h w", p=PATCH, q=PATCH)


def _closest(queries: Tensor, keys: Tensor) -> Tensor:
    return torch.cdist(queries, keys).argmin(dim=1)


@torch.no_grad()
def segment(model: Paperland, images: Tensor, bank: Scenes, sigma: float = 0.3) -> Tensor:
    """Region labels [B, 32, 32] of pictures without known labels: the vote of the 9 nearest places in a bank of
    labelled scenes."""
    keys = torch.cat(
        [F.normalize(rearrange(f, "b c h w -> (b h w) c"), dim=-1) for f in _fine(model, bank.images, sigma)]
    )
    labels = resample_labels(bank.labels, (32, 32)).flatten()
    rows = []
    for f in _fine(model, images, sigma):
        for queries in F.normalize(rearrange(f, "b c h w -> b (h w) c"), dim=-1):
            votes = labels[(queries @ keys.T).topk(9, dim=1).indices]
            rows.append(votes.mode(dim=1).values.unflatten(0, f.shape[-2:]))
    return torch.stack(rows)


def _fine(model: Paperland, images: Tensor, sigma: float) -> list[Tensor]:
    """Both stages joined on the finer grid, each of unit length, in batches of 16."""
    joined = []
    for part in images.split(16):
        coarse, fine = features(model, part, [""] * len(part), sigma)
        coarse = F.interpolate(F.normalize(coarse, dim=1), size=fine.shape[-2:], mode="bilinear")
        joined.append(torch.cat([coarse, F.normalize(fine, dim=1)], dim=1))
    return joined


def caption_colors(caption: str) -> dict[str, Tensor]:
    """Mean colour that a caption asks of each region."""
    colors: dict[str, Tensor] = {}
    for phrase in caption.split(", "):
        words = [w for w, _, _ in parse(phrase)[0]]
        if len(words) == 4:
            a, b = (torch.tensor(scenes.COLORS[w]) / 255 for w in words[:2])
            colors[words[3]] = torch.lerp(a, b, DOT_SHARE if words[2] == "dotted" else 0.5)
    return colors


@torch.no_grad()
def samples(model: Paperland, captions: Sequence[str], cfg: float = 3.0) -> Tensor:
    """A sample of each caption: [B, H, W, 3]."""
    parts = [sample(model, list(captions[i : i + 16]), cfg=cfg, seed=i) for i in range(0, len(captions), 16)]
    return torch.cat(parts)


@torch.no_grad()
def adherence(model: Paperland, made: Tensor, asked: Scenes, bank: Scenes) -> dict[str, Any]:
    """Do samples [B, H, W, 3] of the captions of scenes show what the captions ask for?

    Regions of samples are found by the model's own features (`segment` with the bank).

    Returns:
        colours: mean RGB distance (0..1.73) of each region's mean colour to its caption's ("own"), to that of another
            caption ("shuffled"), the same for real scenes under the same segmentation ("real", the floor).
        found, found in real scenes, found in blank pictures: by region, in which share of the pictures whose captions
            name it it has places; a blank picture has its scene's mean colour, what is found there is mistaken.
        segmentation accuracy: on real scenes, where the labels are known.
    """
    count, colors = len(made), [caption_colors(c) for c in asked.captions]
    blank = asked.images.mean(dim=(1, 2), keepdim=True).expand_as(asked.images)
    labels, known, mistaken = (segment(model, images, bank) for images in (made, asked.images, blank))

    def places(where: Tensor, region: str) -> Tensor | None:
        mask = where == REGIONS.index(region)
        return mask if mask.sum() >= ENOUGH else None

    def distance(images: Tensor, where: Tensor, shift: int) -> float:
        pixels = F.avg_pool2d(images.permute(0, 3, 1, 2), PATCH).permute(0, 2, 3, 1)
        values = []
        for i in range(count):
            own, wanted = colors[i], colors[(i + shift) % count]
            for region in sorted(own.keys() & wanted.keys()):
                mask = places(where[i], region)
                if mask is not None:
                    values.append((pixels[i][mask].mean(dim=0) - wanted[region]).norm())
        return torch.stack(values).mean().item()

    def found(where: Tensor) -> dict[str, float]:
        hits: dict[str, list[bool]] = {region: [] for region in REGIONS}
        for i, named in enumerate(colors):
            for region in named:
                hits[region].append(places(where[i], region) is not None)
        return {region: sum(h) / len(h) for region, h in hits.items() if h}

    return {
        "colours": {
            "own": distance(made, labels, 0),
            "shuffled": distance(made, labels, 1),
            "real": distance(asked.images, known, 0),
        },
        "found": found(labels),
        "found in real scenes": found(known),
        "found in blank pictures": found(mistaken),
        "segmentation accuracy": (known == resample_labels(asked.labels, (32, 32))).float().mean().item(),
    }


def sheet(made: Tensor, real: Tensor) -> Image.Image:
    """Samples in rows, under each the scenes whose captions they have."""
    rows = [part.permute(0, 3, 1, 2) for pair in zip(made.split(ROW), real.split(ROW), strict=True) for part in pair]
    cells = make_grid(as_bytes(torch.cat(rows)), nrow=ROW, padding=2, pad_value=255)
    return Image.fromarray(cells.permute(1, 2, 0).numpy())


def tables(report: Mapping[str, Any]) -> dict[str, str]:
    """For paperland/README.md."""
    columns = ["overall", "mean of classes", *REGIONS]
    transfer = [[name, *(f"{row[c]:.2f}" for c in columns)] for name, row in report["correspondence"].items()]
    adherence = report["adherence"]
    found = [[name, *(f"{adherence[name].get(r, float('nan')):.0%}" for r in REGIONS)] for name in FOUND]
    return {
        "correspondence": table(["", *columns], transfer),
        "colours": table(
            ["of samples", "of samples, another's caption", "of real scenes"],
            [[f"{adherence['colours'][k]:.3f}" for k in ("own", "shuffled", "real")]],
        ),
        "found": table(["", *REGIONS], found),
        "denoising": table(
            ["sigma", *(name.removeprefix("rmse_") for name in report["denoising"])],
            [["error", *(f"{v:.3f}" for v in report["denoising"].values())]],
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument(
        "--out", type=Path, default=Path("output/demo_model"), help="folder for figures and samples.png"
    )
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--write", action="store_true", help="put tables and samples into the pages")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    model, asked = load(options.weights), drawn(options.samples, 4)
    made = samples(model, asked.captions)
    report = {
        "denoising": validate(model, "cpu"),
        "correspondence": correspondence(model, options.pairs),
        "adherence": adherence(model, made, asked, drawn(24, 3)),
    }
    (options.out / "evaluation.json").write_text(as_json(report), encoding="utf-8")
    picture = sheet(made, asked.images)
    picture.save(options.out / "samples.png", optimize=True)
    print("\n\n".join(f"{name}\n\n{text}" for name, text in tables(report).items()))
    print(f"\nsegmentation accuracy {report['adherence']['segmentation accuracy']:.3f}")
    if options.write:
        write_tables(Path(scenes.__file__).parent / "README.md", tables(report))
        picture.save(DOCS / "paperland_samples.webp", quality=85)


if __name__ == "__main__":
    main()
