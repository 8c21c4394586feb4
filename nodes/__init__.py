"""The ComfyUI faces of the pack, one module per family, each with a list `NODES`."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import (
    nodes_adain as adain,
)
from . import (
    nodes_auto_map as auto_map,
)
from . import (
    nodes_embedding as embedding,
)
from . import (
    nodes_inversion as inversion,
)
from . import (
    nodes_maps as maps,
)
from . import (
    nodes_paperland as paperland,
)
from . import (
    nodes_picture as picture,
)
from . import (
    nodes_saliency as saliency,
)
from . import (
    nodes_scsa as scsa,
)
from . import (
    nodes_semantix as semantix,
)
from . import (
    nodes_simple as simple,
)
from . import (
    nodes_spin as spin,
)
from . import (
    nodes_video as video,
)

# Imported plainly, never in a try: a family that fails to import fails the pack, so that a test notices it and not a
# user who looks for a node that is silently missing.
FAMILIES = (
    simple,
    paperland,
    inversion,
    adain,
    maps,
    auto_map,
    semantix,
    scsa,
    spin,
    video,
    embedding,
    saliency,
    picture,
)


class SemanticStyleExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for family in FAMILIES for node in family.NODES]
