"""A user's own pairs, on their own checkpoint, by the papers' protocols.

Every folder in FOLDER is a pair: `content` and `style` (png, jpg or webp, any size), if wanted `content_map` and
`style_map` (same colour, same region) and `prompt.txt` (what the content shows). For Spin it is a case: `reference`,
`background`, `mask` (white where the subject goes) and `class.txt` (the subject in a word), if wanted `reference_mask`
and `prompt.txt` (what the background shows).
"""

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...paperland.scenes import Scenes
from ...regions.color_maps import regions_from_colors
from ...regions.semantic_map import resample_labels
from ...runner.graph import Graph
from .. import measure, report
from .. import spin_cases as spin
from . import perceptual
from .graphs import PAPERLAND, PRE, Builder, Link
from .part import Found
from .perceptual import write_folders
from .queue import Made, Servers, Task, read
from .scsa import SIDES, UNIVERSAL, Variant, inverted, restyled
from .semantix import OFF, sampled
from .spin import INPAINTED, LEARNING, PLAIN, WORD, Canvas, Sampling

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
CELL = 256  # pixels, of the sheet
SHEET_ROWS = 8
IMAGES = 4  # that Spin paints for each case
REGIONWISE = ", by region"
RESTYLED = {
    "color": "colour distance to the style",
    "texture": "texture distance to the style",
    "edges": "edges kept",
    "likeness": "likeness kept",
}
PAINTED = {
    "color": "colour distance to the subject",
    "texture": "texture distance to the subject",
    "identity": "identity",
    "background": "to the background",
    "outside": "outside",
    "diversity": "diversity",
}
LOWER = {"color", "texture", "identity", "background", "outside", "lpips"}  # figures that are better when lower


class LayoutError(ValueError):
    """A folder of pairs that is not laid out as the program reads it; all of it, a line for each."""


@dataclass(frozen=True)
class Pair:
    """A folder's files by their names without endings; texts by theirs."""

    name: str
    files: Mapping[str, Path]
    texts: Mapping[str, str]

    @property
    def mapped(self) -> bool:
        """Whether it has maps, or a mask of the subject."""
        return bool({"content_map", "reference_mask"} & self.files.keys())

    def swapped(self) -> "Pair":
        """The style restyled by the content."""
        turn = {"content": "style", "style": "content", "content_map": "style_map", "style_map": "content_map"}
        return Pair(f"{self.name}_back", {turn.get(n, n): file for n, file in self.files.items()}, self.texts)


def read_pairs(folder: Path, spin_cases: bool) -> list[Pair]:
    """The pairs in a folder, or cases for Spin, in order of their names.

    Raises:
        LayoutError: no folder, no pairs in it, files that are missing or doubled.
    """
    needed = ("reference", "background", "mask") if spin_cases else SIDES
    optional = ("reference_mask",) if spin_cases else ("content_map", "style_map")
    if not folder.is_dir():
        raise LayoutError(f"{folder} is no folder")
    pairs, problems = [], []
    for place in sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith(".")):
        files: dict[str, Path] = {}
        for file in sorted(f for f in place.iterdir() if f.suffix.lower() in ENDINGS):
            if file.stem in files:
                problems.append(f"{place}: {files[file.stem].name} and {file.name}, which of them?")
            files[file.stem] = file
        problems += [f"{place}: {name} is missing ({name}.png, .jpg or .webp)" for name in needed if name not in files]
        if not spin_cases and ("content_map" in files) != ("style_map" in files):
            problems.append(f"{place}: content_map and style_map come together")
        texts = {f.stem: f.read_text(encoding="utf-8").strip() for f in place.glob("*.txt")}
        if spin_cases and not texts.get("class"):
            problems.append(f"{place}: class.txt is missing: what the subject is, in a word")
        pairs.append(Pair(place.name, {n: f for n, f in files.items() if n in (*needed, *optional)}, texts))
    if not pairs:
        problems.append(f"{folder} holds no folders; each pair is one, with {', '.join(needed)} in it")
    if problems:
        raise LayoutError("\n".join(problems))
    return pairs


