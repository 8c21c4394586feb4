"""Semantix with fewer gradients, on Paperland pairs with known labels: what half of the guidance's time buys.

    python tools/run.py benchmarks.guidance_steps [--count 12] [--first 920] [--steps 20] [--write]

Runs and figures are those of `benchmarks.quality`'s Semantix; every setting is compared with a gradient in every step,
pair by pair.
"""

from typing import Any

from . import report
from .quality.queue import servers
from .quality.semantix import FULL, Inputs, Semantix, variants

ALL = "every step"
PAGE = report.DOCS / "gradient.md"


def settings() -> dict[str, Inputs]:
    """Inputs of the sampler node by the setting's name."""
    one = variants()[FULL]
    halves = {"first half": (0.0, 0.5), "middle half": (0.25, 0.75), "last half": (0.5, 1.0)}
    return {
        ALL: one,
        "every 2nd step": one | {"guide_every": 2},
        "every 3rd step": one | {"guide_every": 3},
        **{f"{name} of the run": one | {"start_percent": a, "end_percent": b} for name, (a, b) in halves.items()},
    }


def table(found: list[dict[str, Any]]) -> str:
    """A row for each setting: figures and their paired differences from a gradient in every step."""
    per_pair = report.by_name([f["figures"] for f in found])
    rows = []
    for name in (name for name in per_pair if name in settings()):
        cells = [name]
        for figure in ("style", "structure", "score"):
            values = per_pair[name][figure]
            cells.append(f"{report.mean_and_error(values)[0]:.3f}")
            ahead = report.compared(values, per_pair[ALL][figure])
            cells.append("" if name == ALL else f"{ahead['mean']:+.3f} ± {ahead['error']:.3f}")
        rows.append(cells)
    figures = [c for f in ("style taken over", "structure kept", "score") for c in (f, "difference")]
    return report.table(["gradient made in", *figures], rows)


def main() -> None:
    parser = report.parser(__doc__, "guidance_steps", 12, "pairs")
    parser.set_defaults(first=920)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    part, numbers = Semantix(options.steps, settings()), report.numbers(options)
    with servers([], 1, options.out) as running:
        made = running.run(part.graph(), [part.task(number) for number in numbers], options.out)
    text = table([part.judged(number, results) for number, results in zip(numbers, made, strict=True)])
    print(text)
    if options.write:
        report.write_tables(PAGE, {"fewer gradients": text})
