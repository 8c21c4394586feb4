"""Semantic maps from colour-coded pictures and from masks, and a look at them."""

import comfy.model_management
import torch
from comfy_api.latest import io, ui

from ..pictures.overlay import overlay_map
from ..regions.color_maps import regions_from_colors
from ..regions.map_report import describe, warnings
from ..regions.mask_maps import GAPS, ORDERS, Coverage, regions_from_masks
from ..regions.masks import as_mask
from ..regions.semantic_map import SemanticMap
from .schema import advanced, schema
from .types import SemanticMap as SemanticMapSocket

CATEGORY = "semantic_style/maps"
# More are hardly anybody's drawing.
MANY = 32
ONE_REGION = (
    "The pictures have several colours but one region came out. Colours that lie within 10 of 255 of each other stay "
    "apart only in clean files: flat colours, saved as PNG, neither compressed nor resized with smoothing. Paint the "
    "regions in colours that differ more, or use Semantic Map from Masks."
)


class MapFromColors(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStyleMapFromColors",
            display_name="Semantic Map from Colors (Semantic Style)",
            category=CATEGORY,
            description="Two colour-coded pictures as a semantic map: the same colour in both is the same region. "
            "Smooth borders and JPEG compression make no regions.",
            search_aliases=["segmentation colors", "label map", "scsa"],
            inputs=[
                io.Image.Input("content", tooltip="The content's regions, each painted in one colour; any size."),
                io.Image.Input("style", tooltip="The style's regions in the same colours; any size."),
                io.Int.Input(
                    "number",
                    default=0,
                    min=0,
                    max=256,
                    tooltip="How many regions. 0 finds them; a smaller number than there are joins the most alike.",
                ),
                advanced(
                    io.Float.Input(
                        "smallest",
                        default=0.5,
                        min=0.0,
                        max=50.0,
                        step=0.1,
                        tooltip="A found region covers at least this many percent of one of the pictures; "
                        "smaller spots "
                        "go to their surroundings. Not used when a number is given.",
                    )
                ),
            ],
            outputs=[
                SemanticMapSocket.Output(display_name="semantic_map", tooltip="Which regions belong together."),
                io.String.Output(
                    display_name="report", tooltip="The regions with their colours and areas, and what to look at."
                ),
            ],
        )

    @classmethod
    def execute(cls, content, style, number: int, smallest: float) -> io.NodeOutput:
        check = comfy.model_management.throw_exception_if_processing_interrupted
        found = regions_from_colors(_rgb(content), _rgb(style), number, smallest / 100, check)
        names = {label: _hex(color) for label, color in enumerate(found.colors, 1)}
        many = ""
        if len(names) > MANY and not number:
            many = f"{len(names)} regions are many: are the pictures colour-coded maps? Give the number if you know it."
        elif len(names) == 1 and number != 1 and any((p != p[:1, :1, :1]).any() for p in (content, style)):
            many = ONE_REGION
        report = _lines(describe(found.regions, names), many, warnings(found.regions))
        return io.NodeOutput(found.regions, report, ui=ui.PreviewText(report))


class MapFromMasks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStyleMapFromMasks",
            display_name="Semantic Map from Masks (Semantic Style)",
            category=CATEGORY,
            description="Masks of any segmentation node as a semantic map: the first mask of the content belongs to "
            "the first of the style, and so on. Overlaps and gaps are resolved and reported.",
            search_aliases=["segmentation masks", "sam", "scsa"],
            inputs=[
                io.Mask.Input(
                    "content", tooltip="One mask for each region of the content (and frame): a batch or a list."
                ),
                io.Mask.Input(
                    "style",
                    tooltip="One mask for each region of the style, in the same order; any size. An empty mask for "
                    "what is not there.",
                ),
                advanced(
                    io.Combo.Input(
                        "gaps",
                        options=list(GAPS),
                        default=GAPS[0],
                        tooltip="What becomes of positions without a mask: a region of their own (number 0), or "
                        "part of the "
                        "nearest. auto: a region when they are more than 5% of a picture.",
                    )
                ),
                io.Int.Input(
                    "frames",
                    default=1,
                    min=1,
                    max=100000,
                    optional=True,
                    tooltip="Frames of the content, 1 for a picture: 16 masks are then 16 regions. With 16 frames they "
                    "are one region in each, with 4 four regions. The style has as many, or one picture's.",
                ),
                io.Combo.Input(
                    "order",
                    options=list(ORDERS),
                    default=ORDERS[0],
                    optional=True,
                    tooltip="How masks of several frames follow each other. region by region: all frames of the first "
                    "region come first, as from one tracked mask after the other. frame by frame: all regions of the "
                    "first frame.",
                ),
            ],
            outputs=[
                SemanticMapSocket.Output(display_name="semantic_map", tooltip="Which regions belong together."),
                io.String.Output(
                    display_name="report",
                    tooltip="The regions with their areas, where masks overlapped or left gaps and what was done.",
                ),
            ],
            is_input_list=True,
        )

    @classmethod
    def execute(cls, content, style, gaps, frames=(1,), order=(ORDERS[0],)) -> io.NodeOutput:
        masks = _batch(content, "content"), _batch(style, "style")
        found = regions_from_masks(*masks, gaps[0], frames[0], order[0])
        names = {0: "(no mask)"} if found.gap_region else {}
        notes = [_coverage_note(found.content, "content", found.gap_region)]
        notes.append(_coverage_note(found.style, "style", found.gap_region))
        report = _lines(describe(found.regions, names), *notes, warnings(found.regions))
        return io.NodeOutput(found.regions, report, ui=ui.PreviewText(report))