@dataclass(frozen=True)
class Method:
    """A method by its paper's protocol.

    Attributes:
        checkpoint: as Load Checkpoint names it, "" for the demo model. steps: 0 for the paper's.
        mapped: whether the pairs have maps, or a mask of the reference's subject.
        compares: perceptual measures that can be taken, by name.
        ours: the variant that the others are compared with. heads: of the figures, by name.
    """

    checkpoint: str = PAPERLAND
    steps: int = 0
    mapped: bool = False
    compares: Mapping[str, perceptual.Compare] = field(default_factory=dict)
    ours = ""
    heads: ClassVar[Mapping[str, str]] = {}
    perceived: ClassVar[Mapping[str, perceptual.Measure]] = {}

    @property
    def variants(self) -> Sequence[str]:
        raise NotImplementedError

    def graph(self) -> Graph:
        raise NotImplementedError

    def tasks(self, pair: Pair) -> Iterator[tuple[Pair, Task]]:
        """What is to be made for a pair, each with the pair that it is judged by."""
        raise NotImplementedError

    def judged(self, pair: Pair, made: Made) -> Found:
        raise NotImplementedError

    def perception(self, image: Tensor, near: Mapping[str, Tensor]) -> dict[str, float]:
        """What the perceptual measures say; nan where sizes differ and must not."""
        found = {}
        for name, compare in self.compares.items():
            to = near[self.perceived[name].to]
            found[name] = compare(image, to) if name != "lpips" or to.shape == image.shape else float("nan")
        return found


