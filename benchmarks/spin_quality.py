"""What each part of Spin does, on Paperland cases with known answers: a reference's thing painted into a background.

    python tools/run.py benchmarks.spin_quality [--cases 50] [--steps 16] [--workers 2] [--style 3]

Every case is drawn from fixed seeds; kinds of things take turns. A pseudo-word is learnt once per case and kept, with
the subject's mask and without. Every finished batch is kept in --out: call it again to go on. At the end it writes
there `spin_quality.json` (all figures), `spin_table.md` and `spin_grid.png` (the first cases).
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..paperland import model as paperland
from ..paperland.model import Paperland
from ..paperland.text import IT
from ..samplers.word_learning import Settings
from . import spin_cases as spin
from .spin_cases import KINDS, Case, Painting
from .workers import Work, add_arguments, mean_and_error, run_batches

FIRST_SEED = 1_334_567_890  # training draws from seeds far below
DIVERSE_SEEDS = 4
TOKENS = 4
# AdamW moves a value by about the rate in a step, and the demo encoder's values are some fifty times CLIP's. Rate and
# the cleanest levels' share, of which only grain could be learnt, were chosen on other cases (numbers from 1000 on).
RATE, SKIP_CLEAN = 0.03, 0.3
GRID_ROWS = 8
CELL, GAP, HEAD = 128, 6, 34

FIGURES = ("color", "texture", "identity", "background", "seam", "outside")
SETTINGS = ("steps", "cfg", "style", "start", "end", "learn")
ALSO = ("diversity", "least_diversity", "masked_loss_falls_by", "leak", "free")
# What the inside attends to; see `Batch`.
WAYS = ("full", "no style energy", "class word", "into the whole picture", "no saliency", "true colours' caption")


def case(number: int) -> Case:
    """The case of a number; kinds take turns."""
    return spin.case(tuple(KINDS)[number % len(KINDS)], FIRST_SEED + number)


class Batch:
    """All ways of a batch of cases."""

    def __init__(self, model: Paperland, numbers: Sequence[int], arguments: argparse.Namespace) -> None:
        self.model, self.numbers, self.arguments = model, numbers, arguments
        self.cases = [case(n) for n in numbers]
        self.base = Painting(arguments.steps, arguments.cfg)
        self.styled = replace(self.base, style=arguments.style, start=arguments.start, end=arguments.end)
        self.losses: dict[str, list[tuple[float, float]]] = {}

    def tokens(self, saliency: bool) -> Tensor:
        """The learnt prompts [B, T, C]."""
        found, losses = [], []
        for number, c in zip(self.numbers, self.cases, strict=True):
            settings = Settings(
                steps=self.arguments.learn, learning_rate=RATE, batch=2, seed=number, skip_clean=SKIP_CLEAN
            )
            learned = spin.learn_subject(
                self.model, c.reference.images, c.subject if saliency else None, c.kind, TOKENS, settings
            )
            losses.append((learned.judged[0], min(learned.judged.values())))
            found.append(self.model.text([self.model.text.prompt(IT, c.kind)], {IT: learned.vectors["text"]}))
        self.losses["saliency" if saliency else "no saliency"] = losses
        return torch.cat(found)

    def caption(self, which: Callable[[Case], str]) -> Tensor:
        return self.model.text([which(c) for c in self.cases])

    def paint(self, tokens: Tensor | None, painting: Painting, seed: int = 0) -> Tensor:
        seeds = [FIRST_SEED + n + seed * spin.SEEDS_APART for n in self.numbers]
        return spin.paint(self.model, self.cases, tokens, painting, seeds)

    def run(self, tell: Callable[[str], None]) -> dict[str, Any]:
        learnt, leaky = self.tokens(True), self.tokens(False)
        tell("learnt")
        ways: dict[str, Callable[[], Tensor]] = {
            "full": lambda: self.paint(learnt, self.styled),
            "no style energy": lambda: self.paint(learnt, self.base),
            "class word": lambda: self.paint(self.caption(lambda c: c.kind), replace(self.base, everywhere=True)),
            "into the whole picture": lambda: self.paint(learnt, replace(self.base, everywhere=True)),
            "no saliency": lambda: self.paint(leaky, self.base),
            "true colours' caption": lambda: self.paint(self.caption(true_phrases), self.base),
        }
        pictures = {}
        for name in WAYS:
            pictures[name] = ways[name]()
            tell(name)
        seeds = [pictures["no style energy"], *(self.paint(learnt, self.base, s) for s in range(1, DIVERSE_SEEDS))]
        tell("seeds")
        masks = torch.cat([c.mask for c in self.cases])
        given = {
            "reference": torch.cat([c.reference.images for c in self.cases]),
            "background": torch.cat([c.background.images for c in self.cases]),
            "ideal": torch.cat([c.ideal for c in self.cases]),
        }
        judged = {**pictures, "background": given["background"], "ideal": given["ideal"]}
        return {
            "kinds": [c.kind for c in self.cases],
            "figures": {name: self.figures(images) for name, images in judged.items()},
            "losses": self.losses,
            "diversity": spin.diversity(torch.stack(seeds), masks).tolist(),
            "leak": leak(pictures["no saliency"], pictures["no style energy"], self.cases),
            "pictures": {k: (v * 255).round().byte() for k, v in {**given, **pictures}.items()},
            "seeds": (torch.stack(seeds[1:]) * 255).round().byte(),
        }

    def figures(self, images: Tensor) -> dict[str, list[float]]:
        found = spin.measured(images, self.cases)
        return {name: getattr(found, name).tolist() for name in FIGURES}


def free(model: Paperland, numbers: Sequence[int], arguments: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Whole pictures made anew from the background's caption, with the subject's true colours said inside the mask
    only, everywhere, and nowhere: who is told what, without a background that is held fast.
    """
    batch = Batch(model, numbers, arguments)
    phrases = batch.caption(true_phrases)
    base = replace(batch.base, free=True)
    ways = {"into the mask": (phrases, base), "into the whole picture": (phrases, replace(base, everywhere=True))}
    found = {}
    for name, (tokens, painting) in {**ways, "not at all": (None, base)}.items():
        images = batch.paint(tokens, painting)
        found[name] = {
            "identity": spin.measured(images, batch.cases).identity.tolist(),
            "outside": spin.distance_outside(images, batch.cases).tolist(),
        }
    return found


