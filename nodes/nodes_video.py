"""What a restyled video is judged by."""

from comfy_api.latest import io, ui
from torch import Tensor

from ..pictures.flicker import flicker
from .schema import schema
from .types import LabelMap

CATEGORY = "semantic_style/video"


class MeasureFlicker(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStyleFlicker",
            display_name="Measure Flicker (Semantic Style)",
            category=CATEGORY,
            description="How much a restyled video changes from frame to frame where the original stands still, in "
            "numbers: for comparing settings.",
            search_aliases=["video", "temporal consistency", "stability"],
            inputs=[
                io.Image.Input("video", tooltip="The restyled frames, in order."),
                io.Image.Input("context", tooltip="The frames that they were made from: as many, of the same size."),
                LabelMap.Input(
                    "labels",
                    optional=True,
                    tooltip="Regions of the context's frames, where they are known: what changes its region counts as "
                    "moving.",
                ),
                io.Float.Input(
                    "still",
                    default=0.016,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    round=0.001,
                    optional=True,
                    tooltip="The largest change of a colour (0 to 1) in the context that still counts as standing "
                    "still. Raise it for noisy or compressed video.",
                ),
                io.Int.Input(
                    "margin",
                    default=3,
                    min=0,
                    max=512,
                    optional=True,
                    tooltip="Pixels around what moves that are left out, too.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="excess",
                    tooltip="Mean difference (0 to 1) of neighbouring frames that the restyling added; 0 is none.",
                ),
                io.String.Output(display_name="report", tooltip="The figures in words."),
            ],
        )

    @classmethod
    def execute(
        cls, video: Tensor, context: Tensor, labels: Tensor | None = None, still: float = 0.016, margin: int = 3
    ) -> io.NodeOutput:
        found = flicker(video[..., :3].cpu(), context[..., :3].cpu(), labels, still, margin)
        return io.NodeOutput(found.excess, str(found), ui=ui.PreviewText(str(found)))


NODES: list[type[io.ComfyNode]] = [MeasureFlicker]
