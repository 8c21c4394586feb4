"""Semantic Style: diffusion inversion and semantic style transfer for ComfyUI.

Importing the package needs no ComfyUI: the nodes, and with them the host's modules, are imported when the host asks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


async def comfy_entrypoint() -> ComfyExtension:
    """The pack as a V3 extension; called by ComfyUI once, when it loads custom nodes."""
    from .nodes import SemanticStyleExtension

    return SemanticStyleExtension()
