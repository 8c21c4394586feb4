"""What each part of Semantix does, on Paperland pairs with known labels: style taken over and structure kept.

    python tools/run.py benchmarks.semantix_quality [--pairs 50] [--steps 24] [--workers 2] [--weights 3.0 0.9 1.0 3.0]

Every pair is a context and a reference of four fixed seeds. Inversions and the references' features are computed once
per batch of pairs and shared by all variants. Every finished batch is kept in --out: call it again to go on. At the end
it writes there `semantix_quality.json` (all figures), `semantix_table.md` and `semantix_grid.png` (the first pairs).
"""

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..paperland import model as paperland
from ..paperland import scenes
from ..paperland.model import Paperland
from ..paperland.scenes import Scenes
from ..regions.semantic_map import SemanticMap
from ..samplers.ddpm_inversion import ddpm_inversion
from ..samplers.inversion import Inversion
from ..samplers.replay import replay
from ..samplers.step_adain import PUBLISHED_START, StepAdaIN
from ..samplers.terms import Energy, SemanticTerm, SpatialTerm, Stream, StyleTerm
from . import measure
from .guided import EnergyGuided, Seen

PUBLISHED = (3.0, 0.9, 1.0, 3.0)
CFG = 3.5
FIRST_SEED = 1_234_567_890  # training draws from seeds far below
SEEDS_APART = 10_000
GRID_ROWS = 6
CELL, GAP, HEAD = 128, 6, 34


@dataclass(frozen=True)
class Setting:
    """One way to restyle.

    Attributes:
        weights: g_ref, g_c, g_reg.
        position: lambda of the position code.
        adain: part of the run at which AdaIN starts, 1 for never.
        maps: matches and AdaIN keep to the true regions.
        guided: False leaves the energy out.
        style_until: part of the run at which the style term ends.
    """

    weights: tuple[float, float, float]
    position: float
    adain: float = PUBLISHED_START
    maps: bool = False
    style_until: float = 1.0

    @property
    def guided(self) -> bool:
        return any(self.weights)


def variants(weights: Sequence[float], adain: float) -> dict[str, Setting]:
    """The full method with g_ref, g_c, g_reg and lambda, each part left out in turn, and what it is compared with."""
    g_ref, g_c, g_reg, position = weights
    full = Setting((g_ref, g_c, g_reg), position, adain)
    return {
        "AdaIN replay": replace(full, weights=(0.0, 0.0, 0.0)),
        "full": full,
        "without F_ref": replace(full, weights=(0.0, g_c, g_reg)),
        "without F_c": replace(full, weights=(g_ref, 0.0, g_reg)),
        "without F_reg": replace(full, weights=(g_ref, g_c, 0.0)),
        "without AdaIN": replace(full, adain=1.0),
        "lambda 0": replace(full, position=0.0),
        "full, true maps": replace(full, maps=True),
    }


def only_regions(caption: str) -> str:
    """A caption without its colours and textures: what is there, not what it looks like."""
    return ", ".join(phrase.rsplit(" ", 1)[-1] for phrase in caption.split(", "))


# What the picture is inverted and made with, of the context's caption.
PROMPTS: dict[str, Callable[[str], str]] = {"caption": str, "regions": only_regions, "empty": lambda caption: ""}


@dataclass(frozen=True)
class Pairs:
    """Contexts, references and ideals (the contexts' layouts in the references' styles), in that order alike."""

    numbers: tuple[int, ...]
    contexts: Scenes
    references: Scenes
    ideals: Scenes


def pairs_of(numbers: Sequence[int]) -> Pairs:
    """The pairs that the numbers name; a pair does not depend on the others."""

    def drawn(layout: int, style: int) -> Scenes:
        seeds = [FIRST_SEED + number for number in numbers]
        found = [scenes.scene(s + layout * SEEDS_APART, s + style * SEEDS_APART) for s in seeds]
        images, labels = (torch.cat([getattr(f, name) for f in found]) for name in ("images", "labels"))
        return Scenes(images, labels, [f.captions[0] for f in found])

    return Pairs(tuple(numbers), drawn(0, 1), drawn(2, 3), drawn(0, 3))


