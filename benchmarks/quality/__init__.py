"""Quality of the nodes that ship: every graph goes through the batch runner into a real ComfyUI.

    python tools/run.py benchmarks.quality [semantix scsa spin video] [--count N] [--write]
    python tools/run.py benchmarks.quality --pairs FOLDER [--method scsa] [--checkpoint NAME]

The first: Paperland scenes whose right answer is known, the methods with each part left out, and what they are compared
with. The second: your own pictures on your own checkpoint, by the papers' protocols; docs/quality.md says how the
folder is laid out. A pair (case, clip) is one graph with all its variants, so the host shares its inversions. What is
done is kept in --out: call it again to go on.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import report
from . import methods
from .graphs import PAPERLAND
from .own import evaluate
from .own_methods import METHODS
from .own_pairs import LayoutError, Pair, read_pairs
from .part import Found, Part, each
from .queue import Servers, servers
from .scsa import SCSA
from .semantix import Semantix
from .spin import Sampling, Spin
from .video import Video

PARTS = ("semantix", "scsa", "spin", "video")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (all)")
    found.add_argument("--pairs", type=Path, metavar="FOLDER", help="your own, a folder each")
    found.add_argument("--method", choices=list(METHODS), default="semantix", help="for your own pairs (%(default)s)")
    found.add_argument("--checkpoint", default=PAPERLAND, metavar="NAME", help="for your own pairs (the demo model)")
    found.add_argument("--count", type=int, help="how many pairs, cases or clips of each part (40, of clips 6; all)")
    found.add_argument("--first", type=int, default=0, help="number of the first; tune on others than you report")
    found.add_argument("--steps", type=int, default=0, help="of sampling and inversion (20, Spin 16; as published)")
    found.add_argument("--learn", type=int, default=0, help="steps of learning Spin's word (60; as published)")
    found.add_argument(
        "--server", action="append", default=[], metavar="ADDRESS", help="a running ComfyUI with the pack"
    )
    found.add_argument("--start", type=int, metavar="N", help="start N ComfyUI here, one on each GPU (1)")
    found.add_argument("--out", type=Path, default=Path("output/quality"), help="what is done is kept there")
    found.add_argument("--write", action="store_true", help="put figures, tables and pictures into docs/")
    return found


def chosen(options: argparse.Namespace) -> dict[str, Part]:
    """The parts that were asked for, all of them if none was."""
    steps = {"steps": options.steps} if options.steps else {}
    learn = {"learn": options.learn} if options.learn else {}
    made: dict[str, Part] = {
        "semantix": Semantix(**steps),
        "scsa": SCSA(**steps),
        "spin": Spin(Sampling(**steps), **learn),
        "video": Video(**steps),
    }
    return {name: made[name] for name in options.parts or PARTS}


def measure(part: Part, numbers: range, running: Servers, options: Any) -> list[Found]:
    """Make a part's pictures, judge them, and publish what came of it; `options`: `out`, a folder, and `write`."""
    made = running.run(part.graph(), [part.task(number) for number in numbers], options.out)
    found = [part.judged(number, result) for number, result in zip(numbers, made, strict=True)]
    gathered = part.gather(found)
    about = {part.what: len(numbers), "first": numbers.start, **part.settings()}
    report.publish(
        options, part.page, part.tables(gathered), part.sheet(found), {**about, **gathered}, each(numbers, found)
    )
    return found


def own(options: argparse.Namespace, running: Servers, pairs: Sequence[Pair]) -> None:
    """Evaluate a user's pairs."""
    learn = {"learn": options.learn} if options.learn and options.method == "spin" else {}
    method = METHODS[options.method](options.checkpoint, options.steps, **learn)
    last = None if options.count is None else options.first + options.count
    evaluate(method, pairs[options.first : last], running, options.out / "own" / options.method)


def paperland(options: argparse.Namespace, running: Servers) -> None:
    """Measure the parts that were asked for, and what can be compared between them."""
    found = {}
    for name, part in chosen(options).items():
        count = part.count if options.count is None else options.count
        where = argparse.Namespace(out=options.out / name, write=options.write)
        found[name] = measure(part, range(options.first, options.first + count), running, where)
    if {"semantix", "scsa"} <= found.keys():
        made = methods.table(found)
        print(f"methods\n\n{made}")
        (options.out / "methods.md").write_text(f"{made}\n", encoding="utf-8")
        if options.write:
            report.write_tables(report.DOCS / "quality.md", {"methods": made})


def main(given: Sequence[str] | None = None) -> None:
    program = parser()
    options = program.parse_args(given)
    if unknown := [name for name in options.parts if name not in PARTS]:
        program.error(f"there is no part {unknown[0]!r}; choose of {', '.join(PARTS)}")
    if options.pairs and (options.parts or options.write):
        program.error("--pairs is for your own pictures: neither parts of the pack's own scenes nor --write go with it")
    try:
        pairs = read_pairs(options.pairs, options.method == "spin") if options.pairs else []
    except LayoutError as error:
        raise SystemExit(str(error)) from error
    start = options.start if options.start is not None else int(not options.server)
    with servers(options.server, start, options.out) as running:
        if options.pairs:
            own(options, running, pairs)
        else:
            paperland(options, running)
