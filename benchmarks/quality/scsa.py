"""What each part of SCSA does, on Paperland pairs with known labels: style taken over and structure kept.

By StyleID's recipe: DDIM inversion with the empty prompt and no guidance, the noisiest step skipped, AdaIN of the
latent that the run starts from, attention to the references at every step. Pairs and measures as for Semantix.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...paperland import scenes
from ...paperland.model import PATCH
from ...pictures import overlay
from ...regions.map_pictures import region_colors
from ...regions.nearest import fill_nearest
from ...regions.semantic_map import SemanticMap, resample_labels
from ...runner.graph import Graph
from .. import report
from ..agreement import agreement
from ..pairs import FIGURES, FIRST_SEED, Judge, Pair, pair_of
from .graphs import PRE, Builder, Link
from .part import Found, as_pictures, sheet_of
from .queue import Made, Task

SKIP = 1
WRONG = 0.2
BLOCK = 16  # pixels, of wrong labels
SIDES = ("content", "style")
AUTOMATIC, GIVEN = "automatic", "automatic, number given"
ALSO_RATED = ("one", GIVEN)  # maps that are compared with the true ones beside those of variants
MOST_REGIONS = 64
OURS = "SCSA"


@dataclass(frozen=True)
class Variant:
    """One way to restyle.

    Attributes:
        maps: which semantic maps: "true", "one" region everywhere, "blocks" or "places" with wrong labels, "automatic".
        inputs: of Apply SCSA where they are not its defaults.
        adain: the run starts from S-AdaIN of the content's noise, else from the noise itself.
        patched: False leaves SCSA out.
    """

    maps: str = "true"
    inputs: dict[str, float] = field(default_factory=dict)
    adain: bool = True
    patched: bool = True

    @property
    def looks(self) -> bool:
        """Whether it needs pictures of the maps."""
        return self.patched and self.inputs.get("a1") != 0.0 and self.inputs.get("t1") != 0.0


UNIVERSAL = Variant("one", {"a1": 0.0})  # StyleID's attention to all of the style


def variants() -> dict[str, Variant]:
    """The full method, each part left out in turn, and other maps."""
    full = Variant()

    def weights(**inputs: float) -> Variant:
        return replace(full, inputs=inputs)

    return {
        "S-AdaIN only": replace(full, patched=False),
        "universal attention": UNIVERSAL,
        OURS: full,
        "without SCA": weights(t1=0.0),
        "without SCA, SSA for it": weights(t1=0.0, t2=1.0),
        "without SSA": weights(t2=0.0),
        "without SSA, SCA for it": weights(t1=1.0, t2=0.0),
        "SCA and SSA alike": weights(t1=0.5, t2=0.5),
        "without S-AdaIN": replace(full, adain=False),
        "without map pictures": weights(a1=0.0),
        "automatic maps": Variant(AUTOMATIC),
        "20% wrong, blocks": Variant("blocks"),
        "20% wrong, places": Variant("places"),
    }


def inverted(g: Builder, picture: Link, steps: int, scheduler: str) -> Link:
    """DDIM inversion with the empty prompt."""
    prompts = {"positive": g.empty, "negative": g.empty}
    return g.link(
        f"{PRE}DDIMInversion", model=g.model, latent=g.encoded(picture), steps=steps, scheduler=scheduler, **prompts
    )


def restyled(
    g: Builder, title: str, variant: Variant, both: Sequence[Link], maps: Link, looks: Mapping[str, Link]
) -> None:
    """Run a variant and save its picture under the title.

    Args:
        both: inversions of content and style; maps: their semantic map.
        looks: inversions of the maps' pictures, or the VAE that they are drawn with; for variants that look at them.
    """
    content, style = both
    model, start = g.model, None
    if variant.adain:
        noisy = {
            name: g.link(f"{PRE}InversionLatent", inversion=side, step=SKIP)
            for name, side in zip(SIDES, both, strict=True)
        }
        start = g.link(f"{PRE}AdaIN", semantic_map=maps, **noisy)
    if variant.patched:
        seen = looks if variant.looks else {}
        given = {"content": content, "style": style, "semantic_map": maps, **seen, **variant.inputs}
        model = g.link(f"{PRE}ApplySCSA", title, model=g.model, **given)
    run = g.node(f"{PRE}Replay", inversion=content, skip=SKIP, start=start)
    guider = g.link("CFGGuider", model=model, positive=g.empty, negative=g.empty, cfg=1.0)
    parts = {"noise": [run, 0], "sampler": [run, 1], "sigmas": [run, 2], "latent_image": [run, 3]}
    g.save(g.decoded(g.link("SamplerCustomAdvanced", guider=guider, **parts)), title)


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


def drawn_maps(pair: Pair, name: str, number: int) -> SemanticMap:
    """The true maps, "one" region everywhere, or "blocks" or "places" with wrong labels."""
    content, style = pair.context.labels, pair.reference.labels
    if name == "one":
        content, style = torch.zeros_like(content), torch.zeros_like(style)
    elif name != "true":
        side = BLOCK if name == "blocks" else PATCH
        content, style = wrong_labels(content, side, number), wrong_labels(style, side, number + 7919)
    return SemanticMap(content, style)


def seen_maps(preview: Tensor, grid: tuple[int, int]) -> SemanticMap:
    """The map that Preview Semantic Map shows [H, W, 3] of square pictures at opacity 1, on a grid.

    Borders and numbers hide the colours below them; there the nearest ones count.
    """
    pixels = report.as_bytes(preview).long()
    colors = torch.tensor(region_colors(MOST_REGIONS))
    top, size = overlay.MARGIN + overlay.LINE, overlay.HEIGHT
    sides = []
    for left in (overlay.MARGIN, overlay.MARGIN + size + overlay.GAP):
        part = pixels[top : top + size, left : left + size]
        same = (part[:, :, None] == colors).all(dim=-1)
        labels = torch.where(same.any(dim=-1), same.long().argmax(dim=-1), -1)[None]
        sides.append(resample_labels(fill_nearest(labels, labels >= 0), grid))
    return SemanticMap(*sides)


@dataclass(frozen=True)
class SCSA:
    """A `Part`."""

    steps: int = 20
    variants: Mapping[str, Variant] = field(default_factory=variants)
    page = "scsa"
    what = "pairs"
    count = 40

    @property
    def drawn(self) -> list[str]:
        """Names of the maps that are drawn and loaded."""
        made = AUTOMATIC, "one"
        return [name for name in dict.fromkeys(v.maps for v in self.variants.values()) if name not in made]

    def settings(self) -> dict[str, Any]:
        return {"steps": self.steps, "variants": {name: asdict(v) for name, v in self.variants.items()}}

    def graph(self) -> Graph:
        g = Builder()
        both = [inverted(g, g.picture(side), self.steps, "normal") for side in SIDES]
        looked_at = {v.maps for v in self.variants.values() if v.looks}
        maps, looks = {"one": g.one_region()}, {}
        for name in self.drawn:
            pictures = {side: g.picture(f"{name} map of {side}") for side in SIDES}
            maps[name] = g.link(f"{PRE}MapFromColors", smallest=0.0, **pictures)
            if name in looked_at:
                looks[name] = {f"{s}_map": inverted(g, p, self.steps, "normal") for s, p in pictures.items()}
        sides = dict(zip(SIDES, both, strict=True))
        for name, regions in ((AUTOMATIC, 0), (GIVEN, g.number("Regions"))):
            found = g.link(f"{PRE}AutoMap", model=g.model, regions=regions, seed=g.number(f"Seed, {name}"), **sides)
            maps[name], looks[name] = found, {"vae": g.vae}
            g.save(g.link(f"{PRE}PreviewMap", semantic_map=found, opacity=1.0), f"Map, {name}")
        for name, variant in self.variants.items():
            restyled(g, name, variant, both, maps[variant.maps], looks.get(variant.maps, {}))
        return g.graph

    def task(self, number: int) -> Task:
        pair = pair_of(number)
        values: dict[str, Any] = {"content.image": pair.context.images[0], "style.image": pair.reference.images[0]}
        for name in self.drawn:
            maps = drawn_maps(pair, name, number)
            for side in SIDES:
                values[f"{name} map of {side}.image"] = scenes.label_image(getattr(maps, side))[0]
        values |= {f"Seed, {name}.value": number for name in (AUTOMATIC, GIVEN)}
        values["Regions.value"] = len(torch.cat([pair.context.labels, pair.reference.labels]).unique())
        return Task(f"pair_{number:04d}", values)

    def judged(self, number: int, made: Made) -> Found:
        """Figures, what the maps are like, and pictures."""
        pair = pair_of(number)
        judge = Judge(pair)
        pictures = {"content": pair.context.images, "style": pair.reference.images, "ideal": pair.ideal.images}
        pictures |= {name: made.pictures(name) for name in self.variants}
        truth = drawn_maps(pair, "true", number)
        grid = truth.content.shape[1] // PATCH, truth.content.shape[2] // PATCH
        maps = {}
        for name in dict.fromkeys([*(v.maps for v in self.variants.values()), AUTOMATIC, *ALSO_RATED]):
            automatic = name.startswith(AUTOMATIC)
            maps[name] = (
                seen_maps(made.pictures(f"Map, {name}")[0], grid) if automatic else drawn_maps(pair, name, number)
            )
        return {
            "figures": {name: judge(image) for name, image in pictures.items()},
            "maps": {name: rate(found, truth, grid) for name, found in maps.items()},
            "pictures": as_pictures(pictures),
        }

    def gather(self, found: Sequence[Found]) -> dict[str, Any]:
        """Means and standard errors, and the comparison of SCSA with the others."""
        per_pair, maps = (report.by_name([f[part] for f in found]) for part in ("figures", "maps"))
        return {
            "mean_and_standard_error": report.means(per_pair),
            "scsa_ahead": {
                name: {f: report.compared(per_pair[OURS][f], values) for f, values in figures.items()}
                for name, figures in per_pair.items()
            },
            "maps": report.means(maps),
            "maps_per_pair": maps,
        }

    def tables(self, gathered: dict[str, Any]) -> dict[str, str]:
        """The figures, and what the maps are like."""
        rows = []
        for name, figures in gathered["mean_and_standard_error"].items():
            cells = [name]
            for figure in FIGURES:
                spread = figure in ("style", "structure", "score")
                cells.append(report.with_error(figures[figure]) if spread else f"{figures[figure][0]:.3f}")
            for figure in ("style", "score"):
                cells += ["", "", ""] if name == OURS else report.won(gathered["scsa_ahead"][name][figure])
            rows.append(cells)
        ahead = [head for f in ("style", "score") for head in (f"SCSA's {f} ahead by", "of pairs", "p")]
        maps = gathered["maps"]
        rated = [[name, *map(report.with_error, figures.values())] for name, figures in maps.items()]
        return {
            "figures": report.table(["", *FIGURES.values(), *ahead], rows),
            "maps": report.table(["maps", *next(iter(maps.values()))], rated),
        }

    def sheet(self, found: Sequence[Found]) -> Image.Image:
        return sheet_of(found)


def rate(maps: SemanticMap, truth: SemanticMap, grid: tuple[int, int]) -> dict[str, float]:
    """How maps agree with the true ones on the grid of the finest attention."""
    on, true = maps.at(grid, grid), truth.at(grid, grid)
    return agreement(on.content[0], on.style[0], true.content[0], true.style[0])
