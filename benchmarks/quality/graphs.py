"""Graphs in API form, put together of the nodes that the shipped workflows are made of."""

from collections.abc import Mapping
from typing import Any

from ...runner.convert import Definitions, options_of
from ...runner.graph import Graph

PAPERLAND = ""  # for a checkpoint's name: the demo model
PRE = "SemanticStyle"
NAME = "Name"  # of the node that says how the server calls what is saved
Link = list  # [node id, output]


class Builder:
    """A graph that grows node by node: a model, pictures that jobs load, and what is saved of what comes out.

    Attributes:
        graph: the nodes so far. Inputs that are left out get their defaults by `completed`.
        model, clip, vae: of the checkpoint.
    """

    def __init__(self, checkpoint: str = PAPERLAND) -> None:
        self.graph: Graph = {}
        self.name = self.link("PrimitiveString", NAME, value="")
        self.fits = checkpoint != PAPERLAND
        loader = {"ckpt_name": checkpoint} if self.fits else {}
        node = self.node("CheckpointLoaderSimple" if self.fits else f"{PRE}PaperlandModel", "Model", **loader)
        self.model, self.clip, self.vae = ([node, i] for i in range(3))
        self._empty: Link | None = None

    def node(self, kind: str, title: str = "", /, **inputs: Any) -> str:
        """Add a node; inputs that are None are left out. Gives back its id."""
        name = str(len(self.graph) + 1)
        given = {key: value for key, value in inputs.items() if value is not None}
        self.graph[name] = {"class_type": kind, "inputs": given, "_meta": {"title": title or kind}}
        return name

    def link(self, kind: str, title: str = "", output: int = 0, /, **inputs: Any) -> Link:
        """`node`, but gives back one of its outputs."""
        return [self.node(kind, title, **inputs), output]

    def picture(self, title: str) -> Link:
        """A picture that jobs name as "title.image"."""
        return self.link("LoadImage", title, image=f"{title}.png")

    def mask(self, title: str) -> Link:
        """A picture that jobs name as "title.image", as a mask: white is inside."""
        return self.link("ImageToMask", f"{title} as a mask", image=self.picture(title), channel="red")

    def fitted(self, picture: Link, mask: Link | None = None) -> tuple[Link, Link]:
        """A picture of any size, and its mask, at a size that the model draws well."""
        node = self.node(f"{PRE}FitPicture", "Fit", image=picture, model=self.model, vae=self.vae, mask=mask)
        return [node, 0], [node, 1]

    def prompt(self, title: str) -> Link:
        """CONDITIONING of a text that jobs name as "title.text"."""
        return self.link("CLIPTextEncode", title, clip=self.clip, text="")

    @property
    def empty(self) -> Link:
        """CONDITIONING of the empty prompt."""
        if self._empty is None:
            self._empty = self.prompt("No prompt")
        return self._empty

    def number(self, title: str) -> Link:
        """A whole number that jobs name as "title.value"."""
        return self.link("PrimitiveInt", title, value=0)

    def one_region(self) -> Link:
        """A semantic map that tells nothing apart."""
        flat = self.link("EmptyImage", width=64, height=64)
        return self.link(f"{PRE}MapFromColors", content=flat, style=flat)

    def encoded(self, image: Link) -> Link:
        return self.link("VAEEncode", pixels=image, vae=self.vae)

    def decoded(self, latent: Link) -> Link:
        return self.link("VAEDecode", samples=latent, vae=self.vae)

    def save(self, image: Link, title: str) -> None:
        """The picture or pictures, as files of that title."""
        self.node("SaveImage", title, images=image, filename_prefix=self.name)


def completed(graph: Graph, definitions: Definitions) -> Graph:
    """The graph with the defaults that a server's nodes show for all inputs that it leaves out."""
    whole = {}
    for name, node in graph.items():
        inputs = dict(node["inputs"])
        groups: Mapping[str, Any] = (definitions.get(node["class_type"]) or {}).get("input") or {}
        for group in ("required", "optional"):
            for key, spec in (groups.get(group) or {}).items():
                if key not in inputs and "default" in options_of(spec):
                    inputs[key] = options_of(spec)["default"]
        whole[name] = {**node, "inputs": inputs}
    return whole
