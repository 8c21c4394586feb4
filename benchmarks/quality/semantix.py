"""What each part of Semantix does, on Paperland pairs with known labels: style taken over and structure kept.

Every pair is a context and a reference of four fixed seeds, inverted once for all variants.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ...paperland.scenes import label_image
from ...runner.graph import Graph
from .. import report
from ..pairs import FIGURES, FIRST_SEED, SEEDS_APART, Judge, only_regions, pair_of
from .graphs import PRE, Builder, Link
from .part import Found, as_pictures, sheet_of
from .queue import Made, Task

WEIGHTS = (6.0, 1.8, 2.0, 1.0)
CFG = 3.5
FULL, TRUE_MAPS = "full", "true maps"
Inputs = dict[str, Any]  # of the sampler node
# Replay with AdaIN and nothing else.
OFF: Inputs = {"weights": "as set below", "style_weight": 0.0, "spatial_weight": 0.0, "semantic_weight": 0.0}


def variants() -> dict[str, Inputs]:
    """The full method, each part left out in turn, and what it is compared with."""
    names = ("style_weight", "spatial_weight", "semantic_weight", "position_weight")
    full = {"weights": "as set below", **dict(zip(names, WEIGHTS, strict=True))}
    return {
        "AdaIN replay": OFF,
        FULL: full,
        "without F_ref": full | {"style_weight": 0.0},
        "without F_c": full | {"spatial_weight": 0.0},
        "without F_reg": full | {"semantic_weight": 0.0},
        "without AdaIN": full | {"adain_start": 1.0},
        "lambda 0": full | {"position_weight": 0.0},
        "full, true maps": full | {"semantic_map": TRUE_MAPS},
        "full, published weights": {"weights": "published for images"},
    }


def sampled(g: Builder, title: str, context: Link, reference: Link, positive: Link, **inputs: Any) -> None:
    """Add the sampler node of that title, and save its picture under the same."""
    made = g.link(
        f"{PRE}KSampler",
        title,
        model=g.model,
        positive=positive,
        negative=g.empty,
        context=context,
        reference=reference,
        **inputs,
    )
    g.save(g.decoded(made), title)


@dataclass(frozen=True)
class Semantix:
    """A `Part`."""

    steps: int = 20
    variants: Mapping[str, Inputs] = field(default_factory=variants)
    page = "semantix"
    what = "pairs"
    count = 40

    def settings(self) -> dict[str, Any]:
        return {"steps": self.steps, "cfg": CFG, "settings": self.variants}

    def graph(self) -> Graph:
        g = Builder()
        words = g.prompt("What the context shows")
        inverted = {"model": g.model, "negative": g.empty, "steps": self.steps}
        context, reference = (
            g.link(
                f"{PRE}DDPMInversion",
                f"Invert {side}",
                positive=prompt,
                latent=g.encoded(g.picture(side)),
                seed=g.number(f"Seed of {side}"),
                **inverted,
                **how,
            )
            for side, prompt, how in (
                ("Context", words, {"cfg": CFG}),
                ("Reference", g.empty, {"cfg": 1.0, "noise_maps": False}),
            )
        )
        labels = {
            side: g.picture(f"Labels of {name}") for side, name in (("content", "Context"), ("style", "Reference"))
        }
        maps = g.link(f"{PRE}MapFromColors", smallest=0.0, **labels)
        for name, inputs in self.variants.items():
            mapped = {"semantic_map": maps} if inputs.get("semantic_map") == TRUE_MAPS else {}
            sampled(g, name, context, reference, words, **{"cfg": CFG, **inputs, **mapped})
        return g.graph

    def task(self, number: int) -> Task:
        pair = pair_of(number)
        sides = (("Context", pair.context), ("Reference", pair.reference))
        return Task(
            f"pair_{number:04d}",
            {
                **{f"{side}.image": scene.images[0] for side, scene in sides},
                **{f"Labels of {side}.image": label_image(scene.labels)[0] for side, scene in sides},
                "What the context shows.text": only_regions(pair.context.captions[0]),
                "Seed of Context.value": FIRST_SEED + number,
                "Seed of Reference.value": FIRST_SEED + 5 * SEEDS_APART + number,
            },
        )

    def judged(self, number: int, made: Made) -> Found:
        """Figures, what the guidance did, and pictures."""
        pair = pair_of(number)
        judge = Judge(pair)
        pictures = {name: getattr(pair, name).images for name in ("context", "reference", "ideal")}
        pictures |= {name: made.pictures(name) for name in self.variants}
        return {
            "figures": {name: judge(image) for name, image in pictures.items()},
            "guidance": {name: guidance_of(made.text(name)) for name in self.variants},
            "pictures": as_pictures(pictures),
        }

    def gather(self, found: Sequence[Found]) -> dict[str, Any]:
        """Means and standard errors, and the comparison of "full" with the others."""
        per_pair = report.by_name([f["figures"] for f in found])
        full = per_pair[FULL]["score"]
        return {
            "guidance": {
                n: {part: report.mean_and_error([f["guidance"][n][part] for f in found])[0] for part in did}
                for n, did in found[0]["guidance"].items()
            },
            "mean_and_standard_error": report.means(per_pair),
            "full_ahead_by_score": {
                name: report.compared(full, figures["score"]) for name, figures in per_pair.items()
            },
        }

    def tables(self, gathered: dict[str, Any]) -> dict[str, str]:
        """The figures, and what the guidance did."""
        rows = []
        for name, figures in gathered["mean_and_standard_error"].items():
            cells = [f"{figures[f][0]:.3f}" for f in FIGURES if f != "score"]
            ahead = ["", "", ""] if name == FULL else report.won(gathered["full_ahead_by_score"][name])
            rows.append([name, *cells, report.with_error(figures["score"]), *ahead])
        guided = {name: did for name, did in gathered["guidance"].items() if did}
        runs = [[name, f"{did['gradient']:.3f}", f"{did['clamped']:.1%}"] for name, did in guided.items()]
        return {
            "figures": report.table(["", *FIGURES.values(), "full ahead by", "in pairs", "p"], rows),
            "runs": report.table(["", "mean size of the gradient", "cut by the clamp, at most"], runs),
        }

    def sheet(self, found: Sequence[Found]) -> Image.Image:
        return sheet_of(found)


def guidance_of(said: str) -> dict[str, float]:
    """Mean size of the gradient and the largest share of it that the clamp cut in a step, from the node's report."""
    found = re.search(r"mean gradient ([\d.e+-]+), at most ([\d.]+)% of it clamped", said)
    return {"gradient": float(found[1]), "clamped": float(found[2]) / 100} if found else {}
