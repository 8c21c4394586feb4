"""Semantix: style transfer by an energy-guided sampler, as one node and as parts that go with the host's samplers."""

import functools
import operator
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..host.energy_guider import EnergyGuider, why_nothing
from ..host.replay_sampler import ReplaySampler
from ..host.semantix_transfer import Where, describe, make_energy, sample
from ..pictures.report_plot import HEIGHT, WIDTH, report_plot
from ..regions.semantic_map import SemanticMap
from ..samplers.guidance_report import GuidanceReport
from ..samplers.inversion import Inversion
from ..samplers.semantix_energy import FOR_IMAGES, FOR_VIDEO, Weights
from ..samplers.step_adain import PUBLISHED_START, StepAdaIN
from ..samplers.terms import Energy
from .late import attempt
from .nodes_inversion import adain_start_input
from .schema import advanced, checkpointing_input, schema
from .types import Energy as EnergySocket
from .types import Inversion as InversionSocket
from .types import SemanticMap as SemanticMapSocket

CATEGORY = "semantic_style/semantix"
AS_SET = "as set below"
PUBLISHED = {"published for images": FOR_IMAGES, "published for video": FOR_VIDEO}


def _chosen(weights: str, style: float, spatial: float, semantic: float, position: float) -> Weights:
    """The weights that the node's list says, its numbers or a published setting."""
    if weights == AS_SET:
        return Weights(style, spatial, semantic, position)
    if weights not in PUBLISHED:
        raise ValueError(f"weights is {weights!r}; choose one of {', '.join([AS_SET, *PUBLISHED])}")
    return PUBLISHED[weights]


def _inversion_inputs() -> list[Any]:
    return [
        InversionSocket.Input(
            "context",
            tooltip="The picture, batch or video to restyle, inverted with DDPM Inversion: what is where stays.",
        ),
        InversionSocket.Input(
            "reference",
            tooltip="The picture whose style is taken over, inverted with the same model (empty prompt, CFG 1). Any "
            "size. One for all, or one for each picture of the context.",
        ),
    ]


def _weight_inputs() -> list[Any]:
    def weight(name: str, default: float, tooltip: str) -> Any:
        return io.Float.Input(name, default=default, min=0.0, max=1000.0, step=0.05, tooltip=tooltip)

    published = "; ".join(
        f"{name}: {w.style:g}, {w.spatial:g}, {w.semantic:g}, {w.position:g}" for name, w in PUBLISHED.items()
    )
    return [
        io.Combo.Input(
            "weights",
            options=[AS_SET, *PUBLISHED],
            default=AS_SET,
            tooltip=f"A published setting is used in place of the four numbers below ({published}).",
        ),
        weight(
            "style_weight",
            FOR_IMAGES.style,
            "How strongly every position is drawn to the look of its match in the reference. 0 switches it off.",
        ),
        weight(
            "spatial_weight",
            FOR_IMAGES.spatial,
            "How strongly every position keeps the context's shapes. 0 switches it off.",
        ),
        weight(
            "semantic_weight",
            FOR_IMAGES.semantic,
            "How strongly every position keeps standing for the same words of the prompt. 0 switches it off.",
        ),
        weight(
            "position_weight",
            FOR_IMAGES.position,
            "How much the matches prefer the same part of the picture. 0: looks only.",
        ),
    ]


def _range_inputs(optional: bool) -> list[Any]:
    def part(name: str, default: float, tooltip: str) -> Any:
        return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, optional=optional, tooltip=tooltip)

    return [
        part("start_percent", 0.0, "Where the energy begins to act: 0 is the noisiest level."),
        part("end_percent", 1.0, "Where the energy ends to act: 1 is the last level."),
    ]


def _map_input() -> Any:
    return SemanticMapSocket.Input(
        "semantic_map",
        optional=True,
        tooltip="Positions look for their match in the same region only. Content: the context; style: the reference.",
    )


def _reference_prompt_input() -> Any:
    return io.Conditioning.Input(
        "reference_prompt",
        optional=True,
        tooltip="The reference's prompt. Not connected: the one it was inverted with.",
    )


def _where_inputs(content: str) -> list[Any]:
    return [
        io.Mask.Input("content_mask", optional=True, tooltip=content),
        io.Mask.Input(
            "style_mask",
            optional=True,
            tooltip="Takes the style from this part of the reference only. Any size; with a semantic_map from the same "
            "region inside of it.",
        ),
    ]


