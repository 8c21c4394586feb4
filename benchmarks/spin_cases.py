"""Spin (semantic image painting with independent information injection, Wu et al., AAAI 2025) on Paperland without
ComfyUI: cases whose answer is known, the painting itself, and what is measured on it.

A case takes a thing of a reference scene (the subject) and a background scene with a hole for a thing of that kind (the
mask). Both are drawn, so the picture in which the background has its thing painted as the reference's is known too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..attention.injection_patch import Injection
from ..paperland import model as paperland
from ..paperland import scenes
from ..paperland.model import Paperland
from ..paperland.scenes import HOUSE, MOUNTAIN, ROOF, SUN, TREE, Layouts, Scenes, Styles
from ..paperland.text import IT
from ..paperland.unet import attention
from ..regions.masks import keep_outside, mask_on_grid
from ..samplers.ddpm_inversion import ddpm_inversion
from ..samplers.spin_energy import SpinStyleTerm
from ..samplers.terms import Energy, Stream
from ..samplers.word_learning import Learned, Settings, learn
from . import measure
from .guided import EnergyGuided
from .solver import dpm_solver_2m

# What can be painted in, with the regions that it consists of.
KINDS = {"sun": (SUN,), "mountain": (MOUNTAIN,), "tree": (TREE,), "house": (HOUSE, ROOF)}
SEEDS_APART = 10_000
# Pixels of a mask or subject that are enough to see and to measure something in, at 128x128.
FEWEST = 350


@dataclass(frozen=True)
class Case:
    """A subject of a reference for a mask in a background, batch 1.

    Attributes:
        kind: a key of `KINDS`.
        reference: the scene that the subject is of; subject: [1, H, W], where it is.
        background: the scene without its thing; mask: [1, H, W], where that would be.
        ideal: [1, H, W, 3], the background with its thing in the look of the reference's.
    """

    kind: str
    reference: Scenes
    subject: Tensor
    background: Scenes
    mask: Tensor
    ideal: Tensor


def case(kind: str, seed: int) -> Case:
    """The case of a kind that a seed names; seeds whose things are too small or hidden lead on to the next.

    Raises:
        ValueError: a kind that is not known.
    """
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r}; choose one of {', '.join(KINDS)}")
    while True:
        found = _case(kind, seed)
        if min(float(found.subject.sum()), float(found.mask.sum())) >= FEWEST:
            return found
        seed += SEEDS_APART * 10


def _case(kind: str, seed: int) -> Case:
    layouts = [scenes.sample_layouts(1, scenes.seeded(seed + i * SEEDS_APART)) for i in range(2)]
    styles = [scenes.sample_styles(1, scenes.seeded(seed + i * SEEDS_APART)) for i in (2, 3)]
    alone, bare = _only(layouts[0], kind), _shown(layouts[1], kind, False)
    reference = scenes.draw(alone, styles[0])
    background = scenes.draw(bare, styles[1])
    whole = scenes.draw(_shown(layouts[1], kind, True), _taking(styles[1], styles[0], KINDS[kind]))
    subject = torch.isin(reference.labels, torch.tensor(KINDS[kind])).float()
    mask = (whole.labels != background.labels).float()
    # Only there: the background may have other trees.
    ideal = torch.lerp(background.images, whole.images, mask[..., None])
    return Case(kind, reference, subject, background, mask, ideal)


def _shown(layouts: Layouts, kind: str, shown: bool) -> Layouts:
    """The layout with or without its thing of a kind; of trees the first one."""
    name = f"has_{kind}"
    present = getattr(layouts, name).clone()
    present[..., :1] = shown
    return replace(layouts, **{name: present})


def _only(layouts: Layouts, kind: str) -> Layouts:
    """The layout with one thing on sky and hill."""
    nothing = {f.name: torch.zeros_like(getattr(layouts, f.name)) for f in fields(layouts) if f.name.startswith("has_")}
    return _shown(replace(layouts, **nothing), kind, True)


def _taking(styles: Styles, other: Styles, regions: Sequence[int]) -> Styles:
    """The styles with some regions painted as in the other."""
    taken = {}
    for f in fields(styles):
        values = getattr(styles, f.name).clone()
        values[:, list(regions)] = getattr(other, f.name)[:, list(regions)]
        taken[f.name] = values
    return Styles(**taken)


def learn_subject(
    model: Paperland, image: Tensor, saliency: Tensor | None, word: str, tokens: int, settings: Settings
) -> Learned:
    """A pseudo-word for the subject of an image [1, H, W, 3], started from a class word; see `samplers.embedding`.

    Args:
        saliency: [1, H, W] in 0..1, None for the whole picture.
    """
    clean = paperland.encode_pixels(image)
    size = clean.shape[2], clean.shape[3]
    weight = torch.ones(1, *size) if saliency is None else mask_on_grid(saliency, size)
    start = model.text.words(word).detach()
    start = start[torch.arange(tokens) % len(start)]
    prompt = model.text.prompt(IT, word)
    return learn(
        lambda x, sigma, context: model(x, sigma, context.expand(len(x), -1, -1)),
        lambda vectors: model.text([prompt], {IT: vectors["text"]}),
        {"text": start},
        clean,
        weight,
        model.sigmas,
        settings,
    )


class Inpainting:
    """A denoiser that changes a picture inside a mask only, as the host's latent noise mask does.

    Args:
        model: `model(x, sigma) -> denoised`.
        clean: [B, C, h, w], the latent that stays outside.
        noise: like it, what the outside is noised with.
        mask: [B or 1, h, w], 1 where the picture is made.
    """

    def __init__(self, model: Any, clean: Tensor, noise: Tensor, mask: Tensor) -> None:
        self.model, self.clean, self.noise, self.mask = model, clean, noise, mask[:, None].to(clean)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        outside = self.clean + sigma.view(-1, 1, 1, 1) * self.noise
        denoised = self.model(torch.lerp(outside, x, self.mask), sigma)
        return torch.lerp(self.clean, denoised, self.mask)


@dataclass(frozen=True)
class Painting:
    """How to paint.

    Attributes:
        steps, cfg: of the sampling, on the host's "normal" schedule.
        style: weight of the style energy, 0 for none.
        start, end: the part of the run in which it acts.
        everywhere: the reference's tokens go to the whole picture and not to the mask only.
        free: nothing holds the background, the whole picture is made anew.
    """

    steps: int = 20
    cfg: float = 3.5
    style: float = 0.0
    start: float = 0.0
    end: float = 1.0
    everywhere: bool = False
    free: bool = False


def paint(
    model: Paperland, cases: Sequence[Case], tokens: Tensor | None, painting: Painting, seeds: Sequence[int]
) -> Tensor:
    """The backgrounds with something painted into their masks, [B, H, W, 3] in 0..1.

    Args:
        cases: B of one size.
        tokens: [B, T, C] what the insides attend to, of `model.text`; None: the backgrounds' captions, as plain
            inpainting does.
        seeds: of the noise, one for each case.
    """
    images = torch.cat([c.background.images for c in cases])
    masks = torch.cat([c.mask for c in cases])
    positive, negative = model.text([c.background.captions[0] for c in cases]), model.text([""])
    clean = paperland.encode_pixels(images)
    noise = torch.cat([torch.randn(clean[:1].shape, generator=scenes.seeded(s)) for s in seeds])
    sigmas = paperland.sigmas_normal(painting.steps)
    # A place of the latent is made anew where the mask touches it; the pixels around it are put back below.
    touched = (mask_on_grid(masks, (clean.shape[2], clean.shape[3])) > 0).float()
    options = None
    if tokens is not None:
        region = torch.ones_like(masks) if painting.everywhere else masks
        options = Injection(model.unet, tokens, region, attention).options()
    if painting.style:
        levels = ddpm_inversion(lambda x, sigma: x, clean, sigmas, noise=noise.expand(painting.steps, *noise.shape))
        term = SpinStyleTerm(Stream(levels), painting.style, painting.start, painting.end, mask=touched)
        guided: Any = EnergyGuided(model, positive, negative, painting.cfg, Energy((term,)), sigmas, options=options)
    else:
        guided = model.guided(positive, negative, painting.cfg, options)
    x = noise * (1 + sigmas[0] ** 2).sqrt()
    if painting.free:
        return paperland.decode_pixels(dpm_solver_2m(guided, x, sigmas))
    out = dpm_solver_2m(Inpainting(guided, clean, noise, touched), x, sigmas)
    return keep_outside(paperland.decode_pixels(out), images, masks)


@dataclass(frozen=True)
class Figures:
    """What is measured of painted pictures, [B] each.

    Attributes:
        color, texture: distance of the inside to the reference's subject: OKLab units, and 0..1.
        identity: both in units of two unrelated things' distance, so 1 is unrelated and 0 the same.
        background: the same distance to the background's outside: how much the inside looks like what is around it.
        seam: contrast across the mask's edge, in units of the contrast across the ideal's edge there.
        outside: largest difference of a pixel outside the mask to the background's, 0..1.
    """

    color: Tensor
    texture: Tensor
    identity: Tensor
    background: Tensor
    seam: Tensor
    outside: Tensor


def measured(images: Tensor, cases: Sequence[Case]) -> Figures:
    """Figures of pictures [B, H, W, 3] painted for B cases."""
    masks = torch.cat([c.mask for c in cases])
    inside, ideal = masks.long(), torch.cat([c.ideal for c in cases])
    references, subjects = torch.cat([c.reference.images for c in cases]), torch.cat([c.subject for c in cases])
    backgrounds = torch.cat([c.background.images for c in cases])
    to_subject = measure.style_distance(images, inside, references, subjects.long(), 2)
    to_outside = measure.style_distance(images, inside, backgrounds, 1 - inside, 2)
    difference = (images - backgrounds).abs().amax(dim=-1) * (1 - masks)
    return Figures(
        to_subject.color[:, 1],
        to_subject.texture[:, 1],
        to_subject.both[:, 1],
        to_outside.both[:, 1],
        edge_contrast(images, masks) / edge_contrast(ideal, masks).clamp_min(1e-3),
        difference.amax(dim=(1, 2)),
    )


def distance_to_surroundings(images: Tensor, cases: Sequence[Case]) -> Tensor:
    """Distance [B], as `Figures.identity`, of the insides to what is around the subject in the reference."""
    masks, subjects = (torch.cat([getattr(c, name) for c in cases]).long() for name in ("mask", "subject"))
    references = torch.cat([c.reference.images for c in cases])
    return measure.style_distance(images, masks, references, 1 - subjects, 2).both[:, 1]


def distance_outside(images: Tensor, cases: Sequence[Case]) -> Tensor:
    """Distance [B], as `Figures.identity`, of what is outside the masks to the backgrounds there."""
    outside = 1 - torch.cat([c.mask for c in cases]).long()
    backgrounds = torch.cat([c.background.images for c in cases])
    return measure.style_distance(images, outside, backgrounds, outside, 2).both[:, 1]


def edge_contrast(images: Tensor, masks: Tensor) -> Tensor:
    """Mean difference in OKLab, [B], between neighbouring pixels of which one lies in the mask [B, H, W]."""
    lab = measure.oklab(images)
    total, count = 0.0, 0.0
    for axis in (1, 2):
        across = masks.diff(dim=axis) != 0
        total = total + (lab.diff(dim=axis).norm(dim=-1) * across).sum(dim=(1, 2))
        count = count + across.sum(dim=(1, 2))
    return torch.as_tensor(total) / torch.as_tensor(count).clamp_min(1)


def diversity(images: Tensor, masks: Tensor) -> Tensor:
    """Mean difference in OKLab inside the masks [B, H, W] between pictures [S, B, H, W, 3] of S seeds, [B]."""
    lab = measure.oklab(images)
    apart = (lab[:, None] - lab[None]).norm(dim=-1)
    inside = (apart * masks).sum(dim=(-2, -1)) / masks.sum(dim=(-2, -1)).clamp_min(1)
    seeds = len(images)
    return inside.sum(dim=(0, 1)) / (seeds * (seeds - 1))
