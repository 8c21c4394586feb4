"""AdaIN of latents, whole or per region, and the semantic map that it takes."""

import torch
from comfy_api.latest import io

from ..regions.adain import adain_latents
from ..regions.semantic_map import SemanticMap
from .schema import schema
from .types import LabelMap
from .types import SemanticMap as SemanticMapSocket

CATEGORY = "semantic_style/style"


class AdaIN(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStyleAdaIN",
            display_name="AdaIN (Semantic Style)",
            category=CATEGORY,
            description="Gives the content latent the channel means and deviations of the style latent, region by "
            "region when a semantic map is connected. Sizes may differ.",
            search_aliases=["color transfer", "statistics", "s-adain"],
            inputs=[
                io.Latent.Input("content", tooltip="The latent to change; its layout stays."),
                io.Latent.Input(
                    "style",
                    tooltip="The latent that gives the statistics; one for all content latents or one for each. For "
                    "noisy latents of an inversion take both at the same step.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="0 changes nothing, 1 is the full effect.",
                ),
                SemanticMapSocket.Input(
                    "semantic_map",
                    optional=True,
                    tooltip="Same regions exchange statistics; regions that the style lacks take those of the whole "
                    "style.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The content with the style's statistics.")],
        )

    @classmethod
    def execute(cls, content, style, strength: float, semantic_map: SemanticMap | None = None) -> io.NodeOutput:
        restyled = adain_latents(content["samples"], style["samples"], semantic_map, strength)
        return io.NodeOutput({**content, "samples": restyled})


class MapFromLabels(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStyleMapFromLabels",
            display_name="Semantic Map from Labels (Semantic Style)",
            category=CATEGORY,
            description="Pairs the label maps of content and style: equal labels are the same kind of thing.",
            inputs=[
                LabelMap.Input("content", tooltip="Regions of the content image, at any resolution."),
                LabelMap.Input("style", tooltip="Regions of the style image, at any resolution."),
            ],
            outputs=[SemanticMapSocket.Output(display_name="semantic_map", tooltip="Which regions belong together.")],
        )

    @classmethod
    def execute(cls, content: torch.Tensor, style: torch.Tensor) -> io.NodeOutput:
        return io.NodeOutput(SemanticMap(content, style))


NODES: list[type[io.ComfyNode]] = [AdaIN, MapFromLabels]
