"""The methods by their papers' protocols on a user's own pairs: their graphs, and what is said of what comes out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...paperland.scenes import Scenes
from ...regions.color_maps import regions_from_colors
from ...regions.semantic_map import resample_labels
from ...runner.graph import Graph
from .. import measure
from .. import spin_cases as spin
from . import perceptual
from .graphs import PAPERLAND, PRE, Builder, Link
from .own_pairs import Pair
from .part import Found
from .queue import Made, Task, read
from .scsa import SIDES, UNIVERSAL, Variant, inverted, restyled
from .semantix import OFF, sampled
from .spin import INPAINTED, LEARNING, PLAIN, WORD, Canvas, Sampling

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
