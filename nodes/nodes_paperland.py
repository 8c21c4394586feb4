"""Paperland in the graph: the demo model, its captions, its scenes."""

import logging

import comfy.model_management
import torch
from comfy_api.latest import io

from ..host.small_model import DTYPES, PixelVAE, text_clip, unet_model
from ..paperland import model as paperland
from ..paperland import motion, scenes, text
from .schema import schema
from .types import LabelMap

CATEGORY = "semantic_style/paperland"
SIDES = {"min": 32, "max": 2048, "step": paperland.PATCH}


class LoadPaperland(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStylePaperlandModel",
            display_name="Load Paperland Model (Semantic Style)",
            category=CATEGORY,
            description="The demo model that ships with this pack: it draws paper-cut landscapes of 128x128 pixels "
            "and needs no download. Use it to try the nodes; stock samplers, VAE nodes and CLIP Text Encode "
            "work with it.",
            inputs=[
                io.Combo.Input(
                    "precision",
                    options=list(DTYPES),
                    default="fp32",
                    tooltip="Number format of weights and arithmetic. fp32 reconstructs inversions exactly; fp16 and "
                    "bf16 take half the memory and are faster on most GPUs.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The diffusion model (v-prediction, 48 latent channels)."
                ),
                io.Clip.Output(
                    display_name="clip",
                    tooltip="The caption encoder: for CLIP Text Encode or Encode Paperland Caption.",
                ),
                io.Vae.Output(
                    display_name="vae",
                    tooltip="Exact pixels to latents and back: one latent position holds 4x4 pixels.",
                ),
            ],
        )

    @classmethod
    def execute(cls, precision: str) -> io.NodeOutput:
        if precision not in DTYPES:
            raise ValueError(f"precision is {precision!r}; choose one of {', '.join(DTYPES)}")
        config, weights = paperland.read()
        parts = {
            prefix: {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            for prefix in ("unet.", "text.")
        }
        model = unet_model(
            "Paperland",
            config.host(),
            parts["unet."],
            rgb_factors=paperland.preview_factors(),
            dtype=DTYPES[precision],
        )
        encoder = text.CaptionEncoder(config.context_channels)
        encoder.load_state_dict(parts["text."])
        vae = PixelVAE(paperland.encode_pixels, paperland.decode_pixels, paperland.PATCH, paperland.LATENT_CHANNELS)
        return io.NodeOutput(model, text_clip(encoder.eval().requires_grad_(False), config.context_channels), vae)


class EncodeCaption(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStylePaperlandEncode",
            display_name="Encode Paperland Caption (Semantic Style)",
            category=CATEGORY,
            description="A caption for the Paperland model. Like CLIP Text Encode, but says which words the "
            "model does not know.",
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP output of Load Paperland Model."),
                io.String.Input(
                    "caption",
                    multiline=True,
                    default="cream and orange shaded sky, red and pink shaded sun, purple and navy striped mountain, "
                    "green and lime wavy hill",
                    tooltip="Phrases with commas between them: two colours, a texture and a region each. Colours: "
                    + ", ".join(scenes.COLORS)
                    + ". Textures: "
                    + ", ".join(scenes.TEXTURES)
                    + ". Regions: "
                    + ", ".join(scenes.REGIONS)
                    + ". Empty: no caption, the negative prompt of this model.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning",
                    tooltip="For any sampler or inversion node that runs the Paperland model.",
                ),
                io.String.Output(
                    display_name="unknown", tooltip="The words that were left out because the model does not know them."
                ),
            ],
        )

    @classmethod
    def execute(cls, clip, caption: str) -> io.NodeOutput:
        _, unknown = text.parse(caption)
        if unknown:
            logging.warning("Paperland does not know these words and leaves them out: %s", ", ".join(unknown))
        return io.NodeOutput(clip.encode_from_tokens_scheduled(clip.tokenize(caption)), ", ".join(unknown))


