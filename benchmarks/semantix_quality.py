"""What each part of Semantix does, on Paperland pairs with known labels: style taken over and structure kept.

    python tools/run.py benchmarks.semantix_quality [--count 50] [--steps 20] [--workers 2] [--write]

Runs the nodes that ship, in ComfyUI. Every pair is a context and a reference of four fixed seeds, inverted once for all
variants. Every finished pair is kept in --out: call it again to go on.
"""

import re
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from . import pool, report
from .host import call, demo
from .pairs import FIGURES, FIRST_SEED, SEEDS_APART, Judge, pair_of

WEIGHTS = (6.0, 1.8, 2.0, 1.0)
CFG = 3.5
GRID_ROWS = 6
FULL, TRUE_MAPS = "full", "true maps"
Inputs = dict[str, Any]  # of the sampler node, by variant


def variants(weights: Sequence[float]) -> dict[str, Inputs]:
    """The full method with g_ref, g_c, g_reg and lambda, each part left out in turn, and what it is compared with."""
    names = ("style_weight", "spatial_weight", "semantic_weight", "position_weight")
    full = dict(zip(names, weights, strict=True))
    return {
        "AdaIN replay": full | dict.fromkeys(names[:3], 0.0),
        FULL: full,
        "without F_ref": full | {"style_weight": 0.0},
        "without F_c": full | {"spatial_weight": 0.0},
        "without F_reg": full | {"semantic_weight": 0.0},
        "without AdaIN": full | {"adain_start": 1.0},
        "lambda 0": full | {"position_weight": 0.0},
        "full, true maps": full | {"semantic_map": TRUE_MAPS},
        "full, published weights": {"weights": "published for images"},
    }


def only_regions(caption: str) -> str:
    """A caption without its colours and textures: what is there, not what it looks like."""
    return ", ".join(phrase.rsplit(" ", 1)[-1] for phrase in caption.split(", "))


def measure(chosen: dict[str, Inputs], steps: int, number: int) -> dict[str, Any]:
    """All variants of a pair: figures, processor seconds, what the guidance did, and pictures."""
    from ..nodes.nodes_adain import MapFromLabels
    from ..nodes.nodes_inversion import DDPMInversion
    from ..nodes.nodes_semantix import KSampler

    pair, model = pair_of(number), demo()
    judge = Judge(pair)
    words, empty = model.prompt(only_regions(pair.context.captions[0])), model.prompt("")
    start = time.process_time()
    inverted = {"model": model.model, "negative": empty, "steps": steps}
    context = call(
        DDPMInversion,
        **inverted,
        positive=words,
        latent=model.encode(pair.context.images),
        cfg=CFG,
        seed=FIRST_SEED + number,
    )
    reference = call(
        DDPMInversion,
        **inverted,
        positive=empty,
        latent=model.encode(pair.reference.images),
        cfg=1.0,
        seed=FIRST_SEED + 5 * SEEDS_APART + number,
        noise_maps=False,
    )
    true_maps = call(MapFromLabels, content=pair.context.labels, style=pair.reference.labels).semantic_map
    pictures = {name: getattr(pair, name).images for name in ("context", "reference", "ideal")}
    seconds, guidance = {"inversions": time.process_time() - start}, {}
    for name, inputs in chosen.items():
        start = time.process_time()
        maps = {"semantic_map": true_maps} if inputs.get("semantic_map") == TRUE_MAPS else {}
        made = call(
            KSampler,
            model=model.model,
            positive=words,
            negative=empty,
            context=context.inversion,
            reference=reference.inversion,
            cfg=CFG,
            **inputs | maps,
        )
        pictures[name] = model.decode(made.latent)
        seconds[name], guidance[name] = time.process_time() - start, guidance_of(made.report)
    return {
        "figures": {name: judge(image) for name, image in pictures.items()},
        "guidance": guidance,
        "seconds": seconds,
        "pictures": {name: report.as_bytes(image[0]) for name, image in pictures.items()},
    }


def guidance_of(said: str) -> dict[str, float]:
    """Mean size of the gradient and the largest share of it that the clamp cut in a step, from the node's report."""
    found = re.search(r"mean gradient ([\d.e+-]+), at most ([\d.]+)% of it clamped", said)
    return {"gradient": float(found[1]), "clamped": float(found[2]) / 100} if found else {}


def gather(found: list[dict[str, Any]]) -> dict[str, Any]:
    """All pairs in one: figures per pair, means and standard errors, and the comparison of "full" with the others."""
    per_pair = report.by_name([f["figures"] for f in found])
    full = per_pair[FULL]["score"]
    return {
        "seconds_per_pair": {
            n: report.mean_and_error([f["seconds"][n] for f in found])[0] for n in found[0]["seconds"]
        },
        "guidance": {
            n: {part: report.mean_and_error([f["guidance"][n][part] for f in found])[0] for part in did}
            for n, did in found[0]["guidance"].items()
        },
        "mean_and_standard_error": report.means(per_pair),
        "full_ahead_by_score": {name: report.compared(full, figures["score"]) for name, figures in per_pair.items()},
        "per_pair": per_pair,
    }


def tables(gathered: dict[str, Any]) -> dict[str, str]:
    """The figures, and what the runs did."""
    rows = []
    for name, figures in gathered["mean_and_standard_error"].items():
        ahead = gathered["full_ahead_by_score"][name]
        won = [f"{ahead['mean']:+.3f} ± {ahead['error']:.3f}", f"{ahead['share']:.0%}"]
        cells = [f"{figures[f][0]:.3f}" for f in FIGURES if f != "score"]
        score = "**{:.3f}** ± {:.3f}".format(*figures["score"])
        rows.append([name, *cells, score, *(["", ""] if name == FULL else won)])
    runs = []
    for name, seconds in gathered["seconds_per_pair"].items():
        did = gathered["guidance"].get(name)
        runs.append(
            [name, *([f"{did['gradient']:.3f}", f"{did['clamped']:.1%}"] if did else ["", ""]), f"{seconds:.1f}"]
        )
    heads = ["", "mean size of the gradient", "cut by the clamp, at most", "processor seconds per pair"]
    return {
        "figures": report.table(["", *FIGURES.values(), "full ahead by", "in pairs"], rows),
        "runs": report.table(heads, runs),
    }


def main() -> None:
    parser = report.parser(__doc__, "semantix_quality", 50, "pairs")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--weights", type=float, nargs=4, default=WEIGHTS, metavar=("REF", "C", "REG", "LAMBDA"))
    options = parser.parse_args()
    chosen = variants(options.weights)
    mark, work = pool.fingerprint(chosen, options.steps), partial(measure, chosen, options.steps)
    found = pool.measured(work, report.numbers(options), options.out, mark, options.workers)
    settings = {"pairs": options.count, "first_pair": options.first, "steps": options.steps, "cfg": CFG}
    gathered = gather(found)
    shown = [f["pictures"] for f in found[:GRID_ROWS]]
    sheet = report.grid({name: torch.stack([p[name] for p in shown]) for name in shown[0]})
    report.publish(options, "semantix", tables(gathered), sheet, {**settings, "settings": chosen, **gathered})
