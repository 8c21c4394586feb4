"""Random valid graphs of this pack's nodes and stock ones on the demo model: each gives a picture or an error of ours.

    python tools/run.py benchmarks.random_graphs [--count 1000] [--first 0] [--out output/random_graphs]

A seed makes a graph: a method, and around it what users have in theirs (stock patches of the MODEL, prompts that are
combined, ranged and masked, batches, odd sizes, masks of any size, every scheduler, extreme weights). Good is a picture
whose latent is finite, or an error that a check of this pack or of the server raised. All else is a fault: another
exception, NaN, or a stock KSampler's picture that is not the same after it. Graphs that are faults are kept in --out.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

import numpy as np
from safetensors import safe_open
from tqdm import tqdm

from ..runner import locate
from ..runner.client import Client
from ..runner.graph import Graph, GraphError
from ..runner.launch import comfy_server

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 300.0
OURS = "SemanticStyle"
Link: TypeAlias = list[Any]  # [node id, number of the output]

CAPTIONS = (
    *("", "sky, hill", "cream and orange shaded sky, green and teal striped hill", "sun, sky, mountain, water"),
    "red and white dotted house, brown and red plain roof, blue and white shaded sky",
)


class Builder:
    """A graph that grows; widgets that are not given have the server's defaults."""

    def __init__(self, seed: int, info: dict[str, dict[str, Any]]) -> None:
        self.random = Random(seed)
        self.info = info
        self.graph: Graph = {}

    def add(self, kind: str, output: int = 0, **inputs: Any) -> Link:
        """A node; gives back a link to one of its outputs."""
        declared = self.info[kind]["input"]
        known = {*declared.get("required", {}), *declared.get("optional", {})}
        if unknown := inputs.keys() - known:
            raise KeyError(f"{kind} has no input {', '.join(unknown)}")
        widgets = {}
        for name, (what, *options) in declared.get("required", {}).items():
            if name not in inputs:
                settings = options[0] if options else {}
                choices = what if isinstance(what, list) else settings.get("options")
                widgets[name] = settings.get("default", choices[0] if choices else None)
        number = str(len(self.graph) + 1)
        self.graph[number] = {"class_type": kind, "inputs": {**widgets, **inputs}}
        return [number, output]

    def some(self, chance: float) -> bool:
        return self.random.random() < chance

    def of(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def choices(self, kind: str, name: str) -> list[Any]:
        """What a list of a node offers."""
        what, *options = self.info[kind]["input"]["required"][name]
        return what if isinstance(what, list) else options[0]["options"]


class Scene(Builder):
    """What every graph starts from: the demo model, pictures, prompts, and a method on them."""

    def make(self) -> Graph:
        loaded = self.add("SemanticStylePaperlandModel", precision=self.of("fp32", "fp32", "fp32", "bf16"))[0]
        self.model, self.clip, self.vae = [loaded, 0], [loaded, 1], [loaded, 2]
        self.steps = self.of(1, 2, 3)
        # What the host's nodes do not bear among themselves is no test of ours: self-attention guidance fails where no
        # prompt is active, token merging when it is put on twice, one step cache beside the other.
        self.ranges = self.some(0.7)
        self.on_model: set[str] = set()
        methods: list[Callable[[], Link]] = [self.semantix, self.guided, self.scsa, self.spin, self.replay, self.adain]
        latent = self.of(*methods)()
        self.add("SaveLatent", samples=latent, filename_prefix="random")
        image = self.add("VAEDecode", samples=latent, vae=self.vae)
        if self.some(0.2):
            image = self.add(
                "SemanticStyleKeepBackground",
                image=image,
                original=self.picture(),
                mask=self.mask(),
                feather=self.of(0, 3),
            )
        self.add("PreviewImage", images=image)
        return self.graph

    def picture(self) -> Link:
        side = self.of(32, 32, 48, 64, 50)
        other = side if self.some(0.7) else self.of(32, 40, 66)
        seeds = {"layout_seed": self.of(1, 2, 3), "style_seed": self.of(1, 2, 3)}
        image = self.add("SemanticStylePaperlandScene", width=side // 4 * 4, height=other // 4 * 4, **seeds)
        if self.some(0.15):
            image = self.add("ImageScale", image=image, width=side, height=other, crop=self.of("disabled", "center"))
        if self.some(0.15):
            image = self.add("RepeatImageBatch", image=image, amount=2)
        if self.some(0.1):
            image = self.add("JoinImageWithAlpha", image=image, alpha=self.mask())
        return image

    def mask(self) -> Link:
        width = self.of(32, 48, 64, 7)
        height = width if self.some(0.8) else self.of(32, 48, 64, 9)
        mask = self.add("SolidMask", value=self.of(0.0, 0.0, 1.0, 0.5), width=width, height=height)
        if self.some(0.8):
            part = self.add(
                "SolidMask", value=self.of(1.0, 1.0, 0.4), width=max(1, width // 2), height=max(1, height // 2)
            )
            mask = self.add(
                "MaskComposite", destination=mask, source=part, x=width // 4, y=height // 4, operation="add"
            )
        return self.add("FeatherMask", mask=mask, left=3, top=3, right=3, bottom=3) if self.some(0.2) else mask

    def prompt(self, plain: float = 0.6) -> Link:
        words = self.add("SemanticStylePaperlandEncode", clip=self.clip, caption=self.of(*CAPTIONS))
        if self.some(plain):
            return words
        other = self.add("SemanticStylePaperlandEncode", clip=self.clip, caption=self.of(*CAPTIONS))
        ways = ("combine", "mask", "area", "average", "zero")
        way = self.of(*ways, *(("range", "two ranges") if self.ranges else ()))
        if way == "combine":
            return self.add("ConditioningCombine", conditioning_1=words, conditioning_2=other)
        if way == "range":
            return self.ranged(words, *self.of((0.0, 0.5), (0.4, 1.0), (0.2, 0.6)))
        if way == "two ranges":
            parts = self.ranged(words, 0.0, 0.5), self.ranged(other, 0.5, 1.0)
            return self.add("ConditioningCombine", conditioning_1=parts[0], conditioning_2=parts[1])
        if way == "mask":
            masked = self.add(
                "ConditioningSetMask",
                conditioning=other,
                mask=self.mask(),
                set_cond_area=self.of("default", "mask bounds"),
            )
            return self.add("ConditioningCombine", conditioning_1=words, conditioning_2=masked)
        if way == "area":
            return self.add("ConditioningSetAreaPercentage", conditioning=words, width=0.5, height=0.5, x=0.2, y=0.0)
        if way == "average":
            strength = self.of(0.3, 0.7)
            return self.add(
                "ConditioningAverage", conditioning_to=words, conditioning_from=other, conditioning_to_strength=strength
            )
        return self.add("ConditioningZeroOut", conditioning=words)

    def ranged(self, words: Link, start: float, end: float) -> Link:
        return self.add("ConditioningSetTimestepRange", conditioning=words, start=start, end=end)

    def patched(self, model: Link) -> Link:
        """The model with stock patches in front of it, none as a rule."""
        while self.some(0.35):
            kind = self.of(
                *("FreeU", "FreeU_V2", "PatchModelAddDownscale", "ModelComputeDtype", "EasyCache", "LazyCache"),
                *("HyperTile", "TomePatchModel", "RescaleCFG", "PerturbedAttentionGuidance", "SelfAttentionGuidance"),
                *("CFGNorm", "ModelSamplingDiscrete", "Mahiro"),
            )
            if kind not in self.info or kind in self.on_model or (kind == "SelfAttentionGuidance" and self.ranges):
                continue
            self.on_model |= {"EasyCache", "LazyCache"} if kind in ("EasyCache", "LazyCache") else {kind}
            settings = {"FreeU": {}, "ModelSamplingDiscrete": {"sampling": "v_prediction"}}.get(kind, {})
            if kind == "ModelComputeDtype":
                settings = {"dtype": self.of("default", "fp32", "bf16")}
            model = self.add(kind, model=model, **settings)
        return model

    def latent(self) -> Link:
        latent = self.add("VAEEncode", pixels=self.picture(), vae=self.vae)
        return self.add("SetLatentNoiseMask", samples=latent, mask=self.mask()) if self.some(0.1) else latent

    def inversion(self, kind: str = "", latent: Link | None = None, cfg: float | None = None) -> Link:
        kind = kind or self.of("DDPM", "DDIM")
        node = f"{OURS}{kind}Inversion"
        return self.add(
            node,
            model=self.model,
            positive=self.prompt(0.9),
            negative=self.prompt(1.0),
            latent=latent or self.latent(),
            steps=self.steps,
            scheduler=self.scheduler(node),
            cfg=self.of(1.0, 3.5) if cfg is None else cfg,
            seed=self.of(0, 1),
        )

    def scheduler(self, node: str) -> str:
        return "normal" if self.some(0.7) else self.of(*self.choices(node, "scheduler"))

    def semantic_map(self) -> Link:
        way = self.of("colors", "masks", "labels")
        if way == "colors":
            return self.add(f"{OURS}MapFromColors", content=self.picture(), style=self.picture(), number=self.of(0, 2))
        if way == "masks":
            return self.add(f"{OURS}MapFromMasks", content=self.mask(), style=self.mask())
        labels = []
        for _ in range(2):
            scene = self.picture()
            while self.graph[scene[0]]["class_type"] != f"{OURS}PaperlandScene":
                scene = next(v for v in self.graph[scene[0]]["inputs"].values() if isinstance(v, list))
            labels.append([scene[0], 1])
        return self.add(f"{OURS}MapFromLabels", content=labels[0], style=labels[1])

    def weights(self) -> dict[str, float]:
        return {
            "style_weight": self.of(0.0, 3.0, 6.0, 1000.0),
            "spatial_weight": self.of(0.0, 0.9, 1000.0),
            "semantic_weight": self.of(0.0, 1.0, 1000.0),
            "position_weight": self.of(0.0, 1.0, 3.0, 1000.0),
        }

    def part(self) -> dict[str, float]:
        start, end = sorted((self.of(0.0, 0.0, 0.3, 1.0), self.of(1.0, 1.0, 0.6, 0.0)))
        return {"start_percent": start, "end_percent": end}

    def semantix(self) -> Link:
        context = self.inversion("DDPM") if self.some(0.9) else self.inversion()
        more: dict[str, Any] = {"semantic_map": self.semantic_map()} if self.some(0.3) else {}
        more |= {"mask": self.mask()} if self.some(0.2) else {}
        return self.add(
            f"{OURS}KSampler",
            model=self.patched(self.model),
            positive=self.prompt(),
            negative=self.prompt(0.9),
            context=context,
            reference=self.inversion(),
            cfg=self.of(1.0, 3.5),
            skip=self.of(0, 0, 1),
            adain_start=self.of(0.0, 0.33, 1.0),
            checkpointing=self.some(0.2),
            **self.weights(),
            **self.part(),
            **more,
        )

    def energy(self) -> Link:
        if self.some(0.3):
            weight = self.of(0.0, 1.0, 100.0)
            return self.add(
                f"{OURS}SpinStyleEnergy", background=self.inversion(), mask=self.mask(), weight=weight, **self.part()
            )
        return self.add(
            f"{OURS}SemantixEnergy",
            context=self.inversion(),
            reference=self.inversion(),
            **self.weights(),
            **self.part(),
        )

    def guided(self) -> Link:
        energy = self.energy()
        if self.some(0.3):
            energy = self.add(f"{OURS}CombineEnergies", a=energy, b=self.energy())
        guider = self.add(
            f"{OURS}EnergyGuider",
            model=self.patched(self.model),
            positive=self.prompt(),
            negative=self.prompt(0.9),
            cfg=self.of(1.0, 3.5),
            energy=energy,
        )
        return self.sampled(guider, self.latent())

    def sampled(self, guider: Link, latent: Link) -> Link:
        """With any sampler of the host's."""
        name = self.of("euler", "euler_ancestral", "dpmpp_2m", "heun", "ddim", "uni_pc", "lcm", "dpm_fast")
        sigmas = self.add(
            "BasicScheduler",
            model=self.model,
            scheduler=self.scheduler("BasicScheduler"),
            steps=self.steps,
            denoise=1.0,
        )
        return self.add(
            "SamplerCustomAdvanced",
            noise=self.add("RandomNoise", noise_seed=self.of(0, 1)),
            guider=guider,
            sampler=self.add("KSamplerSelect", sampler_name=name),
            sigmas=sigmas,
            latent_image=latent,
        )

    def replayed(self, model: Link, inversion: Link, **more: Any) -> Link:
        parts = self.add(f"{OURS}Replay", inversion=inversion, skip=self.of(0, 0, 1), **more)[0]
        guider = self.add(
            "CFGGuider", model=model, positive=self.prompt(), negative=self.prompt(0.9), cfg=self.of(1.0, 3.5)
        )
        noise = [parts, 0] if self.some(0.9) else self.add(self.of("DisableNoise", "RandomNoise"))
        return self.add(
            "SamplerCustomAdvanced",
            noise=noise,
            guider=guider,
            sampler=[parts, 1],
            sigmas=[parts, 2],
            latent_image=[parts, 3],
        )

    def replay(self) -> Link:
        more = {"adain_reference": self.inversion()} if self.some(0.3) else {}
        return self.replayed(self.patched(self.model), self.inversion(), **more)

    def scsa(self) -> Link:
        content, style = self.inversion("DDIM", cfg=1.0), self.inversion("DDIM", cfg=1.0)
        regions = self.semantic_map()
        if self.some(0.1):
            regions = self.add(f"{OURS}AutoMap", model=self.model, content=content, style=style)
        model = self.patched(self.model) if self.some(0.5) else self.model
        model = self.add(
            f"{OURS}ApplySCSA",
            model=model,
            content=content,
            style=style,
            semantic_map=regions,
            vae=self.vae,
            a1=self.of(0.0, 0.3),
            **self.part(),
        )
        return self.replayed(self.patched(model) if self.some(0.2) else model, content)

    def spin(self) -> Link:
        reference = self.prompt()
        if self.some(0.15):
            reference = self.add(
                f"{OURS}SpinEmbedding",
                model=self.model,
                clip=self.clip,
                class_word=self.of("house", "sun"),
                steps=2,
                name="random",
                overwrite=True,
                image=self.picture(),
                vae=self.vae,
            )
        spun = self.add(
            f"{OURS}ApplySpin",
            model=self.patched(self.model),
            reference=reference,
            background=self.prompt(),
            mask=self.mask(),
        )
        return self.add(
            "KSampler",
            model=self.patched(spun) if self.some(0.2) else spun,
            positive=[spun[0], 1],
            negative=self.prompt(1.0),
            latent_image=self.latent(),
            steps=self.steps,
            sampler_name=self.of("euler", "dpmpp_2m"),
            scheduler="normal",
            cfg=self.of(1.0, 3.5),
            denoise=self.of(1.0, 0.5),
        )

    def adain(self) -> Link:
        first, second = (
            self.add(f"{OURS}InversionLatent", inversion=self.inversion(), step=self.of(0, 1)) for _ in range(2)
        )
        more = {"semantic_map": self.semantic_map()} if self.some(0.5) else {}
        return self.add(f"{OURS}AdaIN", content=first, style=second, **more)


def stock_graph(seed: int) -> Graph:
    """A picture by stock nodes on the demo model, in the place of nothing that a random graph has."""
    return {
        "1": {"class_type": f"{OURS}PaperlandModel", "inputs": {"precision": "fp32"}},
        "2": {"class_type": f"{OURS}PaperlandEncode", "inputs": {"clip": ["1", 1], "caption": CAPTIONS[2]}},
        "3": {"class_type": f"{OURS}PaperlandEncode", "inputs": {"clip": ["1", 1], "caption": ""}},
        "4": {"class_type": f"{OURS}PaperlandLatent", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0],
                "positive": ["2", 0],
                "negative": ["3", 0],
                "latent_image": ["4", 0],
                "steps": 3,
                "cfg": 3.5,
                "sampler_name": "euler",
                "scheduler": "normal",
                "denoise": 1.0,
                "seed": seed,
            },
        },
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "PreviewImage", "inputs": {"images": ["6", 0]}},
    }


