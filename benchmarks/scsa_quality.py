"""What each part of SCSA does, on Paperland pairs with known labels: style taken over and structure kept.

    python tools/run.py benchmarks.scsa_quality [--pairs 50] [--steps 24] [--workers 2]

The recipe is StyleID's: DDIM inversion with the empty prompt and no guidance, the noisiest step skipped, AdaIN of the
latent that the run starts from, attention to the references at every step. Pairs, measures and files as in
`benchmarks.semantix_quality`; every finished batch is kept in --out: call it again to go on. At the end it writes there
`scsa_quality.json` (all figures), `scsa_table.md` and `scsa_grid.png` (the first pairs).
"""

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attention.layers import feature_blocks
from ..attention.scsa_attention import Settings
from ..paperland import model as paperland
from ..paperland import scenes
from ..paperland.model import Paperland
from ..regions.adain import adain_latents
from ..regions.clustering import cluster, joint_vectors
from ..regions.semantic_map import SemanticMap, resample_labels
from ..samplers.features import FeatureTap
from ..samplers.inversion import Inversion
from ..samplers.replay import replay
from .agreement import agreement
from .scsa_denoiser import Pictures, Read, ScsaDenoiser, invert
from .semantix_quality import FIGURES, FIRST_SEED, Judge, Pairs, batch_file, batches, mean_and_error, pairs_of

SKIP = 1
WRONG = 0.2
BLOCK = 16  # pixels, of wrong labels
PLACE = paperland.PATCH
ALSO_RATED = ("one", "automatic, number given")  # maps that are compared with the true ones beside those of variants
AUTO_SIGMA = 0.6  # the node's default
GRID_ROWS = 6
CELL, GAP, HEAD = 128, 6, 34


@dataclass(frozen=True)
class Variant:
    """One way to restyle.

    Attributes:
        maps: which semantic maps: see `maps_of`; "one" is one region everywhere.
        pictures: which maps are drawn as the references' map pictures; None where a1 is 0.
        settings: of SCSA.
        adain: the run starts from S-AdaIN of the content's noise, else from the noise itself.
        patched: False leaves SCSA out.
    """

    maps: str = "true"
    pictures: str | None = "true"
    settings: Settings = field(default_factory=Settings)
    adain: bool = True
    patched: bool = True


def variants() -> dict[str, Variant]:
    """The full method, each part left out in turn, and other maps."""
    full = Variant()

    def maps(name: str) -> Variant:
        return replace(full, maps=name, pictures=name)

    universal = replace(full, maps="one", pictures=None, settings=Settings(a1=0.0))
    return {
        "S-AdaIN only": replace(full, patched=False),
        "universal attention": universal,
        "SCSA": full,
        "without SCA": replace(full, settings=Settings(t1=0.0)),
        "without SCA, SSA for it": replace(full, settings=Settings(t1=0.0, t2=1.0)),
        "without SSA": replace(full, settings=Settings(t2=0.0)),
        "without SSA, SCA for it": replace(full, settings=Settings(t1=1.0, t2=0.0)),
        "SCA and SSA alike": replace(full, settings=Settings(t1=0.5, t2=0.5)),
        "without S-AdaIN": replace(full, adain=False),
        "without map pictures": replace(full, pictures=None, settings=Settings(a1=0.0)),
        "automatic maps": maps("automatic"),
        "20% wrong, blocks": maps("blocks"),
        "20% wrong, places": maps("places"),
    }


