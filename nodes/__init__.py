"""The ComfyUI faces of the pack, one module per family, each with a list `NODES`."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import adain, auto_map, embedding, inversion, maps, paperland, saliency, scsa, semantix, spin, video

# Imported plainly, never in a try: a family that fails to import fails the pack, so that a test notices it and not a
# user who looks for a node that is silently missing.
FAMILIES = (paperland, inversion, adain, maps, auto_map, semantix, scsa, spin, video, embedding, saliency)


class SemanticStyleExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for family in FAMILIES for node in family.NODES]