class Prepared:
    """Inversions of a batch of pairs, and features of its references, filled in by the first run that needs them."""

    def __init__(self, model: Paperland, pairs: Pairs, steps: int, prompt: str = "regions", cfg: float = CFG) -> None:
        self.model, self.pairs, self.cfg = model, pairs, cfg
        captions = [PROMPTS[prompt](caption) for caption in pairs.contexts.captions]
        self.positive, self.negative = model.text(captions), model.text([""])
        self.sigmas = paperland.sigmas_normal(steps)
        guided = model.guided(self.positive, self.negative, cfg)
        self.context = self._inverted(guided, pairs.contexts, 0)
        # A reference gives its path only, which depends on the noise alone: no model is asked.
        self.reference = self._inverted(lambda x, sigma: x, pairs.references, 5 * SEEDS_APART)
        self.seen: Seen = {}
        self.streams = Stream(self.context), Stream(self.reference, self.negative)

    def _inverted(self, model: Callable[..., Tensor], drawn: Scenes, offset: int) -> Inversion:
        clean = paperland.encode_pixels(drawn.images)
        shape = (len(self.sigmas) - 1, *clean.shape[1:])
        noise = [torch.randn(shape, generator=scenes.seeded(FIRST_SEED + offset + n)) for n in self.pairs.numbers]
        return ddpm_inversion(model, clean, self.sigmas, noise=torch.stack(noise, dim=1))

    def run(self, setting: Setting) -> tuple[Tensor, dict[str, float]]:
        """Pictures [B, H, W, 3] and what the guidance did."""
        steps = len(self.sigmas) - 1
        maps = SemanticMap(self.pairs.contexts.labels, self.pairs.references.labels) if setting.maps else None
        adain = None if setting.adain == 1.0 else StepAdaIN(self.reference, steps, setting.adain, maps)
        of_context, of_reference = self.streams
        g_ref, g_c, g_reg = setting.weights
        energy = Energy(
            (
                StyleTerm(of_reference, g_ref, 0.0, setting.style_until, setting.position, maps),
                SpatialTerm(of_context, g_c),
                SemanticTerm(of_context, g_reg),
            )
        )
        if setting.guided:
            guided = EnergyGuided(self.model, self.positive, self.negative, self.cfg, energy, self.sigmas, self.seen)
        model = guided if setting.guided else self.model.guided(self.positive, self.negative, self.cfg)
        x = replay(model, self.context.trajectory[0], self.sigmas, inversion=self.context, after_step=adain)
        if not setting.guided:
            return paperland.decode_pixels(x), {"gradient": 0.0, "saturated": 0.0}
        table = guided.report.table()
        return paperland.decode_pixels(x), {k: sum(table[k]) / len(table[k]) for k in ("gradient", "saturated")}


FIGURES = {
    "color": "colour distance",
    "texture": "texture distance",
    "style": "style taken over",
    "style_regions": "the same, regions alike",
    "areas": "areas read off",
    "borders": "borders told apart",
    "structure": "structure kept",
    "score": "score",
}


class Judge:
    """Measures pictures made for a batch of pairs."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs
        self.untouched, self.best = self._distance(pairs.contexts.images), self._distance(pairs.ideals.images)

    def _distance(self, images: Tensor) -> measure.StyleDistance:
        contexts, references = self.pairs.contexts, self.pairs.references
        return measure.style_distance(images, contexts.labels, references.images, references.labels)

    def __call__(self, images: Tensor) -> dict[str, list[float]]:
        """Every figure of `FIGURES` for each picture."""
        d, far, near = self._distance(images), self.untouched, self.best
        kept = measure.structure(images, self.pairs.contexts.images, self.pairs.contexts.labels)
        style = measure.style_score(*(s.by_area(s.both) for s in (d, far, near)))
        figures = {
            "color": d.by_area(d.color),
            "texture": d.by_area(d.texture),
            "style": style,
            "style_regions": measure.style_score(*(s.by_region(s.both) for s in (d, far, near))),
            "areas": kept.areas,
            "borders": kept.borders,
            "structure": kept.both,
            "score": measure.combined_score(style, kept.both),
        }
        return {name: values.tolist() for name, values in figures.items()}


def run_batch(
    model: Paperland,
    numbers: Sequence[int],
    settings: dict[str, Setting],
    steps: int,
    prompt: str,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """All variants of a batch: figures, seconds per pair, what the guidance did, and pictures as bytes."""
    pairs = pairs_of(numbers)
    judge = Judge(pairs)
    drawn = {"context": pairs.contexts, "reference": pairs.references, "ideal": pairs.ideals}
    pictures = {name: s.images for name, s in drawn.items()}
    seconds: dict[str, float] = {}
    guidance: dict[str, dict[str, float]] = {}
    start = time.perf_counter()
    prepared = Prepared(model, pairs, steps, prompt)
    seconds["inversions"] = (time.perf_counter() - start) / len(numbers)
    tell("inverted")
    for name, setting in settings.items():
        start = time.perf_counter()
        pictures[name], guidance[name] = prepared.run(setting)
        seconds[name] = (time.perf_counter() - start) / len(numbers)
        tell(name)
    return {
        "numbers": list(numbers),
        "figures": {name: judge(images) for name, images in pictures.items()},
        "guidance": guidance,
        "seconds": seconds,
        "pictures": {name: (images * 255).round().byte() for name, images in pictures.items()},
    }


def fingerprint(arguments: argparse.Namespace, settings: dict[str, Setting]) -> str:
    """Of everything that a batch's results depend on but the code."""
    weights = hashlib.sha256(arguments.checkpoint.read_bytes()).hexdigest()
    parts = [weights, arguments.steps, arguments.prompt, {name: asdict(s) for name, s in settings.items()}]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def batches(arguments: argparse.Namespace) -> list[range]:
    end = arguments.first + arguments.pairs
    return [range(i, min(i + arguments.batch, end)) for i in range(arguments.first, end, arguments.batch)]


