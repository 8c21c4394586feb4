"""SCSA: semantic continuous-sparse attention as a patch of the MODEL."""

import re
from dataclasses import replace

from comfy_api.latest import io

from ..attention.scsa_attention import ScsaSettings
from ..attention.scsa_patch import uses_map_pictures
from ..host.apply_scsa import Patch, Pictures, apply_scsa
from ..host.invert_map_pictures import invert_map_pictures
from ..host.reference_cache import CACHE
from ..regions.semantic_map import SemanticMap
from ..samplers.inversion import Inversion
from .schema import advanced, schema
from .types import Inversion as InversionSocket
from .types import SemanticMap as SemanticMapSocket

CATEGORY = "semantic_style/scsa"
PUBLISHED = ScsaSettings()


def parse_blocks(text: str) -> tuple[int, ...] | None:
    """Numbers of output blocks from "6-11" or "6, 7, 9-11"; None for an empty text.

    Raises:
        ValueError: anything else.
    """
    numbers: set[int] = set()
    for part in filter(None, re.split(r"[,;\s]+", re.sub(r"\s*-\s*", "-", text.strip()))):
        found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        if found is None or int(found[2] or found[1]) < int(found[1]):
            raise ValueError(f"blocks is {text!r}: numbers of output blocks are expected, such as 6-11 or 6, 7, 8")
        numbers.update(range(int(found[1]), int(found[2] or found[1]) + 1))
    return tuple(sorted(numbers)) or None


def _number(name: str, default: float, most: float, tooltip: str, least: float = 0.0) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=least, max=most, step=0.05, round=0.001, tooltip=tooltip)


def _percent(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, round=0.001, tooltip=tooltip)


class ApplySCSA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStyleApplySCSA",
            display_name="Apply SCSA (Semantic Style)",
            category=CATEGORY,
            description="Paints every region of the content with what the style has in the same region, by another "
            "attention in the decoder (semantic continuous-sparse attention). Works under any sampler.",
            search_aliases=["style transfer", "semantic attention", "styleid", "scsa"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the pictures were inverted with; LoRAs are fine."),
                InversionSocket.Input(
                    "content",
                    tooltip="What is painted, inverted with DDIM Inversion (empty prompt, CFG 1). Sample at its size.",
                ),
                InversionSocket.Input(
                    "style", tooltip="What it is painted with, inverted in the same way. Its size may differ."
                ),
                SemanticMapSocket.Input("semantic_map", tooltip="Which regions of content and style belong together."),
                _number(
                    "temperature",
                    PUBLISHED.temperature,
                    10.0,
                    "Higher: a token takes from few tokens of the style and keeps their texture. Lower: from many, "
                    "and gets their average.",
                    least=0.05,
                ),
                _number(
                    "t1",
                    PUBLISHED.t1,
                    2.0,
                    "Weight of the continuous part, which carries a region's colours and makes it hang together. 0 "
                    "leaves it out.",
                ),
                _number(
                    "t2",
                    PUBLISHED.t2,
                    2.0,
                    "Weight of the sparse part, which copies the one best token of the style: texture. 0 leaves it "
                    "out. t1 and t2 together should be about 1.",
                ),
                _number(
                    "a1",
                    PUBLISHED.a1,
                    1.0,
                    "Share of the maps' pictures in the continuous part: higher looks at the regions' outlines, lower "
                    "at what is in them. At 0 no pictures of the maps are needed.",
                ),
                _number(
                    "a2",
                    PUBLISHED.a2,
                    1.0,
                    "Share of the content in the sparse part's search: higher follows the content's details, lower "
                    "what the picture has become so far.",
                ),
                io.String.Input(
                    "blocks",
                    default="",
                    tooltip="Output blocks of the UNet, such as 6-11 or 6, 7, 8. Empty: the two finest levels that "
                    "have attention (6-11 in SD1.x, as published). Coarser ones move larger shapes as well.",
                ),
                _percent("start_percent", 0.0, "Where it begins to act: 0 is the noisiest level."),
                _percent(
                    "end_percent", 1.0, "Where it ends to act. Below 1 the model finishes by itself: smoother, cleaner."
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="For the pictures of the maps, which are then drawn and inverted here, once for each map. "
                    "Not needed when both are connected, or a1 is 0.",
                ),
                InversionSocket.Input(
                    "content_map",
                    optional=True,
                    tooltip="The content's map as a picture of the content's size, inverted like the content.",
                ),
                InversionSocket.Input(
                    "style_map",
                    optional=True,
                    tooltip="The style's map as a picture of the style's size, in the same colours.",
                ),
                advanced(
                    io.Boolean.Input(
                        "allow_other_model",
                        default=False,
                        optional=True,
                        tooltip="Take inversions made with another checkpoint of the same architecture.",
                    )
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    optional=True,
                    tooltip="Share of this attention in its blocks; the rest is the blocks' own. 1 as published.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="For any sampler, at the content's size.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        content: Inversion,
        style: Inversion,
        semantic_map: SemanticMap,
        temperature: float,
        t1: float,
        t2: float,
        a1: float,
        a2: float,
        blocks: str,
        start_percent: float,
        end_percent: float,
        vae=None,
        content_map: Inversion | None = None,
        style_map: Inversion | None = None,
        allow_other_model: bool = False,
        strength: float = 1.0,
    ) -> io.NodeOutput:
        patch = Patch(
            Pictures(content, style, content_map, style_map),
            semantic_map,
            ScsaSettings(temperature, t1, t2, a1, a2, strength),
            parse_blocks(blocks),
            start_percent,
            end_percent,
            allow_other_model,
        )
        if uses_map_pictures(patch.settings) and (content_map is None or style_map is None):
            # What does not fit is refused before the pictures are made.
            apply_scsa(model, replace(patch, settings=replace(patch.settings, a1=0.0)))
            drawn = invert_map_pictures(model, (content, style), semantic_map, vae, CACHE)
            pictures = Pictures(content, style, content_map or drawn[0], style_map or drawn[1])
            patch = replace(patch, pictures=pictures)
        return io.NodeOutput(apply_scsa(model, patch, CACHE))


NODES: list[type[io.ComfyNode]] = [ApplySCSA]
