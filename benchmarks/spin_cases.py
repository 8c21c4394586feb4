"""Spin (semantic image painting with independent information injection, Wu et al., AAAI 2025) on Paperland: cases whose
answer is known, and what is measured on pictures painted for them.

A case takes a thing of a reference scene (the subject) and a background scene with a hole for a thing of that kind (the
mask). Both are drawn, so the picture in which the background has its thing painted as the reference's is known too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..paperland import scenes
from ..paperland.scenes import HOUSE, MOUNTAIN, ROOF, SUN, TREE, Layouts, Scenes, Styles
from . import measure

# What can be painted in, with the regions that it consists of.
KINDS = {"sun": (SUN,), "mountain": (MOUNTAIN,), "tree": (TREE,), "house": (HOUSE, ROOF)}
FIRST_SEED = 1_334_567_890  # training draws from seeds far below
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


def case_of(number: int) -> Case:
    """The case of a number; kinds take turns."""
    return case(tuple(KINDS)[number % len(KINDS)], FIRST_SEED + number)


def true_phrases(c: Case) -> str:
    """What the reference's own caption says of the subject: colours and texture by name."""
    parts = ("house", "roof") if c.kind == "house" else (c.kind,)
    return ", ".join(p for p in c.reference.captions[0].split(", ") if p.endswith(parts))


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


@dataclass(frozen=True)
class Figures:
    """What is measured of painted pictures, [B] each.

    Attributes:
        color, texture: distance of the inside to the reference's subject: OKLab units, and 0..1.
        identity: both in units of two unrelated things' distance, so 1 is unrelated and 0 the same.
        background: the same distance to the background's outside: how much the inside looks like what is around it.
        seam: contrast across the mask's edge, in units of the contrast across the ideal's edge there.
        outside: largest difference of a pixel outside the mask, not on its soft rim, to the background's, 0..1.
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
    inside, outside = masks.long(), (masks == 0).long()  # what lies on a soft rim is neither
    ideal = torch.cat([c.ideal for c in cases])
    references, subjects = torch.cat([c.reference.images for c in cases]), torch.cat([c.subject for c in cases])
    backgrounds = torch.cat([c.background.images for c in cases])
    to_subject = measure.style_distance(images, inside, references, subjects.long(), 2)
    to_outside = measure.style_distance(images, inside, backgrounds, outside, 2)
    difference = (images - backgrounds).abs().amax(dim=-1) * outside
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
    outside = (torch.cat([c.mask for c in cases]) == 0).long()
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
