"""Spin: a reference's subject into a masked region of a background (injection, style energy, kept pixels)."""

from comfy_api.latest import io, ui

from ..host.apply_spin import apply_spin, left_out, spin_energy
from ..regions.masks import keep_outside
from ..samplers.inversion import Inversion
from ..samplers.spin_energy import DEFAULT_WEIGHT
from .schema import schema
from .types import Energy as EnergySocket
from .types import Inversion as InversionSocket

CATEGORY = "semantic_style/spin"


def _percent(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, round=0.001, tooltip=tooltip)


class ApplySpin(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStyleApplySpin",
            display_name="Apply Spin (Semantic Style)",
            category=CATEGORY,
            description="Puts what the reference's prompt says inside the mask and keeps to the background's prompt "
            "outside, in every cross-attention layer, at the cost of one model call (Spin). Works under any sampler.",
            search_aliases=["insert object", "regional prompt", "attention couple", "semantic painting", "spin"],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.x, SD2.x or SDXL model. LoRAs and IPAdapter are fine."),
                # In the position of the output that it goes on to: that is what a bypassed node hands on.
                io.Conditioning.Input(
                    "background", tooltip="The background's prompt. It goes on to the sampler's positive as it is."
                ),
                io.Conditioning.Input(
                    "reference",
                    tooltip="What belongs inside the mask: Spin Embedding's, or any prompt, also one that has the "
                    "embedding in it ('a red embedding:spin'). Its tokens are taken; SDXL's pooled part stays the "
                    "background's.",
                ),
                io.Mask.Input(
                    "mask",
                    tooltip="Where the subject goes, white, in a picture of the size that is made; one mask, or one "
                    "for each picture of the batch.",
                ),
                _percent(
                    "strength",
                    1.0,
                    "How much the reference counts inside: 1 is all, lower mixes the background's prompt in.",
                ),
                _percent("start_percent", 0.0, "Where it begins to act: 0 is the noisiest level."),
                _percent(
                    "end_percent",
                    1.0,
                    "Where it ends to act. Below 1 the background's prompt has the last word, inside as well.",
                ),
                io.Int.Input(
                    "soft_edge",
                    default=0,
                    min=0,
                    max=512,
                    tooltip="Pixels of the mask over which the reference fades in, inside the mask. Higher: a softer "
                    "passage and a smaller subject.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For any sampler, at the mask's proportions."),
                io.Conditioning.Output(display_name="positive", tooltip="The background's prompt, for the sampler."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        reference: list,
        background: list,
        mask,
        strength: float,
        start_percent: float,
        end_percent: float,
        soft_edge: int,
    ) -> io.NodeOutput:
        patched = apply_spin(model, reference, mask, strength, start_percent, end_percent, soft_edge)
        return io.NodeOutput(patched, background)


class SpinStyleEnergy(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStyleSpinStyleEnergy",
            display_name="Spin Style Energy (Semantic Style)",
            category=CATEGORY,
            description="Pulls the look of what is inside the mask towards the background around it, so that an "
            "inserted thing fits in. For the Energy Guider, alone or combined with others.",
            search_aliases=["harmonize", "blend in", "style guidance", "spin"],
            inputs=[
                InversionSocket.Input(
                    "background",
                    tooltip="The background, inverted with the same model; the picture being made must have its size.",
                ),
                io.Mask.Input(
                    "mask",
                    tooltip="The mask of Apply Spin, white inside. Not all white; frames of black are left out.",
                ),
                io.Float.Input(
                    "weight",
                    default=DEFAULT_WEIGHT,
                    min=0.0,
                    max=1000.0,
                    step=0.05,
                    tooltip="How strongly the inside is pulled to the background's colours and textures. 0 switches "
                    "it off; too much washes the subject out.",
                ),
                _percent("start_percent", 0.0, "Where it begins to act: 0 is the noisiest level."),
                _percent(
                    "end_percent", 1.0, "Where it ends to act. Below 1 the subject's own details have the last word."
                ),
                io.Conditioning.Input(
                    "background_prompt",
                    optional=True,
                    tooltip="The background's prompt. Not connected: the one it was inverted with.",
                ),
            ],
            outputs=[
                EnergySocket.Output(display_name="energy", tooltip="For Energy Guider or Combine Energies."),
                io.String.Output(display_name="report", tooltip="Which frames are left out: those with an empty mask."),
            ],
        )

    @classmethod
    def execute(
        cls,
        background: Inversion,
        mask,
        weight: float,
        start_percent: float,
        end_percent: float,
        background_prompt: list | None = None,
    ) -> io.NodeOutput:
        energy = spin_energy(background, mask, weight, start_percent, end_percent, background_prompt)
        report = left_out(energy)
        return io.NodeOutput(energy, report, ui=ui.PreviewText(report) if report else None)


class KeepBackground(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStyleKeepBackground",
            display_name="Keep Background (Semantic Style)",
            category=CATEGORY,
            description="Pastes the original back outside the mask: there every pixel is the original's, exactly.",
            search_aliases=["paste", "composite", "inpaint stitch", "spin"],
            inputs=[
                io.Image.Input("image", tooltip="The picture that was made."),
                io.Image.Input(
                    "original",
                    tooltip="The background's own picture, of that size or from before VAE Encode cropped it.",
                ),
                io.Mask.Input(
                    "mask", tooltip="Where the new picture shows, white. Of the original's size; another is stretched."
                ),
                io.Int.Input(
                    "feather",
                    default=0,
                    min=0,
                    max=512,
                    tooltip="Pixels over which the new picture fades in, inside the mask only. Higher hides the seam "
                    "better and takes more of the subject's border away.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The new picture inside, the original outside.")],
        )

    @classmethod
    def execute(cls, image, original, mask, feather: int) -> io.NodeOutput:
        return io.NodeOutput(keep_outside(image, original, mask, feather))


NODES: list[type[io.ComfyNode]] = [ApplySpin, SpinStyleEnergy, KeepBackground]
