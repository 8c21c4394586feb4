"""What each part of SCSA does, on Paperland pairs with known labels: style taken over and structure kept.

    python tools/run.py benchmarks.scsa_quality [--count 50] [--steps 20] [--workers 2] [--write]

Runs the nodes that ship, in ComfyUI, by StyleID's recipe: DDIM inversion with the empty prompt and no guidance, the
noisiest step skipped, AdaIN of the latent that the run starts from, attention to the references at every step. Pairs
and measures as in `benchmarks.semantix_quality`; every finished pair is kept in --out: call it again to go on.
"""

import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..paperland import scenes
from ..paperland.model import PATCH
from ..regions.semantic_map import SemanticMap, resample_labels
from . import pool, report
from .agreement import agreement
from .host import call, demo
from .pairs import FIGURES, FIRST_SEED, Judge, Pair, pair_of

SKIP = 1
WRONG = 0.2
BLOCK = 16  # pixels, of wrong labels
ALSO_RATED = ("one", "automatic, number given")  # maps that are compared with the true ones beside those of variants
GRID_ROWS = 6
OURS = "SCSA"


@dataclass(frozen=True)
class Variant:
    """One way to restyle.

    Attributes:
        maps: which semantic maps, see `Prepared.maps_of`.
        inputs: of Apply SCSA where they are not its defaults.
        adain: the run starts from S-AdaIN of the content's noise, else from the noise itself.
        patched: False leaves SCSA out.
    """

    maps: str = "true"
    inputs: dict[str, float] = field(default_factory=dict)
    adain: bool = True
    patched: bool = True


def variants() -> dict[str, Variant]:
    """The full method, each part left out in turn, and other maps."""
    full = Variant()

    def weights(**inputs: float) -> Variant:
        return replace(full, inputs=inputs)

    return {
        "S-AdaIN only": replace(full, patched=False),
        "universal attention": Variant("one", {"a1": 0.0}),
        OURS: full,
        "without SCA": weights(t1=0.0),
        "without SCA, SSA for it": weights(t1=0.0, t2=1.0),
        "without SSA": weights(t2=0.0),
        "without SSA, SCA for it": weights(t1=1.0, t2=0.0),
        "SCA and SSA alike": weights(t1=0.5, t2=0.5),
        "without S-AdaIN": replace(full, adain=False),
        "without map pictures": weights(a1=0.0),
        "automatic maps": Variant("automatic"),
        "20% wrong, blocks": Variant("blocks"),
        "20% wrong, places": Variant("places"),
    }


