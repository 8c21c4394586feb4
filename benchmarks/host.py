"""ComfyUI in this process, for benchmarks: nodes called as it calls them, and the demo model loaded by its node."""

import sys
import tempfile
from collections import namedtuple
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runner import locate

ROOT = Path(__file__).resolve().parents[1]


def bring_in_host(threads: int = 0) -> None:
    """Make ComfyUI importable, told its device; ends the program where there is none. 0 threads: PyTorch's choice."""
    found = locate.find_host(ROOT)
    if found is None:
        sys.exit(locate.NO_HOST)
    sys.path.insert(0, str(found))
    import comfy.cli_args

    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    comfy.cli_args.args.use_pytorch_cross_attention = True
    # Previews and embeddings that nodes save are no part of somebody's ComfyUI.
    comfy.cli_args.args.base_directory = _scratch().name
    if threads:
        torch.set_num_threads(threads)


@cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="semantic-style-benchmark-", ignore_cleanup_errors=True)


def call(node: type, **inputs: Any) -> Any:
    """What a node makes of its inputs, as a tuple whose fields have the outputs' names in small letters.

    Widgets that are not given have the defaults that the node shows its user; the host's older nodes know those of
    their function only.
    """
    with torch.inference_mode():
        if not hasattr(node, "define_schema"):
            names = getattr(node, "RETURN_NAMES", node.RETURN_TYPES)
            return _named(names, getattr(node(), node.FUNCTION)(**inputs))
        schema = node.define_schema()
        shown = {i.id: i.default for i in schema.inputs if getattr(i, "default", None) is not None}
        out = node.execute(**{**shown, **inputs})
        return _named([o.display_name or o.io_type for o in schema.outputs], out.result)


def _named(names: Any, values: tuple) -> Any:
    return namedtuple("Outputs", [str(name).lower() for name in names], rename=True)(*values)


@dataclass(frozen=True, eq=False)
class Demo:
    """The demo model as a graph has it: MODEL, CLIP and VAE."""

    model: Any
    clip: Any
    vae: Any

    def prompt(self, caption: str) -> list:
        """CONDITIONING of a caption."""
        from ..nodes.nodes_paperland import EncodeCaption

        return call(EncodeCaption, clip=self.clip, caption=caption).conditioning

    def encode(self, images: Tensor) -> dict:
        """LATENT of images [B, H, W, 3] in 0..1."""
        from nodes import VAEEncode

        return call(VAEEncode, pixels=images, vae=self.vae).latent

    def decode(self, latent: dict) -> Tensor:
        """Images [B, H, W, 3] of a LATENT."""
        from nodes import VAEDecode

        return call(VAEDecode, samples=latent, vae=self.vae).image


@cache
def demo() -> Demo:
    """The shipped demo model; `bring_in_host` comes first."""
    from ..nodes.nodes_paperland import LoadPaperland

    return Demo(*call(LoadPaperland))
