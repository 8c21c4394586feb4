"""Which position code makes semantic matches better: label transfer between Paperland scenes.

    python tools/run.py benchmarks.position_code [--pairs 100] [--write]

Every place of a scene takes the region label of its match (`samplers.matching.find_matches`) in another scene; right is
its own true label. Features are read through ComfyUI as the nodes read them. Period sets and weights are compared on
one set of scene pairs and reported on another.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

from ..paperland.scenes import REGIONS, Scenes, label_image
from ..regions.semantic_map import resample_labels
from ..samplers.matching import find_matches
from ..samplers.position import DEFAULT_PERIODS
from . import report
from .demo_model import drawn
from .host import bring_in_host, demo

SIGMAS = (0.2, 0.6, 1.5, 4.0)
WEIGHTS_TRIED = (0.3, 0.5, 1.0, 2.0, 3.0)
PUBLISHED = 3.0
# In image sides. Of single periods from about 4 on only weight / period counts.
PERIOD_SETS: tuple[tuple[float, ...], ...] = (
    (2.0, 1.0, 0.5, 0.25),
    (2.0, 1.0),
    (2.0,),
    (3.0,),
    (4.0,),
    (6.0,),
    (8.0,),
    (16.0,),
    (4.0, 2.0),
    (8.0, 4.0, 2.0, 1.0),
    (16.0, 4.0, 1.0),
    (128.0, 32.0, 8.0, 2.0),
)
TRANSFORMER = "transformer"
CHOICE_SEEDS, HELD_OUT_SEEDS = (11, 12), (21, 22)
RESAMPLES = 400
SIDES_APART = 1000  # seeds of the noise
CLEARLY = 2  # standard errors
FIELDS = ("all", "classes", "moved")  # columns of each stage
SHOWN, SHOWN_SIGMA = 4, 0.6
ABSENT = torch.tensor([0.93, 0.92, 0.9])  # where the reference lacks the region: no label would be right


@dataclass(frozen=True)
class Setting:
    """A way to match: position code and weight, or the place with the same coordinates."""

    weight: float
    periods: tuple[float, ...] | str | None

    def match(self, out: Tensor, reference: Tensor) -> Tensor:
        """Features [B, C, h, w] -> matches [B, places]."""
        if self == SAME_POSITION:
            return torch.arange(out.shape[-2:].numel()).expand(len(out), -1)
        if isinstance(self.periods, str):
            periods = transformer_periods(out.shape[1], out.shape[-1])
        else:
            periods = self.periods or DEFAULT_PERIODS
        return find_matches(out, reference, self.weight, periods=periods)

    @property
    def name(self) -> str:
        if self == SAME_POSITION:
            return "same position"
        if self == NO_CODE:
            return "no code (weight 0)"
        periods = "transformer frequencies" if self.periods == TRANSFORMER else f"periods {written(self.periods)}"
        return f"{periods}, weight {self.weight:g}"


SAME_POSITION, NO_CODE = Setting(float("inf"), None), Setting(0.0, None)


@dataclass(frozen=True)
class Pairs:
    """Features of scene pairs at one noise level and stage, with their true labels [pairs, places]."""

    out: Tensor
    reference: Tensor
    labels: Tensor
    reference_labels: Tensor

    @property
    def size(self) -> tuple[int, int]:
        return self.out.shape[2], self.out.shape[3]

    def transfer(self, setting: Setting) -> Tensor:
        """The label that every place gets, [pairs, places]."""
        return self.reference_labels.gather(1, setting.match(self.out, self.reference))

    def known(self) -> Tensor:
        """Which places have a region that the reference has, too."""
        return (self.labels[:, :, None] == self.reference_labels[:, None, :]).any(dim=2)


@dataclass(frozen=True)
class Result:
    """Label transfer at one noise level and stage.

    Attributes:
        hits, tries: places with the right label and places at all, by pair and region [pairs, regions].
        moved: share of the right label among places where the same position has another one.
        distance: mean distance between a place and its match, in image sides.
    """

    hits: Tensor
    tries: Tensor
    moved: float
    distance: float

    def accuracy(self, draws: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Share of all places and mean of the regions' shares, [N] each, for how often each pair is drawn [N, pairs]
        (default: each once)."""
        draws = torch.ones(1, len(self.hits)) if draws is None else draws
        hits, tries = draws @ self.hits, draws @ self.tries
        seen = tries > 0
        classes = (hits / tries.clamp_min(1)).sum(dim=1) / seen.sum(dim=1)
        return hits.sum(dim=1) / tries.sum(dim=1), classes