def wrong_labels(labels: Tensor, side: int, number: int) -> Tensor:
    """Labels [1, H, W] of which `WRONG` of the squares of `side` pixels, drawn by chance, have another label of the
    picture's own, one for the whole square where it differs."""
    g = scenes.seeded(FIRST_SEED + 31 * number + side)
    h, w = (n // side for n in labels.shape[1:])
    known = torch.unique(labels)
    chosen = torch.zeros(h * w, dtype=torch.bool)
    chosen[torch.randperm(h * w, generator=g)[: round(WRONG * h * w)]] = True
    # Another one than the square shows most of, so that all that are chosen are wrong.
    most = torch.searchsorted(known, resample_labels(labels, (h, w)).flatten())
    drawn = known[(most + torch.randint(1, len(known), (h * w,), generator=g)) % len(known)]

    def squares(t: Tensor) -> Tensor:
        return t.unflatten(0, (h, w)).repeat_interleave(side, 0).repeat_interleave(side, 1)

    return torch.where(squares(chosen), squares(drawn), labels)


class Prepared:
    """Inversions of a pair and of its map pictures, made when a variant first asks for them."""

    def __init__(self, pair: Pair, number: int, steps: int) -> None:
        self.pair, self.number, self.steps = pair, number, steps
        self.demo = demo()
        self.empty = self.demo.prompt("")
        self.content, self.style = self._inverted(pair.context.images, pair.reference.images)
        self.maps: dict[str, SemanticMap] = {}
        self.map_pictures: dict[str, tuple[Any, Any]] = {}

    def _inverted(self, content: Tensor, style: Tensor) -> tuple[Any, Any]:
        """Two pictures as one batch, as the example graphs do it."""
        from ..nodes.nodes_inversion import DDIMInversion, InversionFromBatch

        both = call(
            DDIMInversion,
            model=self.demo.model,
            positive=self.empty,
            negative=self.empty,
            latent=self.demo.encode(torch.cat([content, style])),
            steps=self.steps,
            scheduler="normal",
        ).inversion
        one, other = (call(InversionFromBatch, inversion=both, batch_index=i).inversion for i in (0, 1))
        return one, other

    def maps_of(self, name: str) -> SemanticMap:
        """The true maps, "one" region everywhere, "blocks" or "places" with wrong labels, or "automatic" ones."""
        if name not in self.maps:
            self.maps[name] = self._automatic(name) if name.startswith("automatic") else self._labelled(name)
        return self.maps[name]

    def _labelled(self, name: str) -> SemanticMap:
        from ..nodes.nodes_adain import MapFromLabels

        labels = self.pair.context.labels, self.pair.reference.labels
        if name == "one":
            labels = torch.zeros_like(labels[0]), torch.zeros_like(labels[1])
        elif name != "true":
            side = BLOCK if name == "blocks" else PATCH
            labels = wrong_labels(labels[0], side, self.number), wrong_labels(labels[1], side, self.number + 7919)
        return call(MapFromLabels, content=labels[0], style=labels[1]).semantic_map

    def _automatic(self, name: str) -> SemanticMap:
        from ..nodes.nodes_auto_map import AutoMap

        labels = torch.cat([self.pair.context.labels, self.pair.reference.labels])
        return call(
            AutoMap,
            model=self.demo.model,
            content=self.content,
            style=self.style,
            regions=0 if name == "automatic" else len(labels.unique()),
            seed=self.number,
        ).semantic_map

    def pictures_of(self, name: str) -> dict[str, Any]:
        """For Apply SCSA's pictures of the maps: regions in the demo world's colours, or the node draws its own."""
        if name == "automatic":
            return {"vae": self.demo.vae}
        if name not in self.map_pictures:
            maps = self.maps_of(name)
            self.map_pictures[name] = self._inverted(*(scenes.label_image(m) for m in (maps.content, maps.style)))
        return dict(zip(("content_map", "style_map"), self.map_pictures[name], strict=True))

    def run(self, variant: Variant) -> Tensor:
        """The picture [1, H, W, 3]."""
        from comfy_extras.nodes_custom_sampler import CFGGuider, SamplerCustomAdvanced

        from ..nodes.nodes_adain import AdaIN
        from ..nodes.nodes_inversion import InversionLatent, Replay
        from ..nodes.nodes_scsa import ApplySCSA

        maps, model, start = self.maps_of(variant.maps), self.demo.model, {}
        if variant.adain:
            content, style = (call(InversionLatent, inversion=i, step=SKIP).latent for i in (self.content, self.style))
            start = {"start": call(AdaIN, content=content, style=style, semantic_map=maps).latent}
        if variant.patched:
            looks = variant.inputs.get("a1") != 0.0 and variant.inputs.get("t1") != 0.0
            pictures = self.pictures_of(variant.maps) if looks else {}
            references = {"content": self.content, "style": self.style, "semantic_map": maps, **pictures}
            model = call(ApplySCSA, model=model, **references, **variant.inputs).model
        run = call(Replay, inversion=self.content, skip=SKIP, **start)
        guider = call(CFGGuider, model=model, positive=self.empty, negative=self.empty, cfg=1.0).guider
        out = call(
            SamplerCustomAdvanced,
            noise=run.noise,
            guider=guider,
            sampler=run.sampler,
            sigmas=run.sigmas,
            latent_image=run.latent,
        )
        return self.demo.decode(out.output)


def measure(chosen: dict[str, Variant], steps: int, number: int) -> dict[str, Any]:
    """All variants of a pair: figures, processor seconds, what the maps are like, and pictures."""
    pair = pair_of(number)
    judge = Judge(pair)
    pictures = {"content": pair.context.images, "style": pair.reference.images, "ideal": pair.ideal.images}
    start = time.process_time()
    prepared = Prepared(pair, number, steps)
    seconds = {"inversions": time.process_time() - start}
    for name, variant in chosen.items():
        start = time.process_time()
        pictures[name] = prepared.run(variant)
        seconds[name] = time.process_time() - start
    rated = dict.fromkeys([*(v.maps for v in chosen.values()), *ALSO_RATED])
    return {
        "figures": {name: judge(image) for name, image in pictures.items()},
        "maps": {name: rate(pair, prepared.maps_of(name)) for name in rated},
        "seconds": seconds,
        "pictures": {name: report.as_bytes(image[0]) for name, image in pictures.items()},
    }


def rate(pair: Pair, maps: SemanticMap) -> dict[str, float]:
    """How maps agree with the true ones on the grid of the finest attention."""
    grid = tuple(n // PATCH for n in pair.context.labels.shape[1:])
    on, truth = maps.at(grid, grid), SemanticMap(pair.context.labels, pair.reference.labels).at(grid, grid)
    return agreement(on.content[0], on.style[0], truth.content[0], truth.style[0])


def gather(found: list[dict[str, Any]]) -> dict[str, Any]:
    """All pairs in one: figures per pair, means and standard errors, and the comparison of SCSA with the others."""
    per_pair, maps = (report.by_name([f[part] for f in found]) for part in ("figures", "maps"))
    return {
        "seconds_per_pair": {
            n: report.mean_and_error([f["seconds"][n] for f in found])[0] for n in found[0]["seconds"]
        },
        "mean_and_standard_error": report.means(per_pair),
        "scsa_ahead": {
            name: {f: report.compared(per_pair[OURS][f], values) for f, values in figures.items()}
            for name, figures in per_pair.items()
        },
        "maps": report.means(maps),
        "per_pair": per_pair,
        "maps_per_pair": maps,
    }


def tables(gathered: dict[str, Any]) -> dict[str, str]:
    """The figures, and what the maps are like."""
    rows = []
    for name, figures in gathered["mean_and_standard_error"].items():
        cells = [name]
        for figure in FIGURES:
            spread = figure in ("style", "structure", "score")
            cells.append(report.with_error(figures[figure]) if spread else f"{figures[figure][0]:.3f}")
        for figure in ("style", "score"):
            ahead = gathered["scsa_ahead"][name][figure]
            won = [f"{ahead['mean']:+.3f} ± {ahead['error']:.3f}", f"{ahead['share']:.0%}"]
            cells += ["", ""] if name == OURS else won
        rows.append(cells)
    heads = ["", *FIGURES.values(), "SCSA's style ahead by", "of pairs", "SCSA's score ahead by", "of pairs"]
    maps = gathered["maps"]
    rated = [[name, *map(report.with_error, figures.values())] for name, figures in maps.items()]
    return {
        "figures": report.table(heads, rows),
        "maps": report.table(["maps", *next(iter(maps.values()))], rated),
    }


def main() -> None:
    parser = report.parser(__doc__, "scsa_quality", 50, "pairs")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    chosen = variants()
    settings = {name: asdict(v) for name, v in chosen.items()}
    mark, work = pool.fingerprint(settings, options.steps), partial(measure, chosen, options.steps)
    found = pool.measured(work, report.numbers(options), options.out, mark, options.workers)
    gathered = gather(found)
    shown = [f["pictures"] for f in found[:GRID_ROWS]]
    sheet = report.grid({name: torch.stack([p[name] for p in shown]) for name in shown[0]})
    figures = {"pairs": options.count, "first_pair": options.first, "steps": options.steps, "variants": settings}
    report.publish(options, "scsa", tables(gathered), sheet, {**figures, **gathered})