class Restyling(Method):
    """What Semantix and SCSA share."""

    heads = RESTYLED
    perceived = perceptual.RESTYLED

    def sides(self, g: Builder) -> dict[str, Link]:
        """Both pictures at the model's size, saved."""
        sides = {side: g.fitted(g.picture(side))[0] for side in SIDES}
        for side, picture in sides.items():
            g.save(picture, f"fitted {side}")
        return sides

    def maps(self, g: Builder) -> dict[str, Link]:
        return {side: g.picture(f"{side}_map") for side in SIDES} if self.mapped else {}

    def judged(self, pair: Pair, made: Made) -> Found:
        near = {side: made.pictures(f"fitted {side}") for side in SIDES}
        content, style = near.values()
        on, regions = self.labels(pair, near)
        pictures = {**near, **{name: made.pictures(name) for name in self.variants}}
        figures = {}
        for name, image in pictures.items():
            labels = on["style" if name == "style" else "content"]
            distance = measure.style_distance(image, labels, style, on["style"], regions)
            found = {"color": distance.by_area(distance.color), "texture": distance.by_area(distance.texture)}
            # The style's picture may have another size than the content's.
            fits = image.shape == content.shape
            for figure, kept in (("edges", measure.edges_kept), ("likeness", measure.likeness_kept)):
                found[figure] = kept(image, content) if fits else torch.tensor([torch.nan])
            figures[name] = {figure: value.item() for figure, value in found.items()} | self.perception(image, near)
        return {"figures": figures, "pictures": pictures}

    def labels(self, pair: Pair, near: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        """Regions of both pictures and their number; one region without maps."""
        sizes = {side: (picture.shape[1], picture.shape[2]) for side, picture in near.items()}
        if not self.mapped:
            return {side: torch.zeros(1, *size, dtype=torch.long) for side, size in sizes.items()}, 1
        found = regions_from_colors(*(read(pair.files[f"{side}_map"])[None] for side in SIDES))
        labels = {side: resample_labels(getattr(found.regions, side), size) for side, size in sizes.items()}
        return labels, len(found.colors) + 1


@dataclass(frozen=True)
class OwnSemantix(Restyling):
    """60 steps, CFG 3.5 for inversion and sampling, the published weights (He et al., ICLR 2025)."""

    ours = "Semantix"

    @property
    def variants(self) -> Sequence[str]:
        regionwise = (f"{self.ours}{REGIONWISE}",) if self.mapped else ()
        return (self.ours, *regionwise, "AdaIN replay")

    def graph(self) -> Graph:
        g = Builder(self.checkpoint)
        sides, words = self.sides(g), g.prompt("What the content shows")
        how = {"model": g.model, "negative": g.empty, "steps": self.steps or 60}
        prompts = {"content": {"positive": words, "cfg": 3.5}, "style": {"positive": g.empty, "cfg": 1.0}}
        context, reference = (
            g.link(
                f"{PRE}DDPMInversion",
                latent=g.encoded(sides[side]),
                seed=seed,
                noise_maps=side == "content",
                **how,
                **prompts[side],
            )
            for seed, side in enumerate(SIDES)
        )
        published = {"cfg": 3.5, "weights": "published for images"}
        maps = self.maps(g)
        for name in self.variants:
            inputs = {"cfg": 3.5, **OFF} if name == "AdaIN replay" else dict(published)
            if name.endswith(REGIONWISE):
                inputs["semantic_map"] = g.link(f"{PRE}MapFromColors", **maps)
            sampled(g, name, context, reference, words, **inputs)
        return g.graph

    def tasks(self, pair: Pair) -> Iterator[tuple[Pair, Task]]:
        values: dict[str, Any] = {f"{name}.image": file for name, file in pair.files.items()}
        yield pair, Task(pair.name, {**values, "What the content shows.text": pair.texts.get("prompt", "")})


@dataclass(frozen=True)
class OwnSCSA(Restyling):
    """50 DDIM steps by StyleID's recipe, in both directions (Shang et al., CVPR 2025)."""

    ours = "SCSA"

    @property
    def variants(self) -> Sequence[str]:
        return tuple(self._variants())

    def _variants(self) -> dict[str, Variant]:
        """StyleID's attention to the whole style, and the recipe without any."""
        return {self.ours: Variant(), "universal attention": UNIVERSAL, "S-AdaIN only": Variant(patched=False)}

    def graph(self) -> Graph:
        g = Builder(self.checkpoint)
        sides, steps = self.sides(g), self.steps or 50
        both = [inverted(g, sides[side], steps, "ddim_uniform") for side in SIDES]
        if self.mapped:
            pictures = self.maps(g)
            found = g.link(f"{PRE}MapFromColors", **pictures)
            looks = {f"{s}_map": inverted(g, g.fitted(p)[0], steps, "ddim_uniform") for s, p in pictures.items()}
        else:
            found = g.link(f"{PRE}AutoMap", model=g.model, **dict(zip(SIDES, both, strict=True)))
            looks = {"vae": g.vae}
        maps = {"true": found, "one": g.one_region()}
        for name, variant in self._variants().items():
            restyled(g, name, variant, both, maps[variant.maps], looks)
        return g.graph

    def tasks(self, pair: Pair) -> Iterator[tuple[Pair, Task]]:
        for one in (pair, pair.swapped()):
            yield one, Task(one.name, {f"{name}.image": file for name, file in one.files.items()})


@dataclass(frozen=True)
class OwnSpin(Method):
    """50 DDIM steps, CFG 7.5, four images; a word learnt in 200 steps (Wu et al., AAAI 2025)."""

    learn: int = 200
    ours = "Spin"
    heads = PAINTED
    perceived = perceptual.PAINTED

    @property
    def variants(self) -> Sequence[str]:
        return (self.ours, PLAIN, INPAINTED)

    def graph(self) -> Graph:
        g = Builder(self.checkpoint)
        how = Sampling(self.steps or 50, 7.5, "ddim", "ddim_uniform")
        image, mask = g.fitted(g.picture("background"), g.mask("mask"))
        reference, subject = g.fitted(g.picture("reference"), g.mask("reference_mask") if self.mapped else None)
        latent, word = g.encoded(reference), g.link("PrimitiveString", "Class word", value="")
        if not self.mapped:
            told = {"clip": g.clip, "class_word": word, "prompt": g.empty}
            subject = g.link(f"{PRE}Saliency", model=g.model, latent=latent, image=reference, **told)
        demo = self.checkpoint == PAPERLAND
        learning = LEARNING if demo else {"template": "a photo of <it>"}
        learnt = g.link(
            f"{PRE}SpinEmbedding",
            model=g.model,
            clip=g.clip,
            class_word=word,
            steps=self.learn,
            name=WORD,
            overwrite=True,
            latent=latent,
            saliency=subject,
            **learning,
        )
        canvas = Canvas.of(g, image, mask, g.prompt("What the background shows"), 4 if demo else 8)
        patched = canvas.injected(g, learnt)
        ways: dict[str, dict[str, Link]] = {
            self.ours: {"model": patched, "energy": canvas.energy(g, how)},
            PLAIN: {"model": patched},
            INPAINTED: {"positive": g.link("CLIPTextEncode", clip=g.clip, text=word)},
        }
        seeds = [g.number(f"Seed {i}") for i in range(IMAGES)]
        for name, inputs in ways.items():
            for i, seed in enumerate(seeds):
                canvas.paint(g, f"{name}, image {i + 1}", how, seed, **inputs)
        for title, picture in (("reference", reference), ("background", image)):
            g.save(picture, f"fitted {title}")
        for title, where in (("mask", mask), ("subject", subject)):
            g.save(g.link("MaskToImage", mask=where), f"fitted {title}")
        return g.graph

    def tasks(self, pair: Pair) -> Iterator[tuple[Pair, Task]]:
        values: dict[str, Any] = {f"{name}.image": file for name, file in pair.files.items()}
        texts = {
            "Class word.value": pair.texts["class"],
            "What the background shows.text": pair.texts.get("prompt", ""),
        }
        yield pair, Task(pair.name, {**values, **texts, **{f"Seed {i}.value": i for i in range(IMAGES)}})

    def judged(self, pair: Pair, made: Made) -> Found:
        """Means over the images of a case."""
        reference, background = made.pictures("fitted reference"), made.pictures("fitted background")
        mask, subject = (made.pictures(f"fitted {name}")[..., 0] for name in ("mask", "subject"))
        scenes = [Scenes(image, mask.long(), [""]) for image in (reference, background)]
        case = spin.Case(pair.texts["class"], scenes[0], (subject > 0.5).float(), scenes[1], mask, background)
        images = {name: [made.pictures(f"{name}, image {i + 1}") for i in range(IMAGES)] for name in self.variants}
        figures = {}
        for name, each in {**images, "background": [background]}.items():
            found = [spin.measured(image, [case]) for image in each]
            rows = [
                {f: getattr(one, f).item() for f in PAINTED if f != "diversity"}
                | self.perception(image, {"subject": reference})
                for one, image in zip(found, each, strict=True)
            ]
            figures[name] = {figure: fmean(row[figure] for row in rows) for figure in rows[0]}
            figures[name]["diversity"] = (
                spin.diversity(torch.stack(each), mask).item() if len(each) > 1 else float("nan")
            )
        shown = {f"{name}, image {i + 1}": image for name, each in images.items() for i, image in enumerate(each)}
        pictures = {"reference": reference, "background": background, **shown}
        return {"figures": figures, "pictures": pictures}


METHODS: dict[str, type[Method]] = {"semantix": OwnSemantix, "scsa": OwnSCSA, "spin": OwnSpin}


def evaluate(method: Method, pairs: Sequence[Pair], running: Servers, out: Path) -> None:
    """Make and judge everything; leave tables, figures, pictures and folders of pictures in `out`, apart for pairs with
    maps (or a mask of the subject) and without."""
    compares, missing = perceptual.at_hand(method.perceived)
    for mapped, name in ((True, "with_maps"), (False, "without_maps")):
        these = [pair for pair in pairs if pair.mapped == mapped]
        if not these:
            continue
        one = replace(method, mapped=mapped, compares=compares)
        todo = [task for pair in these for task in one.tasks(pair)]
        made = running.run(one.graph(), [task for _, task in todo], out / name, all_needed=False)
        found, notes = {}, {}
        for (pair, _), result in zip(todo, made, strict=True):
            try:
                found[pair.name] = one.judged(pair, result)
            except FileNotFoundError:
                notes[pair.name] = "failed, the table above says why"
        if found:
            publish(one, found, out / name, {**missing, **notes})


def publish(method: Method, found: Mapping[str, Found], out: Path, notes: Mapping[str, str]) -> None:
    """Tables, CSV, sheet and folders; `notes` says what is not in them."""
    folders = out / "folders"
    write_folders(folders, {n: [report.as_bytes(f["pictures"][n][0]) for f in found.values()] for n in _columns(found)})
    per_pair = report.by_name([f["figures"] for f in found.values()])
    means = report.means(per_pair)
    heads = {**method.heads, **{name: method.perceived[name].head for name in method.compares}}
    rows = [[name, *(_cell(figures[f]) for f in heads)] for name, figures in means.items()]
    tables = {"figures": report.table(["", *heads.values()], rows)}
    gains = {}
    for other in method.variants:
        for figure, head in heads.items() if other != method.ours else ():
            ours, theirs = per_pair[method.ours][figure], per_pair[other][figure]
            pair = (theirs, ours) if figure in LOWER else (ours, theirs)
            gains[f"{method.ours} against {other}, {head}"] = report.compared(*pair)
    rows = [[name, *report.won(gain)] for name, gain in gains.items()]
    tables["better"] = report.table(["", "better by", "of the pairs", "p"], rows)
    told = dict(notes)
    if isinstance(method, Restyling):
        try:
            scores = perceptual.art_fid(folders, method.variants)
            tables["ArtFID"] = report.table(["", "ArtFID"], [[name, f"{score:.2f}"] for name, score in scores.items()])
        except perceptual.MissingError as error:
            told["ArtFID"] = str(error)
        told |= perceptual.ELSEWHERE
    about = {
        "checkpoint": method.checkpoint or "the demo model",
        "steps": method.steps or "published",
        "not in it": told,
    }
    everything = {**about, "mean_and_standard_error": means, "better_by": gains}
    each = [{"pair": n, "variant": v, **row} for n, f in found.items() for v, row in f["figures"].items()]
    where = argparse.Namespace(out=out, write=False)
    report.publish(where, method.ours.lower(), tables, _sheet(list(found.values())), everything, each, told)


def _columns(found: Mapping[str, Found]) -> Sequence[str]:
    return list(next(iter(found.values()))["pictures"])


def _cell(value: tuple[float, float]) -> str:
    return "" if math.isnan(value[0]) else report.with_error(value)


def _sheet(found: Sequence[Found]) -> Image.Image:
    """The first pairs, one to a row, in cells of one size."""
    shown = [f["pictures"] for f in found[:SHEET_ROWS]]
    return report.grid({name: torch.stack([_in_cell(p[name][0]) for p in shown]) for name in shown[0]})


def _in_cell(picture: Tensor) -> Tensor:
    """[H, W, 3] in 0..1 as bytes [CELL, CELL, 3], whole, on white."""
    image, cell = Image.fromarray(report.as_bytes(picture).numpy()), Image.new("RGB", (CELL, CELL), "white")
    scale = CELL / max(image.size)
    image = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
    )
    cell.paste(image, ((CELL - image.width) // 2, (CELL - image.height) // 2))
    return torch.from_numpy(np.asarray(cell).copy())