Results = dict[tuple[Setting, float, int], Result]


def transformer_periods(channels: int, side: int) -> tuple[float, ...]:
    """Wavelengths `2 pi 10000^(i/K)` places, K frequencies that fill the channels, in image sides."""
    count = channels // 4
    return tuple(2 * torch.pi * 10000 ** (i / count) / side for i in range(count))


def written(periods: tuple[float, ...] | str | None) -> str:
    return " ".join(f"{p:g}" for p in periods or ())


def pairs_at(scenes: Sequence[Scenes], sigma: float) -> list[Pairs]:
    """Both stages of pairs of scenes, as a run sees them: out with its caption, the reference with the empty prompt."""
    captions = scenes[0].captions, [""] * len(scenes[1].captions)
    sides = [features(*side, sigma, SIDES_APART * i) for i, side in enumerate(zip(scenes, captions, strict=True))]
    result = []
    for out, reference in zip(*sides, strict=True):
        size = (out.shape[2], out.shape[3])
        labels = [resample_labels(scene.labels, size).flatten(1) for scene in scenes]
        result.append(Pairs(out, reference, *labels))
    return result


def features(scene: Scenes, captions: Sequence[str], sigma: float, seed: int) -> list[Tensor]:
    """Decoder features of noised scenes, each with a noise of its own, one tensor [B, C, h, w] per stage."""
    from ..host.reading import FeatureCall, read_features

    model = demo()
    clean = model.encode(scene.images)["samples"]
    looks = [FeatureCall(clean[i : i + 1], model.prompt(text), seed + i) for i, text in enumerate(captions)]
    with torch.inference_mode():
        found = read_features(model.model, looks, sigma)
    return [torch.cat(stage) for stage in zip(*(f.stages for f in found), strict=True)]


