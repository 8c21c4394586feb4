"""AdaIN of latents, whole or per region, once or along a replay, and the semantic map that it takes."""

import torch
from comfy_api.latest import io

from ..host.replay_sampler import ReplaySampler
from ..host.semantix_transfer import Where
from ..regions.adain import adain_latents
from ..regions.semantic_map import SemanticMap
from ..samplers.inversion import Inversion
from ..samplers.step_adain import PUBLISHED_START, StepAdaIN
from .nodes_inversion import adain_start_input
from .schema import schema
from .types import Inversion as InversionSocket
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


class ReplayAdaIN(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStyleReplayAdaIN",
            display_name="AdaIN Along Replay (Semantic Style)",
            category=CATEGORY,
            description="Lets a replay take over a reference's colours step by step, where masks say so. Several of "
            "these nodes one after another give each part of a picture its own reference.",
            search_aliases=["color transfer", "several references", "adain", "semantix"],
            inputs=[
                io.Sampler.Input("sampler", tooltip="Of Replay Inversion, or of another of these nodes."),
                InversionSocket.Input(
                    "reference",
                    tooltip="After each step the latent gets the channel means and deviations of this inversion at the "
                    "same noise level. Its size may differ.",
                ),
                adain_start_input(),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much of the reference's colours it brings in, all steps together. 0 changes nothing.",
                ),
                SemanticMapSocket.Input(
                    "semantic_map",
                    optional=True,
                    tooltip="Region by region. Content: the picture that is replayed; style: the reference.",
                ),
                io.Mask.Input(
                    "content_mask",
                    optional=True,
                    tooltip="Only this part of the picture takes colours over, softly where the mask is grey.",
                ),
                io.Mask.Input(
                    "style_mask",
                    optional=True,
                    tooltip="Only this part of the reference gives them. Any size.",
                ),
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls,
        sampler,
        reference: Inversion,
        adain_start: float = PUBLISHED_START,
        strength: float = 1.0,
        semantic_map: SemanticMap | None = None,
        content_mask: torch.Tensor | None = None,
        style_mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        if not isinstance(sampler, ReplaySampler):
            raise ValueError("AdaIN acts along a replay: connect the SAMPLER of Replay Inversion")
        replayed = sampler.inversion
        where = Where.of(replayed, reference, content_mask, style_mask)
        parts = where.content, where.style
        adain = StepAdaIN(reference, replayed.schedule_steps, adain_start, semantic_map, strength, *parts)
        return io.NodeOutput(sampler.with_adain(adain))


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


NODES: list[type[io.ComfyNode]] = [AdaIN, ReplayAdaIN, MapFromLabels]
