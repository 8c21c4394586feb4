"""Pairs of Paperland scenes whose ideal restyling is known, and what a restyled picture is worth on them."""

from dataclasses import dataclass

from torch import Tensor

from ..paperland import scenes
from ..paperland.scenes import Scenes
from . import measure

FIRST_SEED = 1_234_567_890  # training draws from seeds far below
SEEDS_APART = 10_000
FIGURES = {
    "color": "colour distance",
    "texture": "texture distance",
    "style": "style taken over",
    "style_regions": "the same, regions alike",
    "areas": "areas read off",
    "borders": "borders told apart",
    "structure": "structure kept",
    "score": "score",
}


@dataclass(frozen=True)
class Pair:
    """A context, a reference and the ideal (the context's layout in the reference's style), one scene each."""

    context: Scenes
    reference: Scenes
    ideal: Scenes


def pair_of(number: int) -> Pair:
    """The pair that a number names."""

    def drawn(layout: int, style: int) -> Scenes:
        seed = FIRST_SEED + number
        return scenes.scene(seed + layout * SEEDS_APART, seed + style * SEEDS_APART)

    return Pair(drawn(0, 1), drawn(2, 3), drawn(0, 3))


def only_regions(caption: str) -> str:
    """A caption without its colours and textures: what is there, not what it looks like."""
    return ", ".join(phrase.rsplit(" ", 1)[-1] for phrase in caption.split(", "))


class Judge:
    """Measures pictures made for a pair."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.untouched, self.best = self._distance(pair.context.images), self._distance(pair.ideal.images)

    def _distance(self, image: Tensor) -> measure.StyleDistance:
        context, reference = self.pair.context, self.pair.reference
        return measure.style_distance(image, context.labels, reference.images, reference.labels)

    def __call__(self, image: Tensor) -> dict[str, float]:
        """Every figure of `FIGURES` for a picture [1, H, W, 3]."""
        d, far, near = self._distance(image), self.untouched, self.best
        kept = measure.structure(image, self.pair.context.images, self.pair.context.labels)
        style = measure.style_score(*(s.by_area(s.both) for s in (d, far, near)))
        figures = {
            "color": d.by_area(d.color),
            "texture": d.by_area(d.texture),
            "style": style,
            "style_regions": measure.style_score(*(s.by_region(s.both) for s in (d, far, near))),
            "areas": kept.areas,
            "borders": kept.borders,
            "structure": kept.both,
            "score": measure.combined_score(style, kept.both),
        }
        return {name: value.item() for name, value in figures.items()}