class DrawScene(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStylePaperlandScene",
            display_name="Draw Paperland Scene (Semantic Style)",
            category=CATEGORY,
            description="Draws a paper-cut landscape with exact region labels. The same layout seed keeps every shape "
            "in its place whatever the style seed; the same style seed keeps colours and textures.",
            inputs=[
                io.Int.Input(
                    "layout_seed",
                    default=0,
                    min=0,
                    max=2**32 - 1,
                    tooltip="What stands where: another number, another landscape.",
                ),
                io.Int.Input(
                    "style_seed",
                    default=0,
                    min=0,
                    max=2**32 - 1,
                    tooltip="Colours and textures of the regions: another number, another look.",
                ),
                io.Int.Input(
                    "width",
                    default=scenes.SIZE,
                    **SIDES,
                    tooltip="Pixels. More width shows more of the landscape. The demo model was trained on 128x128.",
                ),
                io.Int.Input(
                    "height",
                    default=scenes.SIZE,
                    **SIDES,
                    tooltip="Pixels. More height draws the same landscape larger.",
                ),
                io.Combo.Input(
                    "only",
                    options=list(scenes.ONLY),
                    default=scenes.ONLY[0],
                    optional=True,
                    tooltip="everything draws a whole landscape. The others draw sky, a hill and a single thing: a "
                    "reference for Spin, or a picture to find the subject of.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The scene."),
                LabelMap.Output(display_name="labels", tooltip="The region of every pixel."),
                io.String.Output(
                    display_name="caption", tooltip="A caption that names every region with its colours and texture."
                ),
                io.Image.Output(
                    display_name="label_image",
                    tooltip="The regions, one fixed colour each: to look at, or to use as a colour-coded map.",
                ),
                io.Mask.Output(
                    display_name="subject",
                    tooltip="Where the one thing is, roof included; with everything, all suns, trees and houses.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, layout_seed: int, style_seed: int, width: int, height: int, only: str = scenes.ONLY[0]
    ) -> io.NodeOutput:
        drawn = scenes.chosen(only, layout_seed, style_seed, (height, width))
        labels = drawn.labels
        return io.NodeOutput(
            drawn.images, labels, drawn.captions[0], scenes.label_image(labels), scenes.object_mask(labels)
        )


class DrawClip(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStylePaperlandClip",
            display_name="Draw Moving Paperland Scene (Semantic Style)",
            category=CATEGORY,
            description="Draws a short video of a paper-cut landscape with exact region labels: the sun crosses the "
            "sky, clouds drift, water flows, all else stands still. The first frame is what Draw Paperland Scene "
            "draws with the same seeds.",
            inputs=[
                io.Int.Input(
                    "layout_seed",
                    default=0,
                    min=0,
                    max=2**32 - 1,
                    tooltip="What stands where: another number, another landscape.",
                ),
                io.Int.Input(
                    "style_seed",
                    default=0,
                    min=0,
                    max=2**32 - 1,
                    tooltip="Colours and textures of the regions. A shaded sky has no clouds and shaded water is calm: "
                    "take another number where more should move.",
                ),
                io.Int.Input(
                    "frames",
                    default=16,
                    min=1,
                    max=256,
                    tooltip="How many pictures. More frames go on from where fewer end.",
                ),
                io.Float.Input(
                    "speed",
                    default=1.0,
                    min=0.0,
                    max=8.0,
                    step=0.1,
                    tooltip="How fast things move: at 1 the sun takes 50 frames for one picture height. 0 is a still.",
                ),
                io.Int.Input(
                    "width",
                    default=scenes.SIZE,
                    **SIDES,
                    tooltip="Pixels. More width shows more of the landscape. The demo model was trained on 128x128.",
                ),
                io.Int.Input(
                    "height",
                    default=scenes.SIZE,
                    **SIDES,
                    tooltip="Pixels. More height draws the same landscape larger.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The frames, as a batch of images."),
                LabelMap.Output(display_name="labels", tooltip="The region of every pixel in every frame."),
                io.String.Output(
                    display_name="caption",
                    tooltip="A caption that names every region seen in any frame, with its colours and texture.",
                ),
                io.Image.Output(
                    display_name="label_images",
                    tooltip="The regions of every frame, one fixed colour each: to look at, or to use as colour-coded "
                    "maps.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, layout_seed: int, style_seed: int, frames: int, speed: float, width: int, height: int
    ) -> io.NodeOutput:
        drawn = motion.clip(layout_seed, style_seed, frames, (height, width), speed)
        return io.NodeOutput(drawn.images, drawn.labels, drawn.caption, scenes.label_image(drawn.labels))


class EmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStylePaperlandLatent",
            display_name="Empty Paperland Latent (Semantic Style)",
            category=CATEGORY,
            description="An empty latent of the Paperland model's shape, to sample pictures from captions. (Empty "
            "Latent Image counts 8 pixels to a position; this model has 4.)",
            inputs=[
                io.Int.Input("width", default=scenes.SIZE, **SIDES, tooltip="Pixels; the model was trained on 128."),
                io.Int.Input("height", default=scenes.SIZE, **SIDES, tooltip="Pixels; the model was trained on 128."),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="How many pictures to make at once."),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="For KSampler's latent_image, with denoise 1.")],
        )

    @classmethod
    def execute(cls, width: int, height: int, batch_size: int) -> io.NodeOutput:
        shape = (batch_size, paperland.LATENT_CHANNELS, height // paperland.PATCH, width // paperland.PATCH)
        return io.NodeOutput({"samples": torch.zeros(shape, device=comfy.model_management.intermediate_device())})


NODES = [LoadPaperland, EncodeCaption, DrawScene, DrawClip, EmptyLatent]