def batch_file(arguments: argparse.Namespace, numbers: range, mark: str) -> Path:
    return arguments.out / f"batch_{mark}_{numbers.start:05d}_{len(numbers)}.pt"


def work(arguments: argparse.Namespace, settings: dict[str, Setting], worker: int) -> None:
    """Batches that are not there yet, one after another, beside other workers."""
    torch.set_num_threads(1)
    mark = fingerprint(arguments, settings)
    model = paperland.load(arguments.checkpoint)
    for numbers in batches(arguments):
        path = batch_file(arguments, numbers, mark)
        if path.exists() or not _claimed(path):
            continue
        start, parts, total = time.perf_counter(), 0, len(settings) + 1

        def tell(what: str, numbers: range = numbers, start: float = start, total: int = total) -> None:
            nonlocal parts
            parts += 1
            gone = time.perf_counter() - start
            done = sum(batch_file(arguments, b, mark).exists() for b in batches(arguments))
            to_do = (len(batches(arguments)) - done) / arguments.workers
            print(
                f"worker {worker}: pairs {numbers.start}-{numbers[-1]}, {what}; {parts}/{total} of this batch in "
                f"{gone:.0f} s, {done} batches done, about {gone / parts * total * to_do / 60:.1f} min for the others",
                flush=True,
            )

        result = run_batch(model, numbers, settings, arguments.steps, arguments.prompt, tell)
        torch.save(result, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)