def _model_inputs() -> list[Any]:
    return [
        io.Model.Input("model", tooltip="The model that context and reference were inverted with; LoRAs are fine."),
        io.Conditioning.Input("positive", tooltip="The context's prompt."),
        io.Conditioning.Input("negative", tooltip="Negative prompt, usually empty. Not evaluated at CFG 1."),
    ]


def _cfg_input() -> Any:
    return io.Float.Input(
        "cfg",
        default=3.5,
        min=0.0,
        max=100.0,
        step=0.1,
        round=0.01,
        tooltip="Guidance scale: the one that the context was inverted with. 3.5 as published.",
    )


def _every_input() -> Any:
    return advanced(
        io.Int.Input(
            "guide_every",
            default=1,
            min=1,
            max=8,
            optional=True,
            tooltip="Make the energy's gradient in every n-th step only; the steps between take the last one again. 2 "
            "costs about half the extra time.",
        )
    )


def _run_inputs() -> list[Any]:
    return [
        checkpointing_input(),
        advanced(
            io.Boolean.Input(
                "allow_other_model",
                default=False,
                optional=True,
                tooltip="Take inversions made with another checkpoint of the same architecture.",
            )
        ),
    ]


class SemantixEnergy(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStyleSemantixEnergy",
            display_name="Semantix Energy (Semantic Style)",
            category=CATEGORY,
            description="What Semantix pulls a picture towards: each position to the look of its semantic match in the "
            "reference, without leaving the context's shapes and meaning. For the Energy Guider.",
            search_aliases=["style transfer", "guidance", "semantix"],
            inputs=[
                *_inversion_inputs(),
                *_weight_inputs(),
                *_range_inputs(optional=False),
                _map_input(),
                _reference_prompt_input(),
                io.Conditioning.Input(
                    "context_prompt",
                    optional=True,
                    tooltip="The context's prompt. Not connected: the guider's positive. Needs as many tokens as that.",
                ),
                *_where_inputs(
                    "Acts in this part of the context only, softly where the mask is grey. Combine Energies adds "
                    "several references, each with its part. Outside nothing is pulled, yet the sampler may change "
                    "it; a latent noise mask holds it."
                ),
            ],
            outputs=[EnergySocket.Output(display_name="energy", tooltip="For Energy Guider or Combine Energies.")],
        )

    @classmethod
    def execute(
        cls,
        context: Inversion,
        reference: Inversion,
        weights: str,
        style_weight: float,
        spatial_weight: float,
        semantic_weight: float,
        position_weight: float,
        start_percent: float,
        end_percent: float,
        semantic_map: SemanticMap | None = None,
        reference_prompt: list | None = None,
        context_prompt: list | None = None,
        content_mask: torch.Tensor | None = None,
        style_mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        chosen = _chosen(weights, style_weight, spatial_weight, semantic_weight, position_weight)
        energy = make_energy(
            context,
            reference,
            chosen,
            start_percent,
            end_percent,
            semantic_map,
            reference_prompt,
            context_prompt,
            Where.of(context, reference, content_mask, style_mask),
        )
        return io.NodeOutput(energy)


class CombineEnergies(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStyleCombineEnergies",
            display_name="Combine Energies (Semantic Style)",
            category=CATEGORY,
            description="Adds energies: the picture follows all of them, each with its own weights and range.",
            search_aliases=["add", "sum", "semantix"],
            inputs=[
                EnergySocket.Input("a", tooltip="An energy."),
                EnergySocket.Input("b", tooltip="Another one, for example of a second reference."),
                EnergySocket.Input("c", optional=True, tooltip="A third one."),
            ],
            outputs=[EnergySocket.Output(display_name="energy", tooltip="The sum.")],
        )

    @classmethod
    def execute(cls, a: Energy, b: Energy, c: Energy | None = None) -> io.NodeOutput:
        return io.NodeOutput(functools.reduce(operator.add, [a, b] if c is None else [a, b, c]))


class Guider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStyleEnergyGuider",
            display_name="Energy Guider (Semantic Style)",
            category=CATEGORY,
            description="CFG and an energy as the GUIDER of SamplerCustomAdvanced, for any sampler and scheduler, or "
            "for the outputs of Replay Inversion.",
            search_aliases=["guider", "guidance", "semantix"],
            inputs=[
                *_model_inputs(),
                _cfg_input(),
                EnergySocket.Input("energy", tooltip="From Semantix Energy or Combine Energies."),
                *_run_inputs(),
                _every_input(),
            ],
            outputs=[io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        cfg: float,
        energy: Energy,
        checkpointing: bool = False,
        allow_other_model: bool = False,
        guide_every: int = 1,
    ) -> io.NodeOutput:
        return io.NodeOutput(
            EnergyGuider(
                model,
                positive,
                negative,
                cfg,
                energy,
                checkpointing=checkpointing,
                allow_other_model=allow_other_model,
                every=guide_every,
            )
        )


class KSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStyleKSampler",
            display_name="Semantix Style Transfer Sampler (Semantic Style)",
            category=CATEGORY,
            description="Restyles the context like the reference, each thing like its counterpart, on any SD1.x, SD2.x "
            "or SDXL checkpoint without training (Semantix). Everything in one node, with the published settings.",
            search_aliases=["ksampler", "style transfer", "semantix"],
            inputs=[
                *_model_inputs(),
                *_inversion_inputs(),
                _cfg_input(),
                *_weight_inputs(),
                adain_start_input(),
                _map_input(),
                _reference_prompt_input(),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Latent noise mask: only this part is restyled, the rest of the latent comes back exactly. "
                    "content_mask says what is drawn to the style and holds nothing.",
                ),
                io.Int.Input(
                    "skip",
                    default=0,
                    min=0,
                    max=9999,
                    optional=True,
                    tooltip="Noisy steps to leave out. More keeps more of the context and is faster.",
                ),
                *_range_inputs(optional=True),
                io.Boolean.Input(
                    "exact",
                    default=True,
                    optional=True,
                    tooltip="Add what the inversion's last prediction lacked: with all weights 0 and without AdaIN "
                    "the context comes back exactly. Off as in the paper.",
                ),
                *_run_inputs(),
                io.Float.Input(
                    "adain_strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="How much of the reference's colours AdaIN brings in, by all its steps together. 1 as "
                    "published, 0 switches it off.",
                ),
                *_where_inputs(
                    "Energy and AdaIN act in this part of the context only, softly where the mask is grey; the rest is "
                    "made without them and may change a little. mask holds the rest exactly; both can be used."
                ),
                _every_input(),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The restyled context; decode it with VAE Decode."),
                io.Image.Output(
                    display_name="plot",
                    tooltip="Energies, size of the gradient and its clamped share by step: whether a term did "
                    "something.",
                ),
                io.String.Output(
                    display_name="report", tooltip="What was done in words, and why if it changed nothing."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        context: Inversion,
        reference: Inversion,
        cfg: float,
        weights: str,
        style_weight: float,
        spatial_weight: float,
        semantic_weight: float,
        position_weight: float,
        adain_start: float = PUBLISHED_START,
        semantic_map: SemanticMap | None = None,
        reference_prompt: list | None = None,
        mask: torch.Tensor | None = None,
        skip: int = 0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        exact: bool = True,
        checkpointing: bool = False,
        allow_other_model: bool = False,
        adain_strength: float = 1.0,
        content_mask: torch.Tensor | None = None,
        style_mask: torch.Tensor | None = None,
        guide_every: int = 1,
    ) -> io.NodeOutput:
        chosen = _chosen(weights, style_weight, spatial_weight, semantic_weight, position_weight)
        context.check_replay(skip)
        where = Where.of(context, reference, content_mask, style_mask)
        energy = make_energy(
            context, reference, chosen, start_percent, end_percent, semantic_map, reference_prompt, where=where
        )
        options: dict[str, Any] = {"checkpointing": checkpointing, "allow_other_model": allow_other_model}
        options["every"] = guide_every
        reports: list[GuidanceReport] = []
        guider = EnergyGuider(model, positive, negative, cfg, energy, **options, listen=reports.append)
        adains: tuple[StepAdaIN, ...] = ()
        if adain_start != 1.0 and adain_strength != 0.0:
            parts = where.content, where.style
            adains = (StepAdaIN(reference, context.schedule_steps, adain_start, semantic_map, adain_strength, *parts),)
        sampler = ReplaySampler(context, skip, exact, allow_other_model, adains)
        samples = sample(guider, sampler, mask)
        (run,) = reports

        def draw() -> torch.Tensor:
            return report_plot(run.table(), why_nothing(run, energy))

        def tell() -> str:
            return describe(guider, sampler, chosen, {"positive": positive, "negative": negative}, samples, run)

        plot, no_plot = attempt("The plot", draw, torch.zeros(1, HEIGHT, WIDTH, 3))
        report, no_report = attempt("The report", tell, "")
        told = "\n".join(filter(None, (report, no_plot, no_report)))
        return io.NodeOutput({"samples": samples}, plot, told, ui=ui.PreviewText(told))


NODES: list[type[io.ComfyNode]] = [SemantixEnergy, CombineEnergies, Guider, KSampler]
