"""Pictures of any size to the one that a model draws best, and back; an item of a list."""

from typing import Any

import torch
from comfy_api.latest import io

from ..host.kept_results import keep, take
from ..host.picture_size import as_rgb, fitted_size, resized, size_multiple, trained_side
from ..regions.masks import as_mask, mask_on_grid
from .schema import advanced, schema

CATEGORY = "semantic_style/picture"


def side_input() -> Any:
    return advanced(
        io.Int.Input(
            "side",
            default=0,
            min=0,
            max=4096,
            optional=True,
            tooltip="Pixels of the sides of a square picture; others get as many pixels in all. 0: what the model was "
            "trained on. Less needs less memory and time, and draws worse.",
        )
    )


class FitPicture(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStyleFitPicture",
            display_name="Fit Picture to Model (Semantic Style)",
            category=CATEGORY,
            description="Scales pictures of any size to the one near their shape at which the model draws best. Alpha "
            "is laid on white, grey becomes colour.",
            search_aliases=["resize", "scale", "bucket", "resolution"],
            inputs=[
                io.Image.Input("image", tooltip="Pictures of any size, with or without alpha, in colour or grey."),
                io.Model.Input("model", tooltip="The model that is going to see them."),
                io.Vae.Input("vae", tooltip="The VAE that is going to encode them."),
                io.Mask.Input("mask", optional=True, tooltip="A mask of the picture, which is scaled with it."),
                side_input(),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="RGB, for VAE Encode."),
                io.Mask.Output(display_name="mask", tooltip="The mask at that size; all white where none came."),
                io.Image.Output(display_name="original", tooltip="The pictures as RGB, at their own size."),
            ],
        )

    @classmethod
    def execute(cls, image, model, vae, mask=None, side: int = 0) -> io.NodeOutput:
        image = as_rgb(image, "image")
        side = side or trained_side(model, vae)
        size = fitted_size((image.shape[1], image.shape[2]), side, size_multiple(model, vae))
        scaled = torch.ones(1, *size) if mask is None else mask_on_grid(as_mask(mask), size)
        return io.NodeOutput(resized(image, size), scaled, image)


class OriginalSize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStyleOriginalSize",
            display_name="Back to Original Size (Semantic Style)",
            category=CATEGORY,
            description="Scales what was made of a picture to that picture's size: the way back from Fit Picture to "
            "Model.",
            search_aliases=["resize", "scale"],
            inputs=[
                io.Image.Input("image", tooltip="What was made."),
                io.Image.Input("original", tooltip="The picture whose size it gets."),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="At the original's size.")],
        )

    @classmethod
    def execute(cls, image, original) -> io.NodeOutput:
        return io.NodeOutput(resized(image, tuple(as_rgb(original, "original").shape[1:3])))


class ListItem(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStyleListItem",
            display_name="Item of List (Semantic Style)",
            category=CATEGORY,
            description="Takes one item out of a list of anything; the last one for numbers behind the end, as lists "
            "of different lengths go together in ComfyUI.",
            search_aliases=["pick", "index", "select from list"],
            inputs=[
                io.AnyType.Input("items", tooltip="A list, or a single thing."),
                io.Int.Input("index", default=0, min=0, max=1_000_000, tooltip="Which one; 0 is the first."),
            ],
            outputs=[io.AnyType.Output(display_name="item", tooltip="That item.")],
            is_input_list=True,
        )

    @classmethod
    def execute(cls, items: list, index: list[int]) -> io.NodeOutput:
        return io.NodeOutput(items[min(index[0], len(items) - 1)])


class KeepResult(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def slot(name: str) -> Any:
            return io.AnyType.Input(name, optional=True, tooltip="A result; not needed where it is kept already.")

        return schema(
            node_id="SemanticStyleKeepResult",
            display_name="Keep Result (Semantic Style)",
            category=CATEGORY,
            description="Keeps what took long to make for as long as the model is in use; gives it again without the "
            "nodes that made it. The simple nodes use it inside.",
            search_aliases=["cache", "memoize"],
            inputs=[
                io.Model.Input("model", tooltip="The model that it was made with: freed with it."),
                io.String.Input("key", default="", tooltip="What stands for all that the results depend on."),
                *map(slot, "abc"),
            ],
            outputs=[io.AnyType.Output(f"out_{name}", display_name=name, tooltip="That result.") for name in "abc"],
        )

    @classmethod
    def execute(cls, model, key: str, a=None, b=None, c=None) -> io.NodeOutput:
        if a is not None:
            keep(model, key, (a, b, c))
            return io.NodeOutput(a, b, c)
        kept = take(model, key)
        if kept is None:
            raise ValueError(f"nothing is kept under {key!r} with this model: connect what is to be kept to a")
        return io.NodeOutput(*kept)


NODES: list[type[io.ComfyNode]] = [FitPicture, OriginalSize, ListItem, KeepResult]
