"""What the quality benchmarks make of their measurements: means, comparisons, tables, pictures, pages in docs/."""

import argparse
import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import wilcoxon
from torch import Tensor
from torchvision.utils import make_grid

DOCS = Path(__file__).resolve().parents[1] / "docs"
GAP, HEAD = 6, 34  # pixels between pictures, and above them for the columns' names


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (nan of one value)."""
    v = np.asarray(values, dtype=np.float64)
    return float(v.mean()), float(v.std(ddof=1) / len(v) ** 0.5) if len(v) > 1 else float("nan")


def compared(ours: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Mean gain of one over another, pair by pair, its standard error, the share of pairs with a gain, and the
    probability `p` of gains at least as one-sided as these where there is no difference (Wilcoxon, "Individual
    comparisons by ranking methods", 1945: the signed-rank test, two-sided)."""
    gains = [a - b for a, b in zip(ours, others, strict=True)]
    mean, error = mean_and_error(gains)
    p = float(wilcoxon(gains).pvalue) if any(gains) else 1.0
    return {"mean": mean, "error": error, "share": sum(g > 0 for g in gains) / len(gains), "p": p}


def won(gain: Mapping[str, float]) -> list[str]:
    """Cells of a table for a `compared`: the gain, in how many pairs, and p."""
    p = "<0.001" if gain["p"] < 0.001 else f"{gain['p']:.3f}"
    return [with_error((gain["mean"], gain["error"]), form="+.3f"), f"{gain['share']:.0%}", p]


def by_name(parts: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """Figures of one number after the other, `part[name][figure]`, as lists `[name][figure]`."""
    return {name: {f: [p[name][f] for p in parts] for f in figures} for name, figures in parts[0].items()}


def means(values: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, tuple[float, float]]]:
    """`mean_and_error` of each list of `by_name`."""
    return {name: {f: mean_and_error(v) for f, v in figures.items()} for name, figures in values.items()}


def with_error(value: tuple[float, float], form: str = ".3f") -> str:
    """A mean and its standard error, which one value has none of."""
    mean, error = value
    return f"{mean:{form}}" + ("" if np.isnan(error) else f" ± {error:{form.lstrip('+')}}")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; the first column names the rows, the others hold numbers."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def grid(columns: Mapping[str, Tensor]) -> Image.Image:
    """A picture with a column for each name and a row for each of its pictures [N, H, W, 3], bytes or 0..1."""
    pictures = [t if t.dtype == torch.uint8 else as_bytes(t) for t in columns.values()]
    rows = torch.stack(pictures, dim=1).flatten(0, 1).permute(0, 3, 1, 2)
    cells = make_grid(rows, nrow=len(pictures), padding=GAP, pad_value=255).permute(1, 2, 0).numpy()
    sheet = Image.new("RGB", (cells.shape[1], cells.shape[0] + HEAD), "white")
    sheet.paste(Image.fromarray(cells), (0, HEAD))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, name in enumerate(columns):
        left = GAP + i * (pictures[0].shape[2] + GAP)
        draw.text((left, 4), name.replace(", ", ",\n"), (40, 36, 32), font, spacing=1)
    return sheet


def as_bytes(images: Tensor) -> Tensor:
    """0..1 to 0..255."""
    return (images * 255).round().byte()


def parser(doc: str | None, name: str, count: int, what: str) -> argparse.ArgumentParser:
    """The options that every quality benchmark has."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--count", type=int, default=count, help=f"how many {what} ({count})")
    found.add_argument("--first", type=int, default=0, help="number of the first; tune on others than you report")
    found.add_argument("--out", type=Path, default=Path("output") / name, help="tables and pictures, without --write")
    found.add_argument("--write", action="store_true", help="put figures, tables and picture into docs/")
    return found


def numbers(options: argparse.Namespace) -> range:
    return range(options.first, options.first + options.count)


def publish(
    options: argparse.Namespace,
    page: str,
    tables: Mapping[str, str],
    sheet: Image.Image,
    figures: Mapping[str, Any] | None = None,
    each: Sequence[Mapping[str, Any]] = (),
    notes: Mapping[str, str] | None = None,
) -> None:
    """Print the tables and notes; put the tables into the page of that name, its picture and figures beside it (JSON,
    and CSV for `each`, a row for each pair and variant): in docs/, or in --out, with a page of nothing else, where
    nothing is to be written there."""
    folder = DOCS if options.write else options.out
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"{name}\n\n{text}" for name, text in tables.items()]
    parts += [f"Not in it: {name}. {reason}" for name, reason in (notes or {}).items()]
    print("\n\n".join(parts))
    if figures is not None:
        (folder / f"{page}_quality.json").write_text(as_json(figures), encoding="utf-8")
    if each:
        with open(folder / f"{page}_quality.csv", "w", encoding="utf-8", newline="") as file:
            rows = csv.DictWriter(file, list(each[0]), lineterminator="\n")
            rows.writeheader()
            rows.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in each)
    sheet.save(folder / f"{page}.png", optimize=True)
    if options.write:
        write_tables(folder / f"{page}.md", tables)
    else:
        (folder / f"{page}.md").write_text("\n\n".join([*parts, f"![every variant]({page}.png)\n"]), encoding="utf-8")


def write_tables(page: Path, tables: Mapping[str, str]) -> None:
    """Put each table between `<!-- table: name -->` and `<!-- end -->` of a page.

    Raises:
        ValueError: the page has no place for one.
    """
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        place = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        text, found = place.subn(lambda m, table=table: f"{m[1]}\n{table}\n{m[2]}", text)
        if found != 1:
            raise ValueError(f"{page} has {found} places for the table {name!r}, it needs one")
    page.write_text(text, encoding="utf-8")


def as_json(report: Mapping[str, Any]) -> str:
    """A line per entry of the second level, numbers to five digits."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.5g}")
        if isinstance(value, Mapping):
            return {k: short(v) for k, v in value.items()}
        return [short(v) for v in value] if isinstance(value, (list, tuple)) else value

    def entry(value: Any) -> str:
        if not isinstance(value, dict):
            return json.dumps(value)
        return "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n }"

    return "{\n" + ",\n".join(f" {json.dumps(k)}: {entry(v)}" for k, v in short(report).items()) + "\n}\n"
