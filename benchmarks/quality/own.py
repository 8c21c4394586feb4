"""A user's own pairs, from the folder to tables and a sheet."""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import report
from . import perceptual
from .own_methods import LOWER, Method, Restyling
from .own_pairs import Pair
from .part import Found
from .queue import Servers

CELL = 256  # pixels, of the sheet
SHEET_ROWS = 8


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
    perceptual.write_folders(
        folders, {n: [report.as_bytes(f["pictures"][n][0]) for f in found.values()] for n in _columns(found)}
    )
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