def wrong_labels(labels: Tensor, side: int, numbers: Sequence[int]) -> Tensor:
    """Labels [B, H, W] of which `WRONG` of the squares of `side` pixels, drawn by chance, have another label of the
    picture's own, one for the whole square where it differs."""
    out = labels.clone()
    for i, number in enumerate(numbers):
        g = scenes.seeded(FIRST_SEED + 31 * number + side)
        h, w = (n // side for n in labels.shape[1:])
        known = torch.unique(labels[i])
        chosen = torch.zeros(h * w, dtype=torch.bool)
        chosen[torch.randperm(h * w, generator=g)[: round(WRONG * h * w)]] = True
        # Another one than the square shows most of, so that all that are chosen are wrong.
        most = torch.searchsorted(known, resample_labels(labels[i : i + 1], (h, w)).flatten())
        shift = torch.randint(1, len(known), (h * w,), generator=g)
        drawn = known[(most + shift) % len(known)]

        def full(t: Tensor, h: int = h, w: int = w) -> Tensor:
            return t.unflatten(0, (h, w)).repeat_interleave(side, 0).repeat_interleave(side, 1)

        out[i] = torch.where(full(chosen), full(drawn), labels[i])
    return out


def automatic_maps(
    model: Paperland, content: Inversion, style: Inversion, regions: Sequence[int], seeds: Sequence[int]
) -> SemanticMap:
    """Joint clustering of both pictures' decoder features, of every pair by itself, as the node does it; 0 regions
    chooses."""
    found: list[list[Tensor]] = []
    noise = torch.randn(content.clean.shape[1:], generator=torch.Generator().manual_seed(0))
    for inversion in (content, style):
        tap = FeatureTap(feature_blocks(model.unet))
        x = inversion.clean + AUTO_SIGMA * noise
        model(x, x.new_full((len(x),), AUTO_SIGMA), model.text([""]).expand(len(x), -1, -1), tap.options())
        found.append([tap.features[b] for b in tap.blocks])
    rows = []
    for i in range(len(content.clean)):
        sides = [joint_vectors([stage[i : i + 1] for stage in stages]) for stages in found]
        rows.append(cluster(sides[0], sides[1], regions=regions[i], seed=seeds[i]).regions)
    return SemanticMap(torch.cat([r.content for r in rows]), torch.cat([r.style for r in rows]))


class Prepared:
    """Inversions of a batch of pairs and of its map pictures, made when a variant first asks for them."""

    def __init__(self, model: Paperland, pairs: Pairs, steps: int) -> None:
        self.model, self.pairs = model, pairs
        self.empty = model.text([""])
        self.sigmas = paperland.sigmas_normal(steps)
        self.read: Read = {}
        self.content, self.style = self._inverted(pairs.contexts.images), self._inverted(pairs.references.images)
        self.maps: dict[str, SemanticMap] = {}
        self.map_pictures: dict[str, tuple[Inversion, Inversion]] = {}

    def _inverted(self, images: Tensor) -> Inversion:
        return invert(self.model, paperland.encode_pixels(images), self.sigmas, self.empty, self.read)

    def maps_of(self, name: str) -> SemanticMap:
        if name not in self.maps:
            self.maps[name] = self._maps(name)
        return self.maps[name]

    def _maps(self, name: str) -> SemanticMap:
        content, style, numbers = self.pairs.contexts.labels, self.pairs.references.labels, self.pairs.numbers
        if name == "true":
            return SemanticMap(content, style)
        if name == "one":
            return SemanticMap(torch.zeros_like(content), torch.zeros_like(style))
        if name in ("blocks", "places"):
            side = BLOCK if name == "blocks" else PLACE
            return SemanticMap(
                wrong_labels(content, side, numbers), wrong_labels(style, side, [n + 7919 for n in numbers])
            )
        given = [len(torch.unique(torch.cat([c, s]))) for c, s in zip(content, style, strict=True)]
        wanted = given if name == "automatic, number given" else [0] * len(given)
        return automatic_maps(self.model, self.content, self.style, wanted, numbers)

    def pictures_of(self, name: str | None) -> Pictures:
        """The references, with the pictures of these maps."""
        if name is None:
            return Pictures(self.content, self.style)
        if name not in self.map_pictures:
            maps, size = self.maps_of(name), tuple(self.pairs.contexts.labels.shape[1:])
            colors = map_colors(name)
            drawn = (colors[resample_labels(labels, size)] for labels in (maps.content, maps.style))
            content, style = (self._inverted(images) for images in drawn)
            self.map_pictures[name] = content, style
        return Pictures(self.content, self.style, *self.map_pictures[name])

    def run(self, variant: Variant) -> Tensor:
        """Pictures [B, H, W, 3]."""
        regions = self.maps_of(variant.maps)
        x, levels = self.content.trajectory[SKIP], self.sigmas[SKIP:]
        if variant.adain:
            x = adain_latents(x, self.style.trajectory[SKIP], regions)
        model: Callable[..., Tensor] = self.model.guided(self.empty, self.empty, 1.0)
        if variant.patched:
            pictures = self.pictures_of(variant.pictures)
            model = ScsaDenoiser(self.model, pictures, regions, variant.settings, self.empty, read=self.read)
        return paperland.decode_pixels(replay(model, x, levels, inversion=self.content))


def map_colors(name: str) -> Tensor:
    """[labels, 3]: what map pictures are painted with."""
    if name.startswith("automatic"):
        return torch.tensor(list(scenes.COLORS.values())) / 255
    return scenes.LABEL_COLORS.float() / 255


@torch.no_grad()
def run_batch(
    model: Paperland, numbers: Sequence[int], chosen: dict[str, Variant], steps: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """All variants of a batch: figures, seconds per pair, what the maps are like, and pictures as bytes."""
    pairs = pairs_of(numbers)
    judge = Judge(pairs)
    drawn = {"content": pairs.contexts, "style": pairs.references, "ideal": pairs.ideals}
    pictures = {name: s.images for name, s in drawn.items()}
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    prepared = Prepared(model, pairs, steps)
    seconds["inversions"] = (time.perf_counter() - start) / len(numbers)
    tell("inverted")
    for name, variant in chosen.items():
        start = time.perf_counter()
        pictures[name] = prepared.run(variant)
        seconds[name] = (time.perf_counter() - start) / len(numbers)
        tell(name)
    for name in ALSO_RATED:
        prepared.maps_of(name)
    return {
        "numbers": list(numbers),
        "figures": {name: judge(images) for name, images in pictures.items()},
        "maps_read": "fresh noise",
        "maps": {name: maps_figures(pairs, maps) for name, maps in prepared.maps.items()},
        "seconds": seconds,
        "pictures": {name: (images * 255).round().byte() for name, images in pictures.items()},
    }


def maps_figures(pairs: Pairs, maps: SemanticMap) -> dict[str, list[float]]:
    """How maps agree with the true ones on the grid of the finest attention, for each pair."""
    grid = tuple(n // PLACE for n in pairs.contexts.labels.shape[1:])
    on, truth = maps.at(grid, grid), SemanticMap(pairs.contexts.labels, pairs.references.labels).at(grid, grid)
    rows = zip(on.content, on.style, truth.content, truth.style, strict=True)
    found = [agreement(*row) for row in rows]
    return {name: [f[name] for f in found] for name in found[0]}


def fingerprint(arguments: argparse.Namespace, chosen: dict[str, Variant]) -> str:
    """Of everything that a batch's results depend on but the code."""
    weights = hashlib.sha256(arguments.checkpoint.read_bytes()).hexdigest()
    parts = [weights, arguments.steps, {name: asdict(v) for name, v in chosen.items()}]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def work(arguments: argparse.Namespace, chosen: dict[str, Variant], worker: int) -> None:
    """Batches that are not there yet: every worker starts in its own part and goes on where others have not been."""
    torch.set_num_threads(1)
    mark = fingerprint(arguments, chosen)
    model = paperland.load(arguments.checkpoint)
    everything = batches(arguments)
    first = worker * len(everything) // arguments.workers
    for numbers in [*everything[first:], *everything[:first]]:
        path = batch_file(arguments, numbers, mark)
        if path.exists():
            continue
        start = time.perf_counter()

        def tell(what: str, numbers: range = numbers, start: float = start) -> None:
            gone = time.perf_counter() - start
            print(f"worker {worker}: pairs {numbers.start}-{numbers[-1]}, {what}, {gone:.0f} s", flush=True)

        result = run_batch(model, numbers, chosen, arguments.steps, tell)
        part = path.with_suffix(f".part{worker}")
        torch.save(result, part)
        part.replace(path)


def gather(arguments: argparse.Namespace, chosen: dict[str, Variant]) -> dict[str, Any]:
    """All batches in one: figures per pair, means and standard errors, and the comparison of SCSA with the others."""
    mark = fingerprint(arguments, chosen)
    found = [torch.load(batch_file(arguments, b, mark)) for b in batches(arguments)]
    per_pair = {
        name: {figure: [v for f in found for v in f["figures"][name][figure]] for figure in FIGURES}
        for name in found[0]["figures"]
    }
    maps = {
        name: {figure: [v for f in found for v in f["maps"][name][figure]] for figure in figures}
        for name, figures in found[0]["maps"].items()
    }
    ahead = {}
    for name, figures in per_pair.items():
        gains = {f: [a - b for a, b in zip(per_pair["SCSA"][f], figures[f], strict=True)] for f in FIGURES}
        ahead[name] = {
            figure: {
                "mean_and_error": mean_and_error(values),
                "share_of_pairs": sum(v > 0 for v in values) / len(values),
            }
            for figure, values in gains.items()
        }
    return {
        "pairs": arguments.pairs,
        "first_pair": arguments.first,
        "steps": arguments.steps,
        "variants": {name: asdict(v) for name, v in chosen.items()},
        "seconds_per_pair": {name: sum(f["seconds"][name] for f in found) / len(found) for name in found[0]["seconds"]},
        "mean_and_standard_error": _means(per_pair),
        "scsa_ahead": ahead,
        "maps": _means(maps),
        "per_pair": per_pair,
        "maps_per_pair": maps,
    }


def _means(per_pair: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, tuple[float, float]]]:
    return {name: {f: mean_and_error(v) for f, v in figures.items()} for name, figures in per_pair.items()}


def table(report: dict[str, Any]) -> str:
    """The figures as a markdown table."""
    heads = ["", *FIGURES.values(), "SCSA's style ahead by", "of pairs", "SCSA's score ahead by", "of pairs"]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    for name, figures in report["mean_and_standard_error"].items():
        cells = [
            f"{mean:.3f} ± {error:.3f}" if figure in ("style", "structure", "score") else f"{mean:.3f}"
            for figure, (mean, error) in figures.items()
        ]
        for figure in ("style", "score"):
            ahead = report["scsa_ahead"][name][figure]
            mean, error = ahead["mean_and_error"]
            cells += ["", ""] if name == "SCSA" else [f"{mean:+.3f} ± {error:.3f}", f"{ahead['share_of_pairs']:.0%}"]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    lines += ["", "| maps | " + " | ".join(next(iter(report["maps"].values()))) + " |"]
    lines.append("| --- |" + " --- |" * len(next(iter(report["maps"].values()))))
    for name, figures in report["maps"].items():
        lines.append(f"| {name} | " + " | ".join(f"{m:.3f} ± {e:.3f}" for m, e in figures.values()) + " |")
    return "\n".join(lines) + "\n"


def grid(arguments: argparse.Namespace, chosen: dict[str, Variant]) -> Any:
    """The first pairs as rows, a column for each picture."""
    from PIL import Image, ImageDraw, ImageFont

    mark = fingerprint(arguments, chosen)
    found = [torch.load(batch_file(arguments, b, mark))["pictures"] for b in batches(arguments)]
    pictures = {name: torch.cat([f[name] for f in found])[:GRID_ROWS].numpy() for name in found[0]}
    rows = min(GRID_ROWS, arguments.pairs)
    sheet = Image.new("RGB", (len(pictures) * (CELL + GAP) - GAP, HEAD + rows * (CELL + GAP) - GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, (name, images) in enumerate(pictures.items()):
        draw.text((column * (CELL + GAP), 2), name.replace(", ", ",\n"), (40, 36, 32), font, spacing=1)
        for row, image in enumerate(images):
            sheet.paste(Image.fromarray(image), (column * (CELL + GAP), HEAD + row * (CELL + GAP)))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--first", type=int, default=0, help="number of the first pair; tune on others than you report")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=5, help="pairs per model call")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--checkpoint", type=Path, default=paperland.WEIGHTS)
    parser.add_argument("--only", nargs="+", help="only these variants; SCSA is always there")
    parser.add_argument("--out", type=Path, default=Path("output/scsa_quality"))
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    chosen = variants()
    if arguments.only:
        chosen = {name: v for name, v in chosen.items() if name == "SCSA" or name in arguments.only}
    if arguments.worker is not None or arguments.workers == 1:
        work(arguments, chosen, arguments.worker or 0)
    else:
        command = [sys.executable, str(Path(__file__).resolve().parents[1] / "tools" / "run.py")]
        command += ["benchmarks.scsa_quality", *sys.argv[1:], "--worker"]
        running = [subprocess.Popen([*command, str(i)]) for i in range(arguments.workers)]
        codes = [process.wait() for process in running]
        if any(codes):
            sys.exit("a worker failed; what it finished is kept, call again to go on")
    if arguments.worker is not None:
        return
    report = gather(arguments, chosen)
    (arguments.out / "scsa_quality.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    (arguments.out / "scsa_table.md").write_text(table(report), encoding="utf-8")
    grid(arguments, chosen).save(arguments.out / "scsa_grid.png", optimize=True)
    print(table(report))


if __name__ == "__main__":
    main()
