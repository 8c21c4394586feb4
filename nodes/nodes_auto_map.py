"""A semantic map without masks, colours or another model: from the decoder features of two inversions."""

from comfy_api.latest import io, ui

from ..host.auto_map import MapRequest, auto_map, summary
from ..host.models import identify, why_unchecked
from ..host.reading import MIDDLE_SIGMA
from ..regions.clustering import MAX_REGIONS
from ..regions.map_report import describe, warnings
from ..samplers.inversion import Inversion
from .nodes_inversion import MAX_SEED
from .schema import advanced, schema
from .types import Inversion as InversionSocket
from .types import SemanticMap as SemanticMapSocket

CATEGORY = "semantic_style/maps"


class AutoMap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStyleAutoMap",
            display_name="Automatic Semantic Map (Semantic Style)",
            category=CATEGORY,
            description="Finds regions that content and style share, from what the diffusion model itself sees in both "
            "pictures: positions whose decoder features are alike get one label, on either side.",
            search_aliases=["segmentation", "clustering", "correspondence", "scsa"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that the inversions were made with. Attention patches on it are left aside.",
                ),
                InversionSocket.Input("content", tooltip="Inversion of the content."),
                InversionSocket.Input(
                    "style", tooltip="Inversion of the style; any size. One for all contents or one for each."
                ),
                io.Int.Input(
                    "regions",
                    default=0,
                    min=0,
                    max=MAX_REGIONS,
                    tooltip="How many regions. 0 chooses; 1 is no map and refused. Regions that would be tiny are "
                    "joined with others, so that fewer may come out.",
                ),
                io.Int.Input(
                    "smoothing",
                    default=1,
                    min=0,
                    max=20,
                    tooltip="Rounds of a majority filter over neighbouring positions: more gives calmer borders and "
                    "loses small things.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=False,
                    tooltip="Of the noise that is added for the look, and of the clustering; try some if regions are "
                    "not as you want.",
                ),
                io.Float.Input(
                    "sigma",
                    default=MIDDLE_SIGMA,
                    min=0.01,
                    max=100.0,
                    step=0.01,
                    round=0.001,
                    optional=True,
                    tooltip="Noise level at which the pictures are looked at. Lower sees colours and small shapes, "
                    "higher what things are.",
                ),
                io.Conditioning.Input(
                    "prompt",
                    optional=True,
                    tooltip="Prompt to look at both pictures with. Without one, what each was inverted with; "
                    "inversions from files need it.",
                ),
                advanced(
                    io.Boolean.Input(
                        "allow_other_model",
                        default=False,
                        optional=True,
                        tooltip="Allow inversions of another checkpoint of the same architecture.",
                    )
                ),
            ],
            outputs=[
                SemanticMapSocket.Output(display_name="semantic_map", tooltip="Which regions belong together."),
                io.String.Output(
                    display_name="report", tooltip="The regions with their areas, how their number was chosen."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        content: Inversion,
        style: Inversion,
        regions: int,
        smoothing: int,
        seed: int,
        sigma: float = MIDDLE_SIGMA,
        prompt: list | None = None,
        allow_other_model: bool = False,
    ) -> io.NodeOutput:
        request = MapRequest(model, content, style, prompt, sigma, regions, smoothing, seed, allow_other_model)
        found, clusterings = auto_map(request)
        now = identify(model)
        unchecked = dict.fromkeys(why_unchecked(side.model, now, allow_other_model) for side in request.sides)
        lines = [summary(clusterings), describe(found), warnings(found), *unchecked]
        report = "\n".join(line for line in lines if line)
        return io.NodeOutput(found, report, ui=ui.PreviewText(report))


NODES: list[type[io.ComfyNode]] = [AutoMap]