def _claimed(path: Path) -> bool:
    """Whether the batch is this worker's: the first to make its mark takes it."""
    try:
        path.with_suffix(".claim").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (nan of one value)."""
    t = torch.tensor(values, dtype=torch.float64)
    return t.mean().item(), (t.std() / len(t) ** 0.5).item() if len(t) > 1 else float("nan")


def gather(arguments: argparse.Namespace, settings: dict[str, Setting]) -> dict[str, Any]:
    """All batches in one: figures per pair, means and standard errors, and the comparison of "full" with the others."""
    mark = fingerprint(arguments, settings)
    found = [torch.load(batch_file(arguments, b, mark)) for b in batches(arguments)]
    names = list(found[0]["figures"])
    per_pair = {
        name: {figure: [v for f in found for v in f["figures"][name][figure]] for figure in FIGURES} for name in names
    }
    summary = {
        name: {figure: mean_and_error(values) for figure, values in figures.items()}
        for name, figures in per_pair.items()
    }
    ahead = {}
    for name in names:
        gains = [a - b for a, b in zip(per_pair["full"]["score"], per_pair[name]["score"], strict=True)]
        mean, error = mean_and_error(gains)
        ahead[name] = {"mean": mean, "error": error, "share_of_pairs": sum(g > 0 for g in gains) / len(gains)}

    def averaged(key: str, name: str, part: str | None = None) -> float:
        values = [f[key][name] if part is None else f[key][name][part] for f in found]
        return sum(values) / len(values)

    return {
        "pairs": arguments.pairs,
        "first_pair": arguments.first,
        "steps": arguments.steps,
        "cfg": CFG,
        "prompt": arguments.prompt,
        "settings": {name: asdict(s) for name, s in settings.items()},
        "seconds_per_pair": {name: averaged("seconds", name) for name in found[0]["seconds"]},
        "guidance": {
            name: {part: averaged("guidance", name, part) for part in ("gradient", "saturated")} for name in settings
        },
        "mean_and_standard_error": summary,
        "full_ahead_by_score": ahead,
        "per_pair": per_pair,
    }


def table(report: dict[str, Any]) -> str:
    """Two markdown tables: the figures, and what the runs did."""

    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    lines = [row(["", *FIGURES.values(), "full ahead by", "in pairs"]), row(["---", *["---:"] * (len(FIGURES) + 2)])]
    for name, figures in report["mean_and_standard_error"].items():
        cells = [f"{mean:.3f}" for mean, _ in list(figures.values())[:-1]]
        cells.append("**{:.3f}** ± {:.3f}".format(*figures["score"]))
        ahead = report["full_ahead_by_score"][name]
        won = ["", ""]
        if name != "full":
            won = [f"{ahead['mean']:+.3f} ± {ahead['error']:.3f}", f"{ahead['share_of_pairs']:.0%}"]
        lines.append(row([name, *cells, *won]))
    lines += [
        "",
        row(["", "mean size of the gradient", "cut by the clamp", "seconds per pair"]),
        row(["---", *["---:"] * 3]),
    ]
    for name, seconds in report["seconds_per_pair"].items():
        did = report["guidance"].get(name, {"gradient": 0.0})
        size = [f"{did['gradient']:.3f}", f"{did['saturated']:.2%}"] if did["gradient"] else ["", ""]
        lines.append(row([name, *size, f"{seconds:.1f}"]))
    return "\n".join(lines) + "\n"


def grid(arguments: argparse.Namespace, settings: dict[str, Setting]) -> Any:
    """The first pairs as rows, a column for each variant."""
    from PIL import Image, ImageDraw, ImageFont

    mark = fingerprint(arguments, settings)
    found = [torch.load(batch_file(arguments, b, mark))["pictures"] for b in batches(arguments)]
    pictures = {name: torch.cat([f[name] for f in found])[:GRID_ROWS].numpy() for name in found[0]}
    rows = min(GRID_ROWS, arguments.pairs)
    sheet = Image.new("RGB", (len(pictures) * (CELL + GAP) - GAP, HEAD + rows * (CELL + GAP) - GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for column, (name, images) in enumerate(pictures.items()):
        draw.text((column * (CELL + GAP), 8), name.removeprefix("full, "), (40, 36, 32), font)
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
    parser.add_argument("--weights", type=float, nargs=4, default=PUBLISHED, metavar=("REF", "C", "REG", "LAMBDA"))
    parser.add_argument("--adain", type=float, default=PUBLISHED_START, help="part of the run before AdaIN")
    parser.add_argument("--prompt", choices=list(PROMPTS), default="regions", help="of the picture, from its caption")
    parser.add_argument("--checkpoint", type=Path, default=paperland.WEIGHTS)
    parser.add_argument("--only", nargs="+", help="only these variants; full is always there")
    parser.add_argument("--out", type=Path, default=Path("output/semantix_quality"))
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = variants(arguments.weights, arguments.adain)
    if tuple(arguments.weights) != PUBLISHED:
        settings["full, published weights"] = variants(PUBLISHED, PUBLISHED_START)["full"]
    if arguments.only:
        settings = {name: s for name, s in settings.items() if name == "full" or name in arguments.only}
    if arguments.worker is None:
        for left_behind in arguments.out.glob("*.claim"):
            left_behind.unlink()
    if arguments.worker is not None or arguments.workers == 1:
        work(arguments, settings, arguments.worker or 0)
    else:
        commands = [[sys.executable, *_own_command(), "--worker", str(i)] for i in range(arguments.workers)]
        running = [subprocess.Popen(command) for command in commands]
        codes = [process.wait() for process in running]
        if any(codes):
            sys.exit("a worker failed; what it finished is kept, call again to go on")
    if arguments.worker is not None:
        return
    report = gather(arguments, settings)
    (arguments.out / "semantix_quality.json").write_text(_as_json(report), encoding="utf-8")
    (arguments.out / "semantix_table.md").write_text(table(report), encoding="utf-8")
    grid(arguments, settings).save(arguments.out / "semantix_grid.png", optimize=True)
    print(table(report))


def _as_json(report: dict[str, Any]) -> str:
    """A line per entry of the second level, numbers to five digits."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.5g}")
        if isinstance(value, dict):
            return {k: short(v) for k, v in value.items()}
        return [short(v) for v in value] if isinstance(value, (list, tuple)) else value

    def entry(value: Any) -> str:
        if not isinstance(value, dict):
            return json.dumps(value)
        return "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n }"

    return "{\n" + ",\n".join(f" {json.dumps(k)}: {entry(v)}" for k, v in short(report).items()) + "\n}\n"


def _own_command() -> list[str]:
    tool = Path(__file__).resolve().parents[1] / "tools" / "run.py"
    return [str(tool), "benchmarks.semantix_quality", *sys.argv[1:]]


if __name__ == "__main__":
    main()
