"""A mask of a picture's subject from the diffusion model's own features."""

import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from comfy_api.latest import io, ui

from ..host.find_subject import LOOKS, SIGMA, SubjectRequest, find_subjects, pixel_size
from ..host.models import identify, why_unchecked
from ..pictures.overlay import overlay_subject
from ..regions.crops import encoded_size, in_picture
from ..regions.masks import grow as grown
from ..regions.saliency import THRESHOLD, Saliency
from ..samplers.inversion import Inversion
from .late import attempt
from .nodes_inversion import MAX_SEED
from .schema import advanced, schema
from .types import Inversion as InversionSocket

CATEGORY = "semantic_style/spin"
MODES = ("hard", "soft")
MAX_GROW = 256
# More than this is hardly a subject.
NEARLY_ALL = 0.6


class FindSubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStyleSaliency",
            display_name="Find Subject (Semantic Style)",
            category=CATEGORY,
            description="A mask of the thing that a picture shows, from what the diffusion model itself sees in it. "
            "Name the thing (class_word, with clip): without a word it works for one thing before a plain background "
            "only. Look at the preview; draw the mask yourself where it is wrong.",
            search_aliases=["saliency", "segmentation", "subject mask", "spin", "cross attention", "daam"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="SD1.x, SD2.x, SDXL or Paperland. Attention patches on it are left aside."
                ),
                io.Float.Input(
                    "sigma",
                    default=SIGMA,
                    min=0.01,
                    max=100.0,
                    step=0.01,
                    round=0.001,
                    tooltip="Noise level at which the picture is looked at. Lower sees colours and small shapes, "
                    "higher what things are.",
                ),
                io.Float.Input(
                    "threshold",
                    default=THRESHOLD,
                    min=-0.5,
                    max=0.95,
                    step=0.05,
                    round=0.001,
                    tooltip="Higher makes the subject smaller and purer; lower takes in more of what it consists of. "
                    "With a class word: the share of the attention's peak from which a position belongs to it. "
                    "Without: how alike two positions must be to count as one thing.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=MODES[0],
                    tooltip="hard: white or black. soft: grey where it is less clear whether a position belongs to the "
                    "subject.",
                ),
                io.Int.Input(
                    "grow",
                    default=0,
                    min=-MAX_GROW,
                    max=MAX_GROW,
                    tooltip="Pixels by which the mask is made larger, or smaller below 0. The model sees a little of a "
                    "thing beside it, so masks tend to be too wide.",
                ),
                io.Int.Input(
                    "looks",
                    default=LOOKS,
                    min=1,
                    max=64,
                    tooltip="How often the picture is looked at, each time with other noise. More is steadier; each is "
                    "one model call, with a class word four.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED - 64,
                    control_after_generate=False,
                    tooltip="Of the noise. Try another where the wrong thing is found.",
                ),
                io.Latent.Input(
                    "latent", optional=True, tooltip="The picture, encoded. Or connect an inversion; one of the two."
                ),
                InversionSocket.Input(
                    "inversion", optional=True, tooltip="The picture's inversion, in place of its latent."
                ),
                io.Conditioning.Input(
                    "prompt",
                    optional=True,
                    tooltip="Prompt to look with; the empty one is a good choice. Needed for a latent without a class "
                    "word; an inversion brings the one that it was made with. What to find says class_word, not this.",
                ),
                io.Image.Input(
                    "image", optional=True, tooltip="The picture itself: the mask gets its size, the preview shows it."
                ),
                advanced(
                    io.Boolean.Input(
                        "allow_other_model",
                        default=False,
                        optional=True,
                        tooltip="Allow an inversion of another checkpoint of the same architecture.",
                    )
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder that belongs to the model: needed for a class word.",
                ),
                io.String.Input(
                    "class_word",
                    default="",
                    optional=True,
                    tooltip="What the subject is, in a word or a few: house, red vase. It is then where the model's "
                    "attention for that word is. Empty: what stands out of the background by itself.",
                ),
            ],
            outputs=[
                io.Mask.Output(
                    display_name="mask",
                    tooltip="The subject, one mask for each picture; an empty one where nothing was found.",
                ),
                io.Image.Output(display_name="preview", tooltip="The picture with what is not subject darkened."),
                io.String.Output(
                    display_name="report", tooltip="How large the subject is, how much of the border it has, warnings."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        sigma: float,
        threshold: float,
        mode: str,
        grow: int,
        looks: int,
        seed: int,
        latent: dict | None = None,
        inversion: Inversion | None = None,
        prompt: list | None = None,
        image: torch.Tensor | None = None,
        allow_other_model: bool = False,
        clip=None,
        class_word: str = "",
    ) -> io.NodeOutput:
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; choose one of {', '.join(MODES)}")
        if abs(grow) > MAX_GROW:
            raise ValueError(f"grow must be from -{MAX_GROW} to {MAX_GROW} pixels, got {grow}")
        if (latent is None) == (inversion is None):
            raise ValueError(
                "connect the picture as latent or as inversion: "
                + ("neither is connected" if latent is None else "both are, remove one")
            )
        reference = inversion if latent is None else latent["samples"]
        assert reference is not None
        _check_image(image, reference)
        subjects = find_subjects(
            SubjectRequest(model, reference, prompt, sigma, looks, seed, threshold, allow_other_model, clip, class_word)
        )
        size = pixel_size(model, reference) if image is None else tuple(image.shape[1:3])
        found = [one if isinstance(one, str) else _pixels(one, mode, size, grow) for one in subjects]
        _check_any(found)
        mask = torch.stack([torch.zeros(size) if isinstance(one, str) else one.mask for one in found])
        report = _report(found)
        if inversion is not None and (note := why_unchecked(inversion.model, identify(model), allow_other_model)):
            report += f"\n{note}"
        plain = mask[..., None].expand(-1, -1, -1, 3)
        preview, no_preview = attempt("The preview", lambda: overlay_subject(mask, image), plain)
        shown, not_shown = attempt("Showing the preview", lambda: ui.PreviewImage(preview, cls=cls), None)
        report = "\n".join(filter(None, (report, no_preview, not_shown)))
        return io.NodeOutput(mask, preview, report, ui=shown)


def _check_image(image: torch.Tensor | None, reference) -> None:
    if image is None:
        return
    clean = reference.clean if isinstance(reference, Inversion) else reference
    if len(image) not in (1, len(clean)):
        raise ValueError(
            f"the image is a batch of {len(image)} pictures and the reference holds {len(clean)}: connect those that "
            "were encoded"
        )
    (h, w), (latent_h, latent_w) = image.shape[1:3], clean.shape[-2:]
    if abs(h * latent_w / (w * latent_h) - 1) > 0.1:
        raise ValueError(
            f"the image is {w}x{h} but the reference {latent_w}x{latent_h} positions: they do not show the "
            f"same; connect "
            "the picture that was encoded"
        )


@dataclass(frozen=True, eq=False)
class _Found:
    """A subject and its mask [H, W]."""

    subject: Saliency
    mask: torch.Tensor


def _pixels(subject: Saliency, mode: str, size: tuple[int, int], grow: int) -> _Found | str:
    """The mask of a picture of this size; why there is none where nothing is left of it."""
    positions = subject.hard.float() if mode == "hard" else subject.soft
    # A picture is encoded without what its sides have beyond whole positions.
    part = encoded_size(size, (positions.shape[0], positions.shape[1]))
    mask = in_picture(F.interpolate(positions[None, None], size=part, mode="bilinear")[0], size)[None]
    if mode == "hard":
        mask = (mask > 0.5).float()
    mask = grown(mask[0], grow)
    if not mask.any():
        return (
            f"nothing is left of the subject, which covers {subject.area:.1%} of the picture: set grow ({grow}) nearer "
            "to 0, or lower the threshold"
        )
    return _Found(subject, mask[0])


def _check_any(found: list[_Found | str]) -> None:
    """Raise ValueError unless one of the pictures has a subject."""
    reasons = [one for one in found if isinstance(one, str)]
    if len(reasons) == len(found):
        which = f"in none of the {len(found)} pictures a subject was found; in the first, " if len(found) > 1 else ""
        raise ValueError(which + reasons[0])


def _report(found: list[_Found | str]) -> str:
    lines = []
    for i, one in enumerate(found, 1):
        which = f"Picture {i}: " if len(found) > 1 else ""
        if isinstance(one, str):
            warning = f"{which}no subject, its mask is empty: {one}."
            logging.warning("Find Subject: %s", warning)
            lines.append(warning)
            continue
        subject, area = one.subject, one.mask.mean().item()
        how = f"{subject.cuts} cut{'s' if subject.cuts > 1 else ''}" if subject.cuts else "found by the class word"
        lines.append(
            f"{which}the subject covers {area:.1%} of the picture and {subject.contact:.1%} of its border; {how}."
        )
        note = ""
        if subject.touching:
            note = "no compact part of the picture stands free of its border, this is the nearest to one"
        elif area > NEARLY_ALL:
            note = "the subject is nearly the whole picture"
        if note:
            warning = f"{which}{note}: try another threshold or sigma, or draw the mask."
            logging.warning("Find Subject: %s", warning)
            lines.append(warning[0].upper() + warning[1:])
    return "\n".join(lines)


NODES: list[type[io.ComfyNode]] = [FindSubject]