def distances(matches: Tensor, size: tuple[int, int]) -> Tensor:
    """Between every place and its match on the same grid, in image sides."""
    h, w = size
    here = torch.arange(h * w)
    return torch.hypot((matches // w - here // w) / h, (matches % w - here % w) / w)


def transfer(pairs: Pairs, setting: Setting) -> Result:
    matches = setting.match(pairs.out, pairs.reference)
    right = pairs.reference_labels.gather(1, matches) == pairs.labels
    known = pairs.known()
    region = F.one_hot(pairs.labels, len(REGIONS)) * known[..., None]
    elsewhere = known & (pairs.labels != pairs.reference_labels)
    return Result(
        (region * right[..., None]).sum(dim=1).float(),
        region.sum(dim=1).float(),
        right[elsewhere].float().mean().item(),
        distances(matches, pairs.size)[known].mean().item(),
    )


def measure(count: int, seeds: tuple[int, int], settings: Sequence[Setting]) -> Results:
    scenes = [drawn(count, seed) for seed in seeds]
    results: Results = {}
    for sigma in SIGMAS:
        for pairs in pairs_at(scenes, sigma):
            for setting in settings:
                results[setting, sigma, pairs.size[1]] = transfer(pairs, setting)
        print(f"sigma {sigma:g} of seeds {seeds} done", flush=True)
    return results


def score(results: Results, setting: Setting, draws: Tensor | None = None) -> Tensor:
    """What the choice goes by, [N]: both accuracies averaged, over all noise levels and both stages."""
    found = [result.accuracy(draws) for (which, *_), result in results.items() if which == setting]
    return torch.stack([a for pair in found for a in pair]).mean(dim=0)


def lead(results: Results, setting: Setting, other: Setting) -> tuple[float, float]:
    """By how much a setting scores better than another, and the standard error: pairs drawn anew, the same for both."""
    pairs = len(next(iter(results.values())).hits)
    picks = torch.randint(pairs, (RESAMPLES, pairs), generator=torch.Generator().manual_seed(0))
    draws = F.one_hot(picks, pairs).sum(dim=1).float()
    difference = score(results, setting, draws) - score(results, other, draws)
    return (score(results, setting) - score(results, other)).item(), difference.std().item()


def distance(results: Results, setting: Setting) -> float:
    return fmean(result.distance for (which, *_), result in results.items() if which == setting)


def choose(results: Results) -> tuple[Setting, Setting | None]:
    """At the published weight: the period set of the best score, and the chosen one, whose matches reach farthest of
    those that are clearly better than both no code and the same position (None: there is none)."""
    tried = [Setting(PUBLISHED, periods) for periods in PERIOD_SETS]
    clear = [
        setting
        for setting in tried
        if all(by > CLEARLY * error for by, error in (lead(results, setting, b) for b in (NO_CODE, SAME_POSITION)))
    ]
    best = max(tried, key=lambda setting: score(results, setting).item())
    return best, max(clear, key=lambda setting: distance(results, setting), default=None)


def columns(results: Results, setting: Setting) -> list[float]:
    """Of the table: accuracies per stage; the score at every noise level; distance; the score."""
    stages = sorted({stage for _, _, stage in results})
    of = {key[1:]: result for key, result in results.items() if key[0] == setting}
    cells: list[float] = []
    for stage in stages:
        here = [of[sigma, stage] for sigma in SIGMAS]
        cells += [fmean(r.accuracy()[which].item() for r in here) for which in range(2)]
        cells.append(fmean(r.moved for r in here))
    cells += [fmean(a.item() for stage in stages for a in of[sigma, stage].accuracy()) for sigma in SIGMAS]
    return [*cells, distance(results, setting), score(results, setting).item()]


def tables(choice: Results, held_out: Results) -> dict[str, str]:
    """What the page says of the default, of the held-out pairs and of the choice."""
    default = [Setting(w, DEFAULT_PERIODS) for w in WEIGHTS_TRIED]
    transformer = [Setting(w, TRANSFORMER) for w in WEIGHTS_TRIED]
    rest = [Setting(PUBLISHED, periods) for periods in PERIOD_SETS if periods != DEFAULT_PERIODS]
    stages = sorted({stage for _, _, stage in held_out})
    heads = ["", *(f"{s}x{s} {what}" for s in stages for what in FIELDS)]
    heads += [*(f"σ {sigma:g}" for sigma in SIGMAS), "distance", "score"]
    settings = [NO_CODE, SAME_POSITION, *default, *transformer, *rest]
    rows = [[s.name, *(f"{v:.3f}" for v in columns(held_out, s))] for s in settings]
    grid = {
        f"{written(p)}{' (default)' * (p == DEFAULT_PERIODS)}": [Setting(w, p) for w in WEIGHTS_TRIED]
        for p in dict.fromkeys([*PERIOD_SETS, DEFAULT_PERIODS])
    }
    grid["transformer frequencies"] = transformer
    return {
        "default": verdict(held_out),
        "choice": chosen(choice),
        "held out": report.table(heads, rows),
        "scores": report.table(
            ["periods \\ weight", *(f"{w:g}" for w in WEIGHTS_TRIED)],
            [[name, *(f"{score(choice, s).item():.3f}" for s in row)] for name, row in grid.items()],
        ),
    }


def verdict(held_out: Results) -> str:
    """The default at the published weight against both baselines."""
    ours = Setting(PUBLISHED, DEFAULT_PERIODS)
    verdicts = []
    for other in (NO_CODE, SAME_POSITION):
        by, error = lead(held_out, ours, other)
        clear = abs(by) > CLEARLY * error
        word = ("better than" if by > 0 else "worse than") if clear else "not clearly unlike"
        verdicts.append(f"{word} {other.name} ({by:+.3f}, standard error {error:.3f})")
    stages = sorted({stage for _, _, stage in held_out})
    shares = [columns(held_out, setting)[:: len(FIELDS)] for setting in (ours, NO_CODE, SAME_POSITION)]
    by_stage = [f"{s}x{s} {a:.3f}, {b:.3f}, {c:.3f}" for s, a, b, c in zip(stages, *shares, strict=False)]
    return (
        f"**Default: periods of {written(DEFAULT_PERIODS)} image sides.** With the published weight {PUBLISHED:g}, on "
        f"held-out pairs, it scores {' and '.join(verdicts)}.\n"
        f"Places with the right label by stage, against no code and the same position: {'; '.join(by_stage)}."
    )


def chosen(choice: Results) -> str:
    """What the choice pairs say."""
    best, by_rule = choose(choice)
    default = [Setting(w, DEFAULT_PERIODS) for w in WEIGHTS_TRIED]

    def scored(setting: Setting | None) -> str:
        return f"{written(setting.periods)} ({score(choice, setting).item():.3f})" if setting else "none"

    return (
        f"No code: {score(choice, NO_CODE).item():.3f}. Same position: {score(choice, SAME_POSITION).item():.3f}. Best "
        f"score on the choice pairs: {scored(best)}; by the rule: {scored(by_rule)}. The default's best weight there: "
        f"{max(default, key=lambda setting: score(choice, setting).item()).weight:g}."
    )


def picture(count: int) -> dict[str, Tensor]:
    """The first of the held-out pairs: scenes and label maps at the finer stage, by column."""
    drawings = [drawn(count, seed) for seed in HELD_OUT_SEEDS]
    scenes = [Scenes(s.images[:SHOWN], s.labels[:SHOWN], s.captions[:SHOWN]) for s in drawings]
    pairs = pairs_at(scenes, SHOWN_SIGMA)[-1]
    known = pairs.known()[..., None]
    settings = {
        "no code": NO_CODE,
        "transformer, weight 1": Setting(1.0, TRANSFORMER),
        f"default, weight {PUBLISHED:g}": Setting(PUBLISHED, DEFAULT_PERIODS),
        "same position": SAME_POSITION,
    }
    maps = {"true labels": pairs.labels, **{name: pairs.transfer(setting) for name, setting in settings.items()}}
    columns = {"scene": scenes[0].images, "reference": scenes[1].images}
    for name, labels in maps.items():
        colors = torch.where(known, label_image(labels[:, None])[:, 0], ABSENT).unflatten(1, pairs.size)
        side = scenes[0].images.shape[1] // pairs.size[0]
        columns[name] = colors.repeat_interleave(side, 1).repeat_interleave(side, 2)
    return columns


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("output/position_code"))
    parser.add_argument("--write", action="store_true", help="put tables and picture into docs/")
    options = parser.parse_args()
    bring_in_host()
    baselines = [NO_CODE, SAME_POSITION, *(Setting(w, TRANSFORMER) for w in WEIGHTS_TRIED)]
    sets = list(dict.fromkeys([DEFAULT_PERIODS, *PERIOD_SETS]))
    tried = [Setting(w, p) for p in sets for w in WEIGHTS_TRIED]
    choice = measure(options.pairs, CHOICE_SEEDS, [*baselines, *tried])
    reported = [s for s in tried if s.weight == PUBLISHED or s.periods == DEFAULT_PERIODS]
    held_out = measure(options.pairs, HELD_OUT_SEEDS, [*baselines, *reported])
    report.publish(options, "position_code", tables(choice, held_out), report.grid(picture(options.pairs)))
