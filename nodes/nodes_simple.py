"""One node for each method: what a newcomer needs of it, expanded into the nodes that do it."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import Node

from ..files.embedding_file import check_name
from ..host.model_sampling import check_unet
from ..host.picture_size import as_rgb
from ..regions.masks import as_mask, check_outside
from ..regions.semantic_map import SemanticMap
from .expansion import Expansion
from .nodes_adain import AdaIN
from .nodes_auto_map import AutoMap
from .nodes_embedding import SpinEmbedding
from .nodes_inversion import MAX_SEED, DDIMInversion, DDPMInversion, InversionLatent, Replay, seed_input
from .nodes_maps import MapFromColors, MapFromMasks, PreviewMap
from .nodes_picture import FitPicture, OriginalSize, side_input
from .nodes_saliency import FindSubject
from .nodes_scsa import ApplySCSA
from .nodes_semantix import Guider, KSampler
from .nodes_spin import ApplySpin, KeepBackground, SpinStyleEnergy
from .schema import advanced, schema
from .types import SemanticMap as SemanticMapSocket

CATEGORY = "semantic_style/simple"
HIDDEN = [io.Hidden.unique_id, io.Hidden.dynprompt]
NO_MAP, AUTOMATIC = "none", "automatic"

# What the sliders stand for at 1: the strongest that kept pictures whole on Paperland (docs/sliders.md).
MOST_STYLE = 9.0
# Published for images: position weight 3, with which things of the style showed through at their own positions.
SPATIAL, SEMANTIC, POSITION = 0.6, 2 / 3, 1.0
MOST_BLEND = 5.0
SPIN_SCHEDULER = "ddim_uniform"
TEMPLATE = "a photo of <it>"
# Part of an edge over which a painted part fades into the original, of the picture's longer side.
FEATHER = 1 / 64


def _models() -> list[Any]:
    return [
        io.Model.Input("model", tooltip="An SD1.x, SD2.x or SDXL model (or the pack's Paperland); LoRAs are fine."),
        io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
        io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
    ]


def _slider(name: str, default: float, tooltip: str) -> Any:
    return io.Float.Input(
        name,
        default=default,
        min=0.0,
        max=1.0,
        step=0.01,
        round=0.001,
        display_mode=io.NumberDisplay.slider,
        tooltip=tooltip,
    )


def _steps(default: int, tooltip: str) -> Any:
    return io.Int.Input("steps", default=default, min=2, max=1000, tooltip=tooltip)


def _cfg(default: float, tooltip: str) -> Any:
    return advanced(
        io.Float.Input("cfg", default=default, min=1.0, max=30.0, step=0.1, round=0.01, optional=True, tooltip=tooltip)
    )


def _check_sliders(**values: float) -> None:
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be 0 to 1, got {value}")


def _check_counts(one: torch.Tensor, many: torch.Tensor, name: str) -> None:
    """Raise ValueError unless there is one of `one`, or one for each of `many`."""
    if len(one) not in (1, len(many)):
        raise ValueError(
            f"there are {len(many)} pictures and {len(one)} of {name}: connect one for all or one for each of them"
        )


def _blank() -> torch.Tensor:
    return torch.ones(1, 64, 64, 3)


@dataclass(frozen=True)
class _Picture:
    """A picture in the inner graph: links to it at the model's size, its latent, its mask at that size (None without
    one), and itself as RGB.
    """

    fitted: Any
    latent: Any
    mask: Any
    original: Any


class _Inner(Expansion):
    """What the three inner graphs share."""

    def __init__(self, hidden: Any, model: Any, clip: Any, vae: Any, side: int) -> None:
        super().__init__(hidden)
        self.side, self.patcher = side, model
        self.model, self.clip, self.vae = (
            self.given(name, value) for name, value in (("model", model), ("clip", clip), ("vae", vae))
        )

    def prompt(self, name: str, text: str) -> Any:
        return self.add("CLIPTextEncode", f"encode {name}", clip=self.clip, text=text).out(0)

    def picture(self, name: str, image: Any, mask_name: str = "", mask: Any = None) -> _Picture:
        fitted = self.add(
            FitPicture,
            f"fit {name}",
            image=self.given(name, image),
            model=self.model,
            vae=self.vae,
            mask=self.given(mask_name, mask),
            side=self.side,
        )
        latent = self.add("VAEEncode", f"encode {name}", pixels=fitted.out(0), vae=self.vae).out(0)
        return _Picture(fitted.out(0), latent, None if mask is None else fitted.out(1), fitted.out(2))

    def kept(self, node: type[io.ComfyNode], name: str, outputs: int = 1, /, **inputs: Any) -> Node:
        """A node that takes long; its first outputs are kept."""
        return self.keeping(self.add(node, name, **inputs), self.patcher, self.model, outputs)

    def sampled(self, noise: Any, guider: Any, sampler: Any, sigmas: Any, latent: Any) -> Any:
        return self.add(
            "SamplerCustomAdvanced",
            "sample",
            noise=noise,
            guider=guider,
            sampler=sampler,
            sigmas=sigmas,
            latent_image=latent,
        ).out(0)

    def decoded(self, latent: Any, like: _Picture) -> Any:
        image = self.add("VAEDecode", "decode", samples=latent, vae=self.vae).out(0)
        return self.add(OriginalSize, "back to size", image=image, original=like.original).out(0)

    def kept_outside(self, image: Any, like: _Picture, mask: Any, picture: torch.Tensor) -> Any:
        feather = max(1, round(FEATHER * max(picture.shape[1:3])))
        return self.add(
            KeepBackground, "keep the rest", image=image, original=like.original, mask=mask, feather=feather
        ).out(0)


class SemantixRestyle(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStyleSemantixRestyle",
            display_name="Restyle Picture (Semantix)",
            category=CATEGORY,
            description="Restyles a picture like another one, each thing like its counterpart (Semantix), on your own "
            "checkpoint. Turning a slider samples again only; the pictures stay inverted.",
            search_aliases=["style transfer", "restyle", "semantix", "ipadapter style"],
            inputs=[
                *_models(),
                io.Image.Input("content", tooltip="The picture to restyle, of any size; those of a batch one by one."),
                io.Image.Input("style_image", tooltip="The picture whose style is taken over, of any size."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    tooltip="What the content shows, in a few words, such as: a river between mountains. The better it "
                    "fits, the better the shapes are kept.",
                ),
                _slider("style", 0.75, "How much of the style comes in: 0 is the content as it is, 1 the most."),
                _slider("structure", 0.5, "How firmly shapes and things stay what they are."),
                _steps(60, "Noise levels: 60 as published. 20 to 30 are faster and a little coarser."),
                seed_input("Another seed, another result of the same kind. It inverts the pictures anew."),
                io.Combo.Input(
                    "regions",
                    options=[NO_MAP, AUTOMATIC],
                    default=NO_MAP,
                    tooltip="automatic finds regions that both pictures share; each then takes its style from the "
                    "same region only. A connected semantic_map goes first.",
                ),
                io.Mask.Input(
                    "content_mask",
                    optional=True,
                    tooltip="Only here the content is restyled. Every pixel outside stays as it is.",
                ),
                io.Mask.Input("style_mask", optional=True, tooltip="Only from here style is taken."),
                SemanticMapSocket.Input(
                    "semantic_map", optional=True, tooltip="Which regions belong together, from a semantic map node."
                ),
                _cfg(3.5, "Guidance scale: 3.5 as published."),
                side_input(),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The content restyled, at its size."),
                io.Image.Output(display_name="plot", tooltip="What the terms of the energy did at each step."),
                io.String.Output(display_name="report", tooltip="What was done, in words."),
            ],
            hidden=HIDDEN,
            enable_expand=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        content,
        style_image,
        prompt: str,
        style: float,
        structure: float,
        steps: int,
        seed: int,
        regions: str,
        content_mask=None,
        style_mask=None,
        semantic_map: SemanticMap | None = None,
        cfg: float = 3.5,
        side: int = 0,
    ) -> io.NodeOutput:
        _check_sliders(style=style, structure=structure)
        _check_counts(as_rgb(style_image, "style_image"), as_rgb(content, "content"), "style_image")
        check_unet(model)
        if content_mask is not None:
            _check_counts(as_mask(content_mask, "content_mask"), content, "content_mask")
        if style_mask is not None:
            _check_counts(as_mask(style_mask, "style_mask"), style_image, "style_mask")
        if style == 0.0:
            return io.NodeOutput(content, _blank(), "style is 0: this is the content as it came.")
        inner = _Inner(cls.hidden, model, clip, vae, side)
        words, empty = inner.prompt("the prompt", prompt), inner.prompt("no prompt", "")
        context_picture = inner.picture("content", content, "content_mask", content_mask)
        reference_picture = inner.picture("style_image", style_image, "style_mask", style_mask)
        shared: dict[str, Any] = {"model": inner.model, "negative": empty, "steps": steps}
        context = inner.kept(
            DDPMInversion,
            "invert the content",
            positive=words,
            latent=context_picture.latent,
            cfg=cfg,
            seed=seed,
            **shared,
        ).out(0)
        reference = inner.kept(
            DDPMInversion,
            "invert the style",
            positive=empty,
            latent=reference_picture.latent,
            cfg=1.0,
            seed=(seed + 1) % MAX_SEED,
            noise_maps=False,
            **shared,
        ).out(0)
        maps = inner.given("semantic_map", semantic_map)
        if maps is None and regions == AUTOMATIC:
            maps = inner.kept(
                AutoMap, "find regions", model=inner.model, content=context, style=reference, prompt=empty, seed=seed
            ).out(0)
        restyled = inner.add(
            KSampler,
            "restyle",
            model=inner.model,
            positive=words,
            negative=empty,
            context=context,
            reference=reference,
            cfg=cfg,
            style_weight=MOST_STYLE * style,
            spatial_weight=SPATIAL * MOST_STYLE * structure,
            semantic_weight=SEMANTIC * MOST_STYLE * structure,
            position_weight=POSITION,
            adain_strength=style,
            semantic_map=maps,
            mask=context_picture.mask,
            content_mask=context_picture.mask,
            style_mask=reference_picture.mask,
        )
        image = inner.decoded(restyled.out(0), context_picture)
        if content_mask is not None:
            image = inner.kept_outside(image, context_picture, inner.given("content_mask", content_mask), content)
        return inner.output(image, restyled.out(1), restyled.out(2))


class SCSARestyle(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStyleSCSARestyle",
            display_name="Restyle by Regions (SCSA)",
            category=CATEGORY,
            description="Paints every region of a picture with what the style picture has in the same region (SCSA). "
            "Regions come from two colour-coded pictures, from masks, from a map, or are found by the model.",
            search_aliases=["style transfer", "semantic", "regions", "scsa", "styleid"],
            inputs=[
                *_models(),
                io.Image.Input("content", tooltip="The picture to restyle, of any size; those of a batch one by one."),
                io.Image.Input("style_image", tooltip="The picture that gives each region its style, of any size."),
                _slider("style", 1.0, "How much of the style comes in: 0 is the content as it is, 1 the most."),
                _slider(
                    "pattern",
                    0.5,
                    "What is taken over: 0 colours and light, 1 patterns and brush strokes. 0.2 as published.",
                ),
                _steps(50, "Noise levels: 50 as published. 20 to 25 are faster and a little coarser."),
                seed_input("Of the search for automatic regions. The method itself draws nothing."),
                io.Image.Input(
                    "content_colors",
                    optional=True,
                    tooltip="The content's regions, each painted in one colour; needs style_colors.",
                ),
                io.Image.Input("style_colors", optional=True, tooltip="The style's regions in the same colours."),
                io.Mask.Input(
                    "content_masks",
                    optional=True,
                    tooltip="One mask for each region of the content, as a batch; needs style_masks.",
                ),
                io.Mask.Input(
                    "style_masks", optional=True, tooltip="One mask for each region of the style, in the same order."
                ),
                SemanticMapSocket.Input(
                    "semantic_map", optional=True, tooltip="Which regions belong together, from a semantic map node."
                ),
                side_input(),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The content restyled, at its size."),
                io.Image.Output(display_name="map_preview", tooltip="The regions over both pictures."),
                io.String.Output(display_name="report", tooltip="The regions, and what to look at."),
            ],
            hidden=HIDDEN,
            enable_expand=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        content,
        style_image,
        style: float,
        pattern: float,
        steps: int,
        seed: int,
        content_colors=None,
        style_colors=None,
        content_masks=None,
        style_masks=None,
        semantic_map: SemanticMap | None = None,
        side: int = 0,
    ) -> io.NodeOutput:
        _check_sliders(style=style, pattern=pattern)
        _check_counts(as_rgb(style_image, "style_image"), as_rgb(content, "content"), "style_image")
        check_unet(model)
        _check_regions(content_colors, style_colors, content_masks, style_masks, semantic_map)
        if style == 0.0:
            return io.NodeOutput(content, _blank(), "style is 0: this is the content as it came.")
        inner = _Inner(cls.hidden, model, clip, vae, side)
        empty = inner.prompt("no prompt", "")
        picture, other = inner.picture("content", content), inner.picture("style_image", style_image)
        inverted = {
            name: inner.kept(
                DDIMInversion,
                f"invert the {name}",
                model=inner.model,
                positive=empty,
                negative=empty,
                latent=one.latent,
                steps=steps,
                seed=0,
            ).out(0)
            for name, one in (("content", picture), ("style", other))
        }
        if semantic_map is not None:
            maps, report = inner.given("semantic_map", semantic_map), None
        elif content_colors is not None:
            colors = {
                side: inner.given(f"{side}_colors", given)
                for side, given in (("content", content_colors), ("style", style_colors))
            }
            found = inner.kept(MapFromColors, "regions from colors", 2, **colors)
            maps, report = found.out(0), found.out(1)
        elif content_masks is not None:
            masks = {
                side: inner.given(f"{side}_masks", given)
                for side, given in (("content", content_masks), ("style", style_masks))
            }
            found = inner.kept(MapFromMasks, "regions from masks", 2, **masks)
            maps, report = found.out(0), found.out(1)
        else:
            found = inner.kept(AutoMap, "find regions", 2, model=inner.model, **inverted, prompt=empty, seed=seed)
            maps, report = found.out(0), found.out(1)
        preview = inner.add(
            PreviewMap, "preview", semantic_map=maps, content=picture.fitted, style=other.fitted, opacity=0.5
        )
        painted = inner.add(
            ApplySCSA,
            "scsa",
            model=inner.model,
            **inverted,
            semantic_map=maps,
            t1=1.0 - pattern,
            t2=pattern,
            strength=style,
            vae=inner.vae,
        ).out(0)
        skip = skipped_steps(style, steps)
        noisy = {
            side: inner.add(InversionLatent, f"{side} at the start", inversion=one, step=skip).out(0)
            for side, one in inverted.items()
        }
        start = inner.add(AdaIN, "colours of the regions", **noisy, strength=style, semantic_map=maps).out(0)
        replay = inner.add(Replay, "replay", inversion=inverted["content"], skip=skip, start=start)
        guider = inner.add("CFGGuider", "guider", model=painted, positive=empty, negative=empty, cfg=1.0).out(0)
        image = inner.decoded(inner.sampled(replay.out(0), guider, *(replay.out(i) for i in (1, 2, 3))), picture)
        return inner.output(image, preview.out(0), preview.out(1) if report is None else report)


def skipped_steps(style: float, steps: int) -> int:
    """Noisy steps that SCSA leaves out: the one at the highest level at style 1, as StyleID; nine tenths near 0, where
    a run from the highest level would lose the content.
    """
    return min(steps - 1, 1 + round(0.9 * (1.0 - style) * (steps - 1)))


def _check_regions(content_colors, style_colors, content_masks, style_masks, semantic_map) -> None:
    for what, one, other in (("colors", content_colors, style_colors), ("masks", content_masks, style_masks)):
        if (one is None) != (other is None):
            given, missing = ("style", "content") if one is None else ("content", "style")
            raise ValueError(f"{given}_{what} is connected and {missing}_{what} is not: connect both, or neither")
    ways = {"colors": content_colors, "masks": content_masks, "semantic_map": semantic_map}
    several = [name for name, given in ways.items() if given is not None]
    if len(several) > 1:
        raise ValueError(f"regions come in {len(several)} ways ({', '.join(several)}): connect one of them")


class SpinPaint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStyleSpinPaint",
            display_name="Paint Subject (Spin)",
            category=CATEGORY,
            description="Paints the subject of one picture into a masked part of another, in that picture's style "
            "(Spin). The subject is learnt as a word once; after that only the sampler runs.",
            search_aliases=["insert object", "inpaint reference", "paint by example", "spin"],
            inputs=[
                *_models(),
                # First of the pictures: it is what a bypassed node hands on.
                io.Image.Input("background", tooltip="The picture that it is painted into, of any size."),
                io.Mask.Input(
                    "mask",
                    tooltip="Where in the background it is painted: white, a little larger than what it replaces. The "
                    "rest stays exactly.",
                ),
                io.Image.Input("reference", tooltip="A picture of the subject, of any size."),
                io.String.Input(
                    "class_word", default="object", tooltip="What the subject is, in a word or a few: cat, red vase."
                ),
                io.String.Input(
                    "background_prompt",
                    multiline=True,
                    default="",
                    tooltip="What the background shows, in a few words, with its style: an oil painting of a meadow.",
                ),
                _slider("subject", 1.0, "How much of the subject is painted in: 0 is the background as it is."),
                _slider("blend", 0.2, "How much the subject takes the background's colours and texture; 0 off."),
                io.Int.Input(
                    "learning_steps",
                    default=200,
                    min=1,
                    max=10000,
                    tooltip="How long the subject is learnt: 200 as published. More is closer to the reference.",
                ),
                io.Int.Input("variants", default=1, min=1, max=64, tooltip="How many pictures to make."),
                seed_input("Another seed, other variants. The word is not learnt again."),
                _steps(50, "Noise levels of the sampler: 50 as published."),
                io.Mask.Input(
                    "reference_mask",
                    optional=True,
                    tooltip="Where the subject is in the reference. Without one the model looks for the class word.",
                ),
                io.String.Input(
                    "name",
                    default="",
                    optional=True,
                    tooltip="Name of the word's file in models/embeddings; empty: spin_ and the class word.",
                ),
                _cfg(7.5, "Guidance scale: 7.5 as published; 3.5 for Paperland."),
                advanced(
                    io.Float.Input(
                        "learning_rate",
                        default=0.0005,
                        min=1e-6,
                        max=10.0,
                        step=0.0001,
                        round=0.000001,
                        optional=True,
                        tooltip="How fast it learns: 0.0005 as published, for CLIP; 0.1 for Paperland.",
                    )
                ),
                side_input(),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The background with the subject, a picture a variant."),
                io.String.Output(display_name="word", tooltip="embedding:name, for any prompt."),
                io.Image.Output(display_name="plot", tooltip="How the learning went, and what the word looks like."),
                io.String.Output(display_name="report", tooltip="Where the subject was found in the reference."),
            ],
            hidden=HIDDEN,
            enable_expand=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        background,
        mask,
        reference,
        class_word: str,
        background_prompt: str,
        subject: float,
        blend: float,
        learning_steps: int,
        variants: int,
        seed: int,
        steps: int,
        reference_mask=None,
        name: str = "",
        cfg: float = 7.5,
        learning_rate: float = 0.0005,
        side: int = 0,
    ) -> io.NodeOutput:
        _check_sliders(subject=subject, blend=blend)
        if not class_word.strip():
            raise ValueError("class_word is empty: write what the subject is, in a word or a few, such as: red vase")
        name = name.strip() or "spin_" + (re.sub(r"[^a-z0-9]+", "_", class_word.lower()).strip("_") or "word")
        check_name(name)
        check_unet(model)
        as_rgb(reference, "reference")
        if len(as_rgb(background, "background")) > 1:
            raise ValueError(f"background is a batch of {len(background)} pictures: give one, or a list of them")
        where = as_mask(mask)
        _check_counts(where, background, "mask")
        check_outside(where)
        if reference_mask is not None:
            _check_counts(as_mask(reference_mask, "reference_mask"), as_rgb(reference, "reference"), "reference_mask")
        if subject == 0.0:
            return io.NodeOutput(
                background.repeat(variants, 1, 1, 1), "", _blank(), "subject is 0: nothing is painted."
            )
        inner = _Inner(cls.hidden, model, clip, vae, side)
        words, empty = inner.prompt("the background's prompt", background_prompt), inner.prompt("no prompt", "")
        there = inner.picture("background", background, "mask", mask)
        shown = inner.picture("reference", reference, "reference_mask", reference_mask)
        where_shown, report = shown.mask, "The reference's mask was given."
        if where_shown is None:
            found = inner.kept(
                FindSubject,
                "find the subject",
                3,
                model=inner.model,
                latent=shown.latent,
                prompt=empty,
                image=shown.fitted,
                clip=inner.clip,
                class_word=class_word,
            )
            where_shown, report = found.out(0), found.out(2)
        learnt = inner.kept(
            SpinEmbedding,
            "learn the subject",
            3,
            model=inner.model,
            clip=inner.clip,
            class_word=class_word,
            steps=learning_steps,
            learning_rate=learning_rate,
            name=name,
            latent=shown.latent,
            vae=inner.vae,
            saliency=where_shown,
            template=TEMPLATE,
        )
        spin = inner.add(
            ApplySpin,
            "spin",
            model=inner.model,
            reference=learnt.out(0),
            background=words,
            mask=there.mask,
            strength=subject,
        )
        # A latent token that the mask's edge cuts through must be painted whole.
        token = vae.spacial_compression_encode()
        grown = inner.add("GrowMask", "whole tokens", mask=there.mask, expand=token, tapered_corners=True).out(0)
        latent = inner.add("SetLatentNoiseMask", "paint there only", samples=there.latent, mask=grown).out(0)
        latent = inner.add("RepeatLatentBatch", "variants", samples=latent, amount=variants).out(0)
        prompts: dict[str, Any] = {"model": spin.out(0), "positive": spin.out(1), "negative": empty, "cfg": cfg}
        if blend == 0.0:
            guider = inner.add("CFGGuider", "guider", **prompts).out(0)
        else:
            inverted = inner.kept(
                DDPMInversion,
                "invert the background",
                model=inner.model,
                positive=words,
                negative=empty,
                latent=there.latent,
                steps=steps,
                scheduler=SPIN_SCHEDULER,
                cfg=1.0,
                seed=0,
                noise_maps=False,
            ).out(0)
            energy = inner.add(
                SpinStyleEnergy,
                "fit in with the background",
                background=inverted,
                mask=there.mask,
                weight=MOST_BLEND * blend,
            ).out(0)
            guider = inner.add(Guider, "guider with energy", **prompts, energy=energy).out(0)
        noise = inner.add("RandomNoise", "noise", noise_seed=seed).out(0)
        sampler = inner.add("KSamplerSelect", "sampler", sampler_name="ddim").out(0)
        sigmas = inner.add(
            "BasicScheduler", "noise levels", model=inner.model, scheduler=SPIN_SCHEDULER, steps=steps, denoise=1.0
        ).out(0)
        image = inner.decoded(inner.sampled(noise, guider, sampler, sigmas, latent), there)
        image = inner.kept_outside(image, there, inner.given("mask", mask), background)
        return inner.output(image, learnt.out(1), learnt.out(2), report)


NODES: list[type[io.ComfyNode]] = [SemantixRestyle, SCSARestyle, SpinPaint]
