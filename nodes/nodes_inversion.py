"""Nodes around an inversion: making it, replaying it, looking into it; files.py keeps it."""

from typing import Any

import comfy.samplers
from comfy_api.latest import io

from ..host.invert import InversionTask, invert_ddim, invert_ddpm
from ..host.reference_cache import CACHE
from ..host.replay_sampler import ReplayNoise, ReplaySampler
from ..regions.semantic_map import SemanticMap
from ..samplers.inversion import Inversion
from ..samplers.step_adain import PUBLISHED_START, StepAdaIN
from .nodes_files import LoadInversion, SaveInversion
from .schema import advanced, schema
from .types import Inversion as InversionSocket
from .types import SemanticMap as SemanticMapSocket

CATEGORY = "semantic_style/inversion"
MAX_SEED = 0xFFFFFFFFFFFFFFFF


def _shared_inputs(steps: int, scheduler: str, cfg: float) -> list[Any]:
    """The inputs that both inversions have."""
    return [
        io.Model.Input(
            "model",
            tooltip="SD1.x, SD2.x, SDXL or a flow model (SD3, Flux, Qwen-Image, Z-Image, Wan), patched or not.",
        ),
        io.Conditioning.Input("positive", tooltip="What the picture shows. The better it fits, the better edits work."),
        io.Conditioning.Input("negative", tooltip="Negative prompt, usually empty. Not evaluated at CFG 1."),
        io.Latent.Input(
            "latent",
            tooltip="The picture to invert: one, a batch, the frames of a video, or the latent of a video model as a "
            "whole. A noise mask in it is not used; mask the replay.",
        ),
        io.Int.Input(
            "steps", default=steps, min=1, max=10000, tooltip="Noise levels. More follow the picture more finely."
        ),
        io.Combo.Input(
            "scheduler",
            options=comfy.samplers.SCHEDULER_NAMES,
            default=scheduler,
            tooltip="How the noise levels are spaced. The replay uses the same levels.",
        ),
        io.Float.Input(
            "cfg",
            default=cfg,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="Guidance scale; 1 for distilled models (Flux, turbo). Use the same one in the replay's guider to "
            "get the picture back.",
        ),
    ]


def seed_input(tooltip: str) -> Any:
    # Without the control that draws a new seed after every run: it would invert anew each time.
    return io.Int.Input("seed", default=0, min=0, max=MAX_SEED, control_after_generate=False, tooltip=tooltip)


def _skip_input() -> Any:
    return advanced(
        io.Int.Input(
            "skip",
            default=0,
            min=0,
            max=9999,
            optional=True,
            tooltip="Noisy steps that no run will use: they are not computed. Replay with this skip or more.",
        )
    )


def adain_start_input() -> Any:
    return io.Float.Input(
        "adain_start",
        default=0.33,
        min=0.0,
        max=1.0,
        step=0.01,
        optional=True,
        tooltip="Part of the steps before the first AdaIN: 0.33, exactly a third, as published; 0 from the first step "
        "on, 1 never.",
    )


def _inversion_output() -> Any:
    return InversionSocket.Output(
        display_name="inversion", tooltip="The picture's path to noise, with all that replaying it needs."
    )


def _task(model, positive, negative, latent, steps, scheduler, cfg, seed, skip) -> InversionTask:
    return InversionTask(model, positive, negative, latent["samples"], steps, scheduler, cfg, seed, skip=skip)


class DDPMInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStyleDDPMInversion",
            display_name="DDPM Inversion (Semantic Style)",
            category=CATEGORY,
            description="Finds the noise from which the model makes exactly this picture (edit-friendly DDPM "
            "inversion), so that it can be made again with another prompt, guidance, model patch or noise.",
            search_aliases=["edit friendly", "invert", "noise maps", "semantix"],
            inputs=[
                *_shared_inputs(steps=60, scheduler="normal", cfg=3.5),
                seed_input("Seed of the noise that the picture is inverted to. Another seed gives other edits."),
                advanced(
                    io.Int.Input(
                        "batch_steps",
                        default=0,
                        min=0,
                        max=1000,
                        optional=True,
                        tooltip="Noise levels per model call; 0 chooses by free memory. Models with patches that may "
                        "depend on the level (AnimateDiff, control) always run one by one.",
                    )
                ),
                io.Boolean.Input(
                    "same_noise",
                    default=False,
                    optional=True,
                    tooltip="One noise for all pictures of the batch: switch it on for the frames of a video, whose "
                    "edits then flicker less. Off: each picture has its own.",
                ),
                io.Boolean.Input(
                    "noise_maps",
                    default=True,
                    optional=True,
                    tooltip="What a replay needs. Off for a reference (of Semantix, SCSA, AdaIN or Spin): the same "
                    "noisy latents without asking the model, in no time. It cannot be replayed.",
                ),
                _skip_input(),
            ],
            outputs=[_inversion_output()],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        latent,
        steps,
        scheduler,
        cfg,
        seed,
        batch_steps: int = 0,
        same_noise: bool = False,
        noise_maps: bool = True,
        skip: int = 0,
    ) -> io.NodeOutput:
        task = _task(model, positive, negative, latent, steps, scheduler, cfg, seed, skip)
        return io.NodeOutput(invert_ddpm(task, batch_steps, same_noise=same_noise, noise_maps=noise_maps))


class DDIMInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStyleDDIMInversion",
            display_name="DDIM Inversion (Semantic Style)",
            category=CATEGORY,
            description="Follows the model's own flow from the picture up to noise, without randomness. The "
            "reconstruction is approximate; its latents are what style-transfer methods such as SCSA start from.",
            search_aliases=["invert", "unsample", "scsa", "styleid"],
            inputs=[
                *_shared_inputs(steps=50, scheduler="ddim_uniform", cfg=1.0),
                seed_input("DDIM draws no noise; only models whose conditioning draws some (unCLIP) look at this."),
                advanced(
                    io.Int.Input(
                        "refine",
                        default=0,
                        min=0,
                        max=10,
                        optional=True,
                        tooltip="Fixed-point refinements of every step: each costs as much as the inversion "
                        "and cuts the "
                        "error several times. At CFG 1 only.",
                    )
                ),
                io.Boolean.Input(
                    "for_scsa",
                    default=True,
                    optional=True,
                    tooltip="Keep in RAM what Apply SCSA will ask the model about this picture: its first run then "
                    "takes half the time. SD1.5, 512 pixels, 50 steps: 0.6 GB a picture, a quarter of the RAM at most, "
                    "until the inversion is gone. Off saves it where no SCSA follows.",
                ),
                _skip_input(),
            ],
            outputs=[_inversion_output()],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        latent,
        steps,
        scheduler,
        cfg,
        seed,
        refine: int = 0,
        for_scsa: bool = True,
        skip: int = 0,
    ) -> io.NodeOutput:
        task = _task(model, positive, negative, latent, steps, scheduler, cfg, seed, skip)
        return io.NodeOutput(invert_ddim(task, refine, CACHE if for_scsa else None))


