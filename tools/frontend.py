"""ComfyUI's real frontend in a headless Chromium; for workflows.py and for tests/browser."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import time
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image
    from playwright.sync_api import Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    *("no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
    *("disable-background-networking", "disable-component-update", "disable-sync"),
)
WINDOW = {"width": 1720, "height": 1000}
READY_MILLISECONDS = 120_000
# Settings whose defaults put something over the graph: the welcome, a list of models to download, the map.
QUIET = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "Comfy.Minimap.Visible": False,
}

READY = "() => window.app?.graph && window.LiteGraph?.registered_node_types?.SaveImage"
# Values cross to Python as text: playwright would turn every `undefined` into null, which is no valid workflow.
LOAD_API = """([text, name]) => {
    app.loadApiJson(JSON.parse(text), name);
    for (const node of app.graph.nodes) {
        for (const widget of node.widgets ?? [])
            if (widget.name === "control_after_generate") widget.value = "fixed";
        node.setSize(node.computeSize());
    }
}"""
LOAD = "async (text) => { await app.loadGraphData(JSON.parse(text)); }"
GRAPH = "() => JSON.stringify(app.graph.serialize())"
PROMPT = "async () => JSON.stringify((await app.graphToPrompt()).output)"
MISSING = """(text) => JSON.parse(text).nodes.map(node => node.type)
    .filter(type => !(type in LiteGraph.registered_node_types))"""
FAULTY = "() => app.graph.nodes.filter(node => node.has_errors).map(node => node.title)"
SELECT = """(type) => {
    app.canvas.deselectAll();
    app.canvas.selectNode(app.graph.nodes.find(node => node.type === type));
    app.canvas.setDirty(true, true);
}"""
WAITING = """async () => {
    const queue = await (await fetch("/queue")).json();
    return queue.queue_running.length + queue.queue_pending.length;
}"""
DRAWN = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"
SETTLE_MILLISECONDS = 700


class Frontend:
    """The page of an open frontend; graphs are dictionaries in the form that the method names."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def load_api(self, graph: dict[str, Any], name: str) -> None:
        """Load a graph in API form, nodes as small as can be, with every control_after_generate fixed."""
        self.page.evaluate(LOAD_API, [json.dumps(graph), name])

    def load(self, graph: dict[str, Any]) -> None:
        """Load a graph in UI form."""
        self.page.evaluate(LOAD, json.dumps(graph))

    def graph(self) -> dict[str, Any]:
        """The open graph in UI form."""
        return json.loads(self.page.evaluate(GRAPH))

    def prompt(self) -> dict[str, Any]:
        """The open graph in API form, as the Run button would queue it."""
        return json.loads(self.page.evaluate(PROMPT))

    def missing_types(self, graph: dict[str, Any]) -> list[str]:
        """Node types of a graph in UI form that the frontend does not know."""
        return self.page.evaluate(MISSING, json.dumps(graph))

    def faulty_nodes(self) -> list[str]:
        """Titles of the open graph's nodes that are marked as broken."""
        return self.page.evaluate(FAULTY)

    def select(self, kind: str) -> None:
        """Select the first node of a type."""
        self.page.evaluate(SELECT, kind)

    def run(self, seconds: float) -> None:
        """Run the open graph as the Run button would, and wait until nothing is queued and its pictures are shown."""
        self.page.evaluate("async () => { await app.queuePrompt(0); }")
        end = time.monotonic() + seconds
        while self.page.evaluate(WAITING):
            if time.monotonic() > end:
                raise TimeoutError(f"the graph was not done after {seconds:g} seconds")
            self.page.wait_for_timeout(500)
        self.page.wait_for_load_state("networkidle")

    def messages(self) -> list[str]:
        """The texts of the toasts and dialogs that are open."""
        return self.page.locator(".p-toast-message, [role=dialog]").all_inner_texts()

    def view(self) -> Image.Image:
        """What the user sees of the open graph."""
        from PIL import Image

        self.page.evaluate(DRAWN)
        self.page.wait_for_timeout(SETTLE_MILLISECONDS)
        return Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")


def why_no_browser() -> str | None:
    """What is missing to open the frontend here, in words; None if nothing is."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed (pip install playwright)"
    if _browser() is None:
        return "no Chromium found (on Debian: apt install chromium)"
    return None


@contextlib.contextmanager
def open_frontend(address: str, language: str = "en") -> Iterator[Frontend]:
    """The frontend of the ComfyUI at `address` ("host:port"), loaded, in a browser of its own.

    The server keeps the `language` as its user's setting.
    """
    from playwright.sync_api import sync_playwright

    for name, value in {**QUIET, "Comfy.Locale": language}.items():
        _post(f"http://{address}/settings/{name}", value)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_browser(), args=[f"--{flag}" for flag in FLAGS])
        try:
            page = browser.new_page(viewport=WINDOW)
            page.goto(f"http://{address}/", wait_until="domcontentloaded", timeout=READY_MILLISECONDS)
            page.wait_for_function(READY, timeout=READY_MILLISECONDS)
            yield Frontend(page)
        finally:
            browser.close()


def _browser() -> str | None:
    return next((path for path in map(shutil.which, BROWSERS) if path), None)


def _post(url: str, value: Any) -> None:
    request = urllib.request.Request(url, json.dumps(value).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30):
        pass
