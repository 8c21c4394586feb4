"""What each part of Spin does, on Paperland: a reference's thing painted into a background.

Every case is drawn from fixed seeds; kinds of things take turns. A pseudo-word is learnt with the subject's mask and
without.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...paperland.model import PATCH
from ...runner.graph import Graph
from .. import report
from .. import spin_cases as spin
from ..spin_cases import FIRST_SEED, Case
from .graphs import PRE, Builder, Link
from .part import Found, as_pictures, sheet_of
from .queue import Made, Task

DIVERSE_SEEDS = 4
GRID_ROWS = 8
WORD = "quality_spin"  # file in the server's models/embeddings
# AdamW moves a value by about the rate in a step, and the demo encoder's values are some fifty times CLIP's. Rate and
# the cleanest levels' share, of which only grain could be learnt, were chosen on other cases (numbers from 1000 on).
LEARNING = {"tokens": 4, "learning_rate": 0.03, "batch": 2, "skip_clean": 0.3}
FULL, PLAIN, WHOLE, INPAINTED = "full", "no style energy", "into the whole picture", "plain inpainting"
LEAKY, TRUE = "no saliency", "true colours' caption"
FREE = ("into the mask", WHOLE, "not at all")
FIGURES = {
    "color": "colour distance",
    "texture": "texture distance",
    "identity": "identity",
    "background": "to the background",
    "seam": "seam",
    "outside": "outside",
}


@dataclass(frozen=True)
class Sampling:
    """How a picture is painted."""

    steps: int = 16
    cfg: float = 3.5
    sampler: str = "dpmpp_2m"
    scheduler: str = "normal"


@dataclass(frozen=True)
class Canvas:
    """A background with a hole, in a graph: image, mask, prompt, and its latent with the hole a little wider."""

    image: Link
    mask: Link
    words: Link
    latent: Link

    @classmethod
    def of(cls, g: Builder, image: Link, mask: Link, words: Link, wider: int) -> "Canvas":
        """`wider`: pixels of a place of the latent, which is painted where the mask touches it."""
        grown = g.link("GrowMask", mask=mask, expand=wider)
        latent = g.link("SetLatentNoiseMask", samples=g.encoded(image), mask=grown)
        return cls(image, mask, words, latent)

    def injected(self, g: Builder, words: Link, mask: Link | None = None) -> Link:
        """The MODEL with words for the mask."""
        where = {"background": self.words, "mask": mask or self.mask}
        return g.link(f"{PRE}ApplySpin", model=g.model, reference=words, **where)

    def energy(self, g: Builder, how: Sampling, **inputs: Any) -> Link:
        """Style energy towards the background."""
        prompts = {"positive": self.words, "negative": g.empty}
        schedule = {"steps": how.steps, "scheduler": how.scheduler, "cfg": 1.0, "noise_maps": False}
        levels = g.link(
            f"{PRE}DDPMInversion", model=g.model, latent=g.encoded(self.image), seed=0, **prompts, **schedule
        )
        return g.link(f"{PRE}SpinStyleEnergy", background=levels, mask=self.mask, **inputs)

    def paint(self, g: Builder, title: str, how: Sampling, seed: Link, **inputs: Link) -> None:
        """Paint into the hole (`sampled`), and save the picture; outside the mask it is the background."""
        image = sampled(g, how, seed, self.latent, **{"positive": self.words, **inputs})
        kept = g.link(f"{PRE}KeepBackground", image=image, original=self.image, mask=self.mask)
        g.save(kept, title)


def sampled(
    g: Builder,
    how: Sampling,
    seed: Link,
    latent: Link,
    positive: Link,
    model: Link | None = None,
    energy: Link | None = None,
) -> Link:
    """The picture that is made of a latent; `model` with patches, with an energy that guides it or without."""
    guided = {"model": model or g.model, "positive": positive, "negative": g.empty, "cfg": how.cfg}
    if energy is None:
        stock = {"sampler_name": how.sampler, "scheduler": how.scheduler, "steps": how.steps, "seed": seed}
        return g.decoded(g.link("KSampler", latent_image=latent, **guided, **stock))
    return g.decoded(
        g.link(
            "SamplerCustomAdvanced",
            noise=g.link("RandomNoise", noise_seed=seed),
            guider=g.link(f"{PRE}EnergyGuider", energy=energy, **guided),
            sampler=g.link("KSamplerSelect", sampler_name=how.sampler),
            sigmas=g.link("BasicScheduler", model=g.model, scheduler=how.scheduler, steps=how.steps),
            latent_image=latent,
        )
    )


def drawn(number: int) -> Case:
    """The case of a number, its background in bytes, as a file holds it."""
    c = spin.case_of(number)
    held = report.as_bytes(c.background.images) / 255
    ideal = torch.where(c.mask[..., None] > 0, c.ideal, held)
    return replace(c, background=replace(c.background, images=held), ideal=ideal)


def figures(image: Tensor, c: Case) -> dict[str, float]:
    found = spin.measured(image, [c])
    return {f.name: getattr(found, f.name).item() for f in fields(found)}


@dataclass(frozen=True)
class Spin:
    """A `Part`; `style` is the energy's weight, `learn` the steps of learning a word."""

    sampling: Sampling = Sampling()
    learn: int = 60
    style: float = 3.0
    page = "spin"
    what = "cases"
    count = 40

    def settings(self) -> dict[str, Any]:
        return {"settings": {**asdict(self.sampling), "learn": self.learn, "style": self.style}, **LEARNING}

    def graph(self) -> Graph:
        g, how = Builder(), self.sampling
        canvas = Canvas.of(g, g.picture("Background"), g.mask("Mask"), g.prompt("What the background shows"), PATCH)
        everywhere = g.mask("Everywhere")
        latent, subject = g.encoded(g.picture("Reference")), g.mask("Subject")
        word, leaky = (
            g.link(
                f"{PRE}SpinEmbedding",
                title,
                model=g.model,
                clip=g.clip,
                steps=self.learn,
                seed=g.number(f"Seed of {title}"),
                name=WORD,
                overwrite=True,
                latent=latent,
                saliency=where,
                **LEARNING,
            )
            for title, where in (("the subject", subject), ("the picture", None))
        )
        seeds = [g.number(f"Seed {i}") for i in range(DIVERSE_SEEDS)]
        spin_model, told = canvas.injected(g, word), canvas.injected(g, words := g.prompt(TRUE))
        told_everywhere = canvas.injected(g, words, everywhere)
        ways: dict[str, dict[str, Link]] = {
            FULL: {"model": spin_model, "energy": canvas.energy(g, how, weight=self.style)},
            PLAIN: {"model": spin_model},
            INPAINTED: {"positive": g.prompt("Class word")},
            WHOLE: {"model": canvas.injected(g, word, everywhere)},
            LEAKY: {"model": canvas.injected(g, leaky)},
            TRUE: {"model": told},
        }
        for name, inputs in ways.items():
            canvas.paint(g, name, how, seeds[0], **inputs)
        for i, seed in enumerate(seeds[1:], 1):
            canvas.paint(g, f"seed {i}", how, seed, model=spin_model)
        # Who is told what, without a background that is held fast: the true colours said in the mask only, everywhere,
        # and nowhere.
        nothing = g.link(f"{PRE}PaperlandLatent")
        for name, model in zip(FREE, (told, told_everywhere, g.model), strict=True):
            g.save(sampled(g, how, seeds[0], nothing, canvas.words, model), f"free, {name}")
        return g.graph

    def task(self, number: int) -> Task:
        c = drawn(number)
        return Task(
            f"case_{number:04d}",
            {
                "Reference.image": c.reference.images[0],
                "Background.image": c.background.images[0],
                "Mask.image": c.mask[0],
                "Everywhere.image": torch.ones_like(c.mask[0]),
                "Subject.image": c.subject[0],
                "What the background shows.text": c.background.captions[0],
                "Class word.text": c.kind,
                f"{TRUE}.text": spin.true_phrases(c),
                "the subject.class_word": c.kind,
                "the picture.class_word": c.kind,
                "Seed of the subject.value": number,
                "Seed of the picture.value": number,
                **{f"Seed {i}.value": FIRST_SEED + number + i * spin.SEEDS_APART for i in range(DIVERSE_SEEDS)},
            },
        )

    def judged(self, number: int, made: Made) -> Found:
        c = drawn(number)
        pictures = {name: made.pictures(name) for name in (FULL, PLAIN, INPAINTED, WHOLE, LEAKY, TRUE)}
        others = {f"seed {i}": made.pictures(f"seed {i}") for i in range(1, DIVERSE_SEEDS)}
        free = {name: made.pictures(f"free, {name}") for name in FREE}
        given = {"reference": c.reference.images, "background": c.background.images, "ideal": c.ideal}
        judged = {**pictures, **{name: given[name] for name in ("background", "ideal")}}
        around = {LEAKY: pictures[LEAKY], "saliency": pictures[PLAIN]}
        shown = {**given, **pictures, **{name: others[name] for name in ("seed 1", "seed 2")}}
        return {
            "kind": c.kind,
            "figures": {name: figures(image, c) for name, image in judged.items()},
            "diversity": spin.diversity(torch.stack([pictures[PLAIN], *others.values()]), c.mask).item(),
            # Background that leaked in is near to what is around the subject in the reference.
            "leak": {name: spin.distance_to_surroundings(image, [c]).item() for name, image in around.items()},
            "free": {
                name: {"identity": figures(image, c)["identity"], "outside": spin.distance_outside(image, [c]).item()}
                for name, image in free.items()
            },
            "pictures": as_pictures(shown),
        }

    def gather(self, found: Sequence[Found]) -> dict[str, Any]:
        """Means and standard errors, by kind, and what is nearer to what, case by case."""
        per_case, free = (report.by_name([f[part] for f in found]) for part in ("figures", "free"))
        kinds = [f["kind"] for f in found]

        def closer(one: str, other: str, figure: str) -> dict[str, float]:
            return report.compared(per_case[other][figure], per_case[one][figure])

        pairs = [(PLAIN, other, "identity") for other in (INPAINTED, LEAKY, WHOLE)]
        pairs += [(FULL, PLAIN, "background"), (PLAIN, FULL, "identity")]
        leak = {name: [f["leak"][name] for f in found] for name in found[0]["leak"]}
        diversity = [f["diversity"] for f in found]
        return {
            "mean_and_standard_error": report.means(per_case),
            "identity_by_kind": {
                name: {
                    kind: report.mean_and_error([v for v, k in zip(f["identity"], kinds, strict=True) if k == kind])
                    for kind in dict.fromkeys(kinds)
                }
                for name, f in per_case.items()
            },
            "closer_by": {
                f"{one} against {other}, {figure}": closer(one, other, figure) for one, other, figure in pairs
            },
            "diversity": report.mean_and_error(diversity),
            "least_diversity": min(diversity),
            "leak": {
                **{f"distance to the surroundings, {n}": report.mean_and_error(v) for n, v in leak.items()},
                "closer_without_saliency_by": report.compared(leak["saliency"], leak[LEAKY]),
            },
            "free": {
                **report.means(free),
                "outside_nearer_by": report.compared(free[WHOLE]["outside"], free["into the mask"]["outside"]),
            },
            "kinds": kinds,
        }

    def tables(self, gathered: Mapping[str, Any]) -> dict[str, str]:
        by_kind = gathered["identity_by_kind"]
        kinds = list(next(iter(by_kind.values())))
        rows = []
        for name, found in gathered["mean_and_standard_error"].items():
            cells = [report.with_error(found[f]) if f == "identity" else f"{found[f][0]:.3f}" for f in FIGURES]
            rows.append([name, *cells, *(f"{by_kind[name][kind][0]:.2f}" for kind in kinds)])
        closer = [[name, *report.won(gain)] for name, gain in gathered["closer_by"].items()]
        return {
            "figures": report.table(["", *FIGURES.values(), *kinds], rows),
            "closer": report.table(["", "nearer by", "of the cases", "p"], closer),
        }

    def sheet(self, found: Sequence[Found]) -> Image.Image:
        return sheet_of(found, GRID_ROWS)
