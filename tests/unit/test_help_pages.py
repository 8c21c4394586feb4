"""The help pages: each shows its node's effect in a picture, and names an example and the cost."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "web" / "docs").glob("*.md"))
PICTURES = ROOT / "web" / "docs" / "pictures"
GRAPHS = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "workflows" / "api").glob("*.json")}
# A relative path is looked for beside the pages; the alt text may go over two lines.
PICTURE = re.compile(r"^!\[([^]]+)\]\(([^)]+)\)$", re.MULTILINE)
EXAMPLE = re.compile(r"^(?:\*\*)?Example(?:\*\*)?: (.*)$", re.MULTILINE)
COST = re.compile(r"^(?:\* |\*\*)Cost\b|\bIt costs\b", re.MULTILINE)
PICTURE_BYTES, ALL_BYTES = 60_000, 2_000_000
# Pixels: readable labels, and the text below it in sight.
NARROWEST, HIGHEST = 250, 900


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_shows_what_its_node_does(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    ((alt, path),) = PICTURE.findall(text)
    assert len(alt) > 20
    assert path == f"pictures/{page.stem}.webp"
    picture = page.parent / path
    assert picture.stat().st_size <= PICTURE_BYTES
    with Image.open(picture) as image:
        assert image.width >= NARROWEST
        assert image.height <= HIGHEST
        darkest, lightest = image.convert("L").getextrema()
        assert darkest < lightest
    before = text[: text.index("![")]
    assert "| --- |" not in before
    assert not EXAMPLE.search(before)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_names_an_example_and_the_cost(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert COST.search(text)
    named = set(re.findall(r"`(\w+)`", " ".join(EXAMPLE.findall(text)))) | set(re.findall(r"graph\s`(\w+)`", text))
    assert named & GRAPHS.keys()
    with_it = {name for name, graph in GRAPHS.items() if json.dumps(page.stem) in graph}
    assert named & with_it or not with_it


def test_there_is_no_picture_without_a_page() -> None:
    assert {path.name for path in PICTURES.iterdir()} == {f"{page.stem}.webp" for page in PAGES}
    assert sum(path.stat().st_size for path in PICTURES.iterdir()) < ALL_BYTES


def test_every_picture_can_be_made_again(load_tool) -> None:
    assert load_tool("help_recipes").RECIPES.keys() == {page.stem for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_picture_is_of_what_its_graph_makes(load_tool, page: Path) -> None:
    """The recipes name nodes of the example graphs by id: each is there and gives something, whatever is changed."""
    bench = load_tool("help_bench")
    asked = []

    class Planned(bench.Bench):
        """Looks at the graphs in place of running them."""

        def images(self, graph: dict, node: str, *_, **__) -> list[Image.Image]:
            made = bench.needed(graph, node)
            links = (link for part in made.values() for link in part["inputs"].values() if isinstance(link, list))
            sources = [node, *(source for source, _ in links)]
            assert not {made[source]["class_type"] for source in sources} & {"SaveImage", "PreviewImage", "SaveVideo"}
            asked.append(node)
            return [Image.new("RGB", (128, 128), (90, 120, 15 * i)) for i in range(16)]

        def text(self, graph: dict, node: str, _slot: int) -> str:
            self.images(graph, node)
            return "0.01"

    assert load_tool("help_recipes").RECIPES[page.stem].make(Planned(None))
    assert asked
