"""How good the Paperland model is, in numbers and pictures: `python -m semantic_style.paperland.evaluate --help` (see
paperland/README.md)."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..attention.layers import feature_blocks
from ..regions.semantic_map import resample_labels
from ..samplers.features import FeatureTap
from . import scenes
from .model import PATCH, WEIGHTS, Paperland, encode_pixels, load
from .scenes import REGIONS, Scenes
from .text import parse
from .train import sample, validate, write_sheet

MIDDLE_SIGMA = 0.6
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
    are left out.
    Besides both feature stages (without a caption and with each scene's own): chance, raw pixels (the clean 4x4
    patches) and the same
    position.
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
def adherence(model: Paperland, count: int = 32, cfg: float = 3.0) -> dict[str, float]:
    """Do samples show the colours that their captions ask for?

    Returns:
        Mean RGB distance (0..1.73) of each region's mean colour to its caption's ("own"), to that of another caption
        ("shuffled"), the same
        for real scenes under the same segmentation ("real", the floor), and the segmentation's accuracy on real scenes.
    """
    bank, unseen = drawn(24, 3), drawn(count, 4)
    made = torch.cat([sample(model, unseen.captions[i : i + 16], cfg=cfg, seed=i) for i in range(0, count, 16)])
    asked = [caption_colors(c) for c in unseen.captions]
    truth = resample_labels(unseen.labels, (32, 32))
    found = segment(model, unseen.images, bank)

    def distance(images: Tensor, labels: Tensor, shift: int) -> float:
        pixels = F.avg_pool2d(images.permute(0, 3, 1, 2), 4).permute(0, 2, 3, 1)
        values = []
        for i in range(count):
            own, wanted = asked[i], asked[(i + shift) % count]
            for region in own.keys() & wanted.keys():
                where = labels[i] == REGIONS.index(region)
                if where.sum() >= 4:
                    values.append((pixels[i][where].mean(dim=0) - wanted[region]).norm())
        return torch.stack(values).mean().item()

    labels = segment(model, made, bank)
    return {
        "own": distance(made, labels, 0),
        "shuffled": distance(made, labels, 1),
        "real": distance(unseen.images, found, 0),
        "segmentation accuracy": (found == truth).float().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, default=Path("output"), help="folder for evaluation.json and samples.png")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--samples", type=int, default=32)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    model = load(arguments.weights)
    report = {
        "denoising": validate(model, "cpu"),
        "correspondence": correspondence(model, arguments.pairs),
        "adherence": adherence(model, arguments.samples),
    }
    (arguments.out / "evaluation.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))
    write_sheet(model, arguments.out / "samples.png")


if __name__ == "__main__":
    main()