class Replay(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStyleReplay",
            display_name="Replay Inversion (Semantic Style)",
            category=CATEGORY,
            description="All that SamplerCustomAdvanced needs to sample along an inversion. With the same model, "
            "prompts and CFG in the guider the picture comes back; with others it is edited.",
            search_aliases=["reconstruct", "edit", "resample"],
            inputs=[
                InversionSocket.Input("inversion", tooltip="From an inversion node or from a file."),
                io.Int.Input(
                    "skip",
                    default=0,
                    min=0,
                    max=9999,
                    tooltip="Noisy steps to leave out. More keeps more of the picture; for edits with DDPM a third to "
                    "a half of the steps is a good start.",
                ),
                io.Boolean.Input(
                    "exact",
                    default=True,
                    tooltip="Add what the last prediction lacked, so that the reconstruction is exact (DDPM). Off as "
                    "in the paper.",
                ),
                io.Latent.Input(
                    "start",
                    optional=True,
                    tooltip="A noisy latent to start from in place of the stored one, at the level that skip chooses: "
                    "from Inversion Latent, changed by AdaIN for example.",
                ),
                advanced(
                    io.Boolean.Input(
                        "allow_other_model",
                        default=False,
                        optional=True,
                        tooltip="Replay on another checkpoint of the same architecture. Patches such as LoRAs need no "
                        "permission.",
                    )
                ),
                InversionSocket.Input(
                    "adain_reference",
                    optional=True,
                    tooltip="A picture whose colours are taken over step by step: after each step the latent gets the "
                    "channel means and deviations of this inversion at the same noise level. Its size may differ.",
                ),
                adain_start_input(),
                SemanticMapSocket.Input(
                    "semantic_map",
                    optional=True,
                    tooltip="Lets AdaIN work region by region. Content: the picture that is replayed; style: the "
                    "adain_reference.",
                ),
            ],
            outputs=[
                io.Noise.Output(display_name="noise", tooltip="The inversion's own noise at its first level."),
                io.Sampler.Output(
                    display_name="sampler",
                    tooltip="Samples along the inversion's noise maps; takes this node's noise and latent only.",
                ),
                io.Sigmas.Output(display_name="sigmas", tooltip="The inversion's noise levels, without those skipped."),
                io.Latent.Output(
                    display_name="latent",
                    tooltip="The picture that was inverted. A noise mask on it restricts the edit to the mask.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        inversion: Inversion,
        skip: int,
        exact: bool,
        start: dict | None = None,
        allow_other_model: bool = False,
        adain_reference: Inversion | None = None,
        adain_start: float = PUBLISHED_START,
        semantic_map: SemanticMap | None = None,
    ) -> io.NodeOutput:
        inversion.check_replay(skip)
        beginning = None
        if start is not None:
            inversion.check_fits(start["samples"].shape)
            beginning = inversion.to_inner(start["samples"].to(inversion.clean))
        adains: tuple[StepAdaIN, ...] = ()
        if adain_reference is not None:
            adains = (StepAdaIN(adain_reference, inversion.schedule_steps, adain_start, semantic_map),)
        return io.NodeOutput(
            ReplayNoise(inversion, skip, beginning),
            ReplaySampler(inversion, skip, exact, allow_other_model, adains, beginning),
            inversion.sigmas[skip - inversion.skipped :].clone(),
            {"samples": inversion.to_outer(inversion.clean)},
        )


class InversionLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStyleInversionLatent",
            display_name="Inversion Latent (Semantic Style)",
            category=CATEGORY,
            description="A latent of the inversion's path: the noisiest at step 0, the picture itself at the last.",
            inputs=[
                InversionSocket.Input("inversion", tooltip="From an inversion node or from a file."),
                io.Int.Input(
                    "step",
                    default=0,
                    min=0,
                    max=10000,
                    tooltip="0 is the noisiest latent, where a replay starts; the number of steps is the clean "
                    "picture. Use the same number as skip of Replay Inversion.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The latent at that step, noise included.")],
        )

    @classmethod
    def execute(cls, inversion: Inversion, step: int) -> io.NodeOutput:
        first, last = inversion.skipped, inversion.schedule_steps
        if not first <= step <= last:
            raise ValueError(f"step must be {first} to {last} for this inversion, got {step}")
        return io.NodeOutput({"samples": inversion.to_outer(inversion.trajectory[step - first])})


class InversionFromBatch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStyleInversionFromBatch",
            display_name="Inversion From Batch (Semantic Style)",
            category=CATEGORY,
            description="Takes pictures out of an inversion of several. Pictures of one size inverted as a batch ("
            "Batch Images before VAE Encode) need fewer calls of the model, and each is as if it were inverted alone.",
            inputs=[
                InversionSocket.Input("inversion", tooltip="Of a batch: from an inversion node or from a file."),
                io.Int.Input(
                    "batch_index",
                    default=0,
                    min=0,
                    max=4095,
                    tooltip="The first picture to take: 0 is the first of the batch.",
                ),
                io.Int.Input(
                    "length",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip="How many pictures to take, that one and those after it.",
                ),
            ],
            outputs=[InversionSocket.Output(display_name="inversion", tooltip="Of those pictures only.")],
        )

    @classmethod
    def execute(cls, inversion: Inversion, batch_index: int, length: int) -> io.NodeOutput:
        return io.NodeOutput(CACHE.rows(inversion, batch_index, length))


NODES: list[type[io.ComfyNode]] = [
    DDPMInversion,
    DDIMInversion,
    Replay,
    InversionLatent,
    InversionFromBatch,
    SaveInversion,
    LoadInversion,
]