def true_phrases(c: Case) -> str:
    """What the reference's own caption says of the subject: colours and texture by name."""
    parts = ("house", "roof") if c.kind == "house" else (c.kind,)
    return ", ".join(p for p in c.reference.captions[0].split(", ") if p.endswith(parts))


def leak(without: Tensor, with_saliency: Tensor, cases: Sequence[Case]) -> dict[str, list[float]]:
    """Distance of the insides to what is around the subject in the reference: background that leaked in is near."""
    found = {}
    for name, images in (("no saliency", without), ("saliency", with_saliency)):
        found[name] = spin.distance_to_surroundings(images, cases).tolist()
    return found


def fingerprint(arguments: argparse.Namespace) -> str:
    """Of everything that a batch's results depend on but the code."""
    weights = hashlib.sha256(paperland.WEIGHTS.read_bytes()).hexdigest()
    settings = [getattr(arguments, name) for name in SETTINGS]
    return hashlib.sha256(json.dumps([weights, settings, TOKENS, RATE, SKIP_CLEAN]).encode()).hexdigest()[:16]


def gather(found: list[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """All batches in one: figures per case, means and standard errors, "no style energy" and "full" against others."""
    names = list(found[0]["figures"])
    per_case = {n: {f: [v for b in found for v in b["figures"][n][f]] for f in FIGURES} for n in names}
    kinds = [k for b in found for k in b["kinds"]]
    losses = {n: [v for b in found for v in b["losses"][n]] for n in found[0]["losses"]}
    leaks = {n: [v for b in found for v in b["leak"][n]] for n in found[0]["leak"]}

    def against(one: str, other: str, figure: str) -> dict[str, float]:
        gains = [b - a for a, b in zip(per_case[one][figure], per_case[other][figure], strict=True)]
        mean, error = mean_and_error(gains)
        return {"mean": mean, "error": error, "share_of_cases": sum(g > 0 for g in gains) / len(gains)}

    def of_kind(values: list[float], kind: str) -> list[float]:
        return [v for v, k in zip(values, kinds, strict=True) if k == kind]

    plain, full = "no style energy", "full"
    pairs = [(plain, other, "identity") for other in ("class word", "no saliency", "into the whole picture")]
    pairs += [(full, plain, "background"), (plain, full, "identity")]
    drops = [a - b for a, b in losses["saliency"]]
    leaked = [a - b for a, b in zip(leaks["saliency"], leaks["no saliency"], strict=True)]
    return {
        "cases": arguments.cases,
        "settings": {
            k: v for k, v in vars(arguments).items() if k in ("steps", "cfg", "style", "start", "end", "learn")
        },
        "tokens": TOKENS,
        "learning_rate": RATE,
        "skip_clean": SKIP_CLEAN,
        "mean_and_standard_error": {
            n: {f: mean_and_error(v) for f, v in figures.items()} for n, figures in per_case.items()
        },
        "identity_by_kind": {
            n: {
                k: mean_and_error([v for v, kind in zip(f["identity"], kinds, strict=True) if kind == k]) for k in KINDS
            }
            for n, f in per_case.items()
        },
        "closer_by": {f"{one} against {other}, {figure}": against(one, other, figure) for one, other, figure in pairs},
        "diversity": mean_and_error([v for b in found for v in b["diversity"]]),
        "least_diversity": min(v for b in found for v in b["diversity"]),
        "masked_loss_falls_by": {
            "mean_and_standard_error": mean_and_error(drops),
            "share_of_cases": sum(d > 0 for d in drops) / len(drops),
        },
        "leak": {
            **{f"distance to the surroundings, {n}": mean_and_error(v) for n, v in leaks.items()},
            "closer_without_saliency_by": mean_and_error(leaked),
            "share_of_cases": sum(d > 0 for d in leaked) / len(leaked),
        },
        "per_case": per_case,
        "kinds": kinds,
    }


def gather_free(arguments: argparse.Namespace) -> dict[str, Any]:
    """`free` over all cases, and how much nearer to the background the outside is than with the words everywhere."""
    model, end = paperland.load(), arguments.first + arguments.cases
    batches = [range(i, min(i + arguments.batch, end)) for i in range(arguments.first, end, arguments.batch)]
    parts = [free(model, numbers, arguments) for numbers in batches]
    values = {n: {f: [v for p in parts for v in p[n][f]] for f in ("identity", "outside")} for n in parts[0]}
    pairs = zip(values["into the whole picture"]["outside"], values["into the mask"]["outside"], strict=True)
    gains = [whole - inside for whole, inside in pairs]
    return {
        "mean_and_standard_error": {n: {f: mean_and_error(v) for f, v in fs.items()} for n, fs in values.items()},
        "outside_nearer_by": mean_and_error(gains),
        "share_of_cases": sum(g > 0 for g in gains) / len(gains),
    }


def table(report: dict[str, Any]) -> str:
    """A markdown table of the figures."""

    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    kinds = list(KINDS)
    lines = [row(["", *FIGURES, *(f"identity, {k}" for k in kinds)])]
    lines.append(row(["---", *["---:"] * (len(FIGURES) + len(kinds))]))
    for name, figures in report["mean_and_standard_error"].items():
        cells = [
            f"{figures[f][0]:.3f} ± {figures[f][1]:.3f}" if f == "identity" else f"{figures[f][0]:.3f}" for f in FIGURES
        ]
        cells += [f"{report['identity_by_kind'][name][k][0]:.2f}" for k in kinds]
        lines.append(row([name, *cells]))
    lines.append("")
    for name, gain in report["closer_by"].items():
        lines.append(
            f"* {name}: {gain['mean']:+.3f} ± {gain['error']:.3f}, in {gain['share_of_cases']:.0%} of the cases"
        )
    return "\n".join(lines) + "\n"


def grid(found: list[dict[str, Any]]) -> Any:
    """The first cases as rows, a column for each way, and the other seeds."""
    from PIL import Image, ImageDraw, ImageFont

    pictures = {name: torch.cat([b["pictures"][name] for b in found])[:GRID_ROWS] for name in found[0]["pictures"]}
    seeds = torch.cat([b["seeds"] for b in found], dim=1)[:, :GRID_ROWS]
    pictures |= {f"seed {i + 2}": s for i, s in enumerate(seeds[:2])}
    rows = len(pictures["reference"])
    sheet = Image.new("RGB", (len(pictures) * (CELL + GAP) - GAP, HEAD + rows * (CELL + GAP) - GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, (name, images) in enumerate(pictures.items()):
        draw.text((column * (CELL + GAP), 9), name, (40, 36, 32), font)
        for line, image in enumerate(images.numpy()):
            sheet.paste(Image.fromarray(image), (column * (CELL + GAP), HEAD + line * (CELL + GAP)))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, 50, 5, Path("output/spin_quality"))
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--cfg", type=float, default=3.5)
    parser.add_argument("--learn", type=int, default=60, help="steps of learning a pseudo-word")
    parser.add_argument("--style", type=float, default=3.0, help="weight of the style energy")
    parser.add_argument("--start", type=float, default=0.0, help="part of the run at which the style energy starts")
    parser.add_argument("--end", type=float, default=1.0, help="and ends")
    arguments = parser.parse_args()

    def make_work() -> Work:
        model = paperland.load()
        return lambda numbers, tell: Batch(model, numbers, arguments).run(tell)

    found = run_batches(arguments, "benchmarks.spin_quality", fingerprint(arguments), make_work, len(WAYS) + 2)
    report = gather(found, arguments)
    report["free"] = gather_free(arguments)
    (arguments.out / "spin_quality.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    (arguments.out / "spin_table.md").write_text(table(report), encoding="utf-8")
    grid(found).save(arguments.out / "spin_grid.png", optimize=True)
    print(table(report))
    print(json.dumps({name: report[name] for name in ALSO}, indent=1))


if __name__ == "__main__":
    main()