class PreviewMap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStylePreviewMap",
            display_name="Preview Semantic Map (Semantic Style)",
            category=CATEGORY,
            description="Shows the regions of a semantic map over both images, with numbers and areas, and warns of "
            "regions that only one side has.",
            inputs=[
                SemanticMapSocket.Input("semantic_map", tooltip="The map to look at."),
                io.Image.Input("content", optional=True, tooltip="The content image below its regions."),
                io.Image.Input("style", optional=True, tooltip="The style image below its regions."),
                io.Float.Input(
                    "opacity",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Of the regions' colours: 0 shows only borders and numbers, 1 hides the image.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="preview", tooltip="Content and style side by side, with a legend."),
                io.String.Output(
                    display_name="warnings", tooltip="A line for every region that cannot be used; empty without any."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, semantic_map: SemanticMap, opacity: float, content=None, style=None) -> io.NodeOutput:
        if not 0.0 <= opacity <= 1.0:
            raise ValueError(f"opacity must be between 0 and 1, got {opacity}")
        notes = _fit_note(content, semantic_map.content, "content"), _fit_note(style, semantic_map.style, "style")
        preview = overlay_map(semantic_map, content, style, opacity)
        return io.NodeOutput(preview, _lines(*notes, warnings(semantic_map)), ui=ui.PreviewImage(preview, cls=cls))


def _rgb(image: torch.Tensor) -> torch.Tensor:
    """Without an alpha channel."""
    return image[..., :3]


def _hex(color: torch.Tensor) -> str:
    return "#" + "".join(f"{round(value * 255):02x}" for value in color.tolist())


def _lines(*parts: str) -> str:
    return "\n".join(part for part in parts if part)


def _batch(masks: list[torch.Tensor], name: str) -> torch.Tensor:
    """A list of masks or of batches of them as one batch."""
    batches = [as_mask(mask, f"{name} mask", may_be_empty=True) for mask in masks]
    sizes = sorted({tuple(batch.shape[1:]) for batch in batches})
    if len(sizes) > 1:
        said = ", ".join("x".join(map(str, reversed(size))) for size in sizes)
        raise ValueError(f"the {name} masks have different sizes ({said}): all must be of one picture; resize them")
    return torch.cat(batches)


def _coverage_note(coverage: Coverage, name: str, gap_region: bool) -> str:
    notes = []
    if coverage.overlaps:
        pairs = ", ".join(f"{i} and {j} on {share:.1%}" for i, j, share in coverage.pairs[:5])
        notes.append(f"masks overlapped on {coverage.overlaps:.1%} ({pairs}): the higher value or the smaller mask won")
    if coverage.gaps:
        fate = "region 0" if gap_region else "part of the nearest region"
        notes.append(f"{coverage.gaps:.1%} had no mask and became {fate}")
    return f"In the {name} {'; '.join(notes)}." if notes else ""


def _fit_note(image: torch.Tensor | None, labels: torch.Tensor, name: str) -> str:
    """Whether a picture has the shape of its map: a tenth off is more than rounding to latent sizes."""
    if image is None:
        return ""
    (h, w), (map_h, map_w) = image.shape[1:3], labels.shape[1:]
    if abs(h * map_w / (w * map_h) - 1) < 0.1:
        return ""
    return f"The {name} image is {w}x{h} but its map {map_w}x{map_h}: they hardly show the same."


NODES: list[type[io.ComfyNode]] = [MapFromColors, MapFromMasks, PreviewMap]