@dataclass(frozen=True)
class Outcome:
    """What became of a graph: "picture", "refused" (by a check), or "fault"; and in words."""

    kind: str
    text: str = ""


class Trial:
    """Runs random graphs on a server that this process started.

    Args:
        client: connected to it.
        base: its folder for models, input and output.
    """

    def __init__(self, client: Client, base: Path) -> None:
        self.client, self.base = client, base
        self.info = client.object_info()
        # The same seed would come out of the host's cache: each comparison asks for two seeds, once before all graphs.
        self.stock = {seed: self._pixels(stock_graph(seed)) for seed in range(2)}

    def graph(self, seed: int) -> Graph:
        return Scene(seed, self.info).make()

    def run(self, graph: Graph) -> Outcome:
        for left in self.base.glob("output/random*.latent"):
            left.unlink()
        try:
            result = self.client.run(graph, timeout=SECONDS)
        except GraphError as error:
            ours = error.raised_in is None or str(ROOT) in error.raised_in or "semantic-style" in error.raised_in
            return Outcome("refused" if ours else "fault", str(error))
        for path in self.base.glob("output/random*.latent"):
            with safe_open(path, "np") as file:
                if not np.isfinite(file.get_tensor("latent_tensor")).all():
                    return Outcome("fault", "the latent has NaN or infinity")
        return Outcome("picture" if self.client.images(result) else "fault", "")

    def is_stock_unchanged(self) -> bool:
        """Whether the stock sampler still makes its pictures, newly computed."""
        self.client.free()
        return all(np.array_equal(pixels, self._pixels(stock_graph(seed))) for seed, pixels in self.stock.items())

    def _pixels(self, graph: Graph) -> Any:
        (images,) = self.client.images(self.client.run(graph, timeout=SECONDS)).values()
        return np.stack([np.asarray(image) for image in images])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first graph")
    parser.add_argument("--out", type=Path, default=Path("output/random_graphs"))
    options = parser.parse_args()
    host = locate.find_host(ROOT)
    if host is None:
        sys.exit(locate.NO_HOST)
    options.out.mkdir(parents=True, exist_ok=True)
    tally, methods = Counter[str](), Counter[str]()
    with comfy_server(host, ROOT, log=options.out / "comfyui.log") as server, Client(server.address) as client:
        trial = Trial(client, server.base)
        for seed in tqdm(range(options.first, options.first + options.count)):
            graph = trial.graph(seed)
            outcome = trial.run(graph)
            tally[outcome.kind] += 1
            if outcome.kind == "refused":
                methods[outcome.text.partition("): ")[2][:90]] += 1
            if outcome.kind == "fault":
                kept = {"outcome": outcome.text, "graph": graph}
                (options.out / f"fault_{seed}.json").write_text(json.dumps(kept, indent=1), encoding="utf-8")
                tqdm.write(f"{seed}: {outcome.text}")
        same = trial.is_stock_unchanged()
    for text, count in methods.most_common():
        print(f"{count:5} {text}")
    print(dict(tally), "the stock sampler's pictures are", "the same" if same else "NOT the same")
    sys.exit(bool(tally["fault"]) or not same)


if __name__ == "__main__":
    main()
