"""A user's own pairs, on their own checkpoint, by the papers' protocols.

Every folder in FOLDER is a pair: `content` and `style` (png, jpg or webp, any size), if wanted `content_map` and
`style_map` (same colour, same region) and `prompt.txt` (what the content shows). For Spin it is a case: `reference`,
`background`, `mask` (white where the subject goes) and `class.txt` (the subject in a word), if wanted `reference_mask`
and `prompt.txt` (what the background shows).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .scsa import SIDES

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


class LayoutError(ValueError):
    """A folder of pairs that is not laid out as the program reads it; all of it, a line for each."""


@dataclass(frozen=True)
class Pair:
    """A folder's files by their names without endings; texts by theirs."""

    name: str
    files: Mapping[str, Path]
    texts: Mapping[str, str]

    @property
    def mapped(self) -> bool:
        """Whether it has maps, or a mask of the subject."""
        return bool({"content_map", "reference_mask"} & self.files.keys())

    def swapped(self) -> "Pair":
        """The style restyled by the content."""
        turn = {"content": "style", "style": "content", "content_map": "style_map", "style_map": "content_map"}
        return Pair(f"{self.name}_back", {turn.get(n, n): file for n, file in self.files.items()}, self.texts)


def read_pairs(folder: Path, spin_cases: bool) -> list[Pair]:
    """The pairs in a folder, or cases for Spin, in order of their names.

    Raises:
        LayoutError: no folder, no pairs in it, files that are missing or doubled.
    """
    needed = ("reference", "background", "mask") if spin_cases else SIDES
    optional = ("reference_mask",) if spin_cases else ("content_map", "style_map")
    if not folder.is_dir():
        raise LayoutError(f"{folder} is no folder")
    pairs, problems = [], []
    for place in sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith(".")):
        files: dict[str, Path] = {}
        for file in sorted(f for f in place.iterdir() if f.suffix.lower() in ENDINGS):
            if file.stem in files:
                problems.append(f"{place}: {files[file.stem].name} and {file.name}, which of them?")
            files[file.stem] = file
        problems += [f"{place}: {name} is missing ({name}.png, .jpg or .webp)" for name in needed if name not in files]
        if not spin_cases and ("content_map" in files) != ("style_map" in files):
            problems.append(f"{place}: content_map and style_map come together")
        texts = {f.stem: f.read_text(encoding="utf-8").strip() for f in place.glob("*.txt")}
        if spin_cases and not texts.get("class"):
            problems.append(f"{place}: class.txt is missing: what the subject is, in a word")
        pairs.append(Pair(place.name, {n: f for n, f in files.items() if n in (*needed, *optional)}, texts))
    if not pairs:
        problems.append(f"{folder} holds no folders; each pair is one, with {', '.join(needed)} in it")
    if problems:
        raise LayoutError("\n".join(problems))
    return pairs
