"""Perceptual measures of trained networks, where their packages and weights are at hand; never fetched from here.

LPIPS: Zhang et al., CVPR 2018, by the package of its authors. CLIP: Radford et al., 2021, and DINOv2: Oquab et al.,
2023, by transformers, which ComfyUI brings: cosine between the embeddings of two pictures. ArtFID: Wright and Ommer,
2022, by the package of its authors.
"""

import importlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import report

CLIP, DINO = "openai/clip-vit-base-patch32", "facebook/dinov2-small"
ALEXNET = "alexnet-owt-7be5be79.pth"  # what torchvision calls its file
STYLEID = "https://github.com/jiwoogit/StyleID, evaluation/eval_artfid.py --cnt content --sty style --tar VARIANT"
# No package computes these; their authors' programs do, on the folders that are written for them.
ELSEWHERE = {
    "CFSD": f"no package computes it; its authors' program does, in the folder folders/: {STYLEID}",
    "SSL": "no package computes it; the code of SCSA's authors does, with the pictures in the folder folders/",
}

Compare = Callable[[Tensor, Tensor], float]  # of two pictures [1, H, W, 3] in 0..1


class MissingError(RuntimeError):
    """A measure cannot be taken; the message says what is missing and how to get it."""


@dataclass(frozen=True)
class Measure:
    """A figure of a picture: compared with the one `to` which it should be near; `lower` is better or not."""

    head: str
    to: str
    lower: bool
    load: Callable[[], Compare]


def module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingError(f"{error}; get it with: pip install {package}") from error


def lpips() -> Compare:
    package = module("lpips", "lpips")
    if not (Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET).exists():
        fetch = "python -c \"import torchvision; torchvision.models.alexnet(weights='DEFAULT')\""
        raise MissingError(f"AlexNet's weights are missing; get them with: {fetch}")
    network = package.LPIPS(net="alex", verbose=False).eval()

    def compare(a: Tensor, b: Tensor) -> float:
        with torch.inference_mode():
            return float(network(*(2 * t.movedim(-1, 1) - 1 for t in (a, b))))

    return compare


def clip() -> Compare:
    network, prepare = transformer("CLIPVisionModelWithProjection", CLIP)
    return embedded(prepare, lambda inputs: network(**inputs).image_embeds[0])


def dino() -> Compare:
    network, prepare = transformer("Dinov2Model", DINO)
    return embedded(prepare, lambda inputs: network(**inputs).pooler_output[0])


def transformer(kind: str, name: str) -> tuple[Any, Any]:
    """A network of that class and what prepares its pictures, from files that are here."""
    package = module("transformers", "transformers")
    try:
        network = getattr(package, kind).from_pretrained(name, local_files_only=True).eval()
        return network, package.AutoImageProcessor.from_pretrained(name, local_files_only=True)
    except (OSError, ImportError, ValueError) as error:
        raise MissingError(f"weights are missing; get them with: hf download {name}") from error


def embedded(prepare: Any, embed: Callable[[Any], Tensor]) -> Compare:
    """Cosine between embeddings."""

    def of(picture: Tensor) -> Tensor:
        image = Image.fromarray(report.as_bytes(picture[0]).numpy())
        with torch.inference_mode():
            return embed(prepare(images=image, return_tensors="pt")).double()

    def compare(a: Tensor, b: Tensor) -> float:
        return torch.cosine_similarity(of(a), of(b), dim=0).item()

    return compare


# What is near what: restyled pictures to their content and style, painted ones to the reference.
RESTYLED = {
    "lpips": Measure("LPIPS to the content", "content", True, lpips),
    "clip": Measure("CLIP likeness to the style", "style", False, clip),
    "dino": Measure("DINOv2 likeness to the content", "content", False, dino),
}
PAINTED = {
    "clip": Measure("CLIP likeness to the subject", "subject", False, clip),
    "dino": Measure("DINOv2 likeness to the subject", "subject", False, dino),
}


def at_hand(measures: Mapping[str, Measure]) -> tuple[dict[str, Compare], dict[str, str]]:
    """Those that can be taken, and why the others cannot."""
    found, missing = {}, {}
    for name, measure in measures.items():
        try:
            found[name] = measure.load()
        except MissingError as error:
            missing[measure.head] = str(error)
    return found, missing


def art_fid(folder: Path, variants: Sequence[str]) -> dict[str, float]:
    """ArtFID of each variant's folder against `content` and `style` beside it.

    Raises:
        MissingError: no package or weights, or too few pictures.
    """
    package = module("art_fid.art_fid", "art-fid scikit-learn")
    weights = Path(tempfile.gettempdir(), "art_fid", package.CKPT_URL.rpartition("/")[2])
    for file, source in (
        (weights, package.CKPT_URL),
        (Path(torch.hub.get_dir(), "checkpoints", ALEXNET), "torchvision"),
    ):
        if not file.exists():
            raise MissingError(f"weights are missing: {file} (from {source})")
    paths = {name: str(folder / name) for name in (*variants, "content", "style")}
    ends = {"batch_size": 1, "device": "cpu", "mode": "art_fid"}
    try:
        return {n: float(package.compute_art_fid(paths[n], paths["style"], paths["content"], **ends)) for n in variants}
    except ValueError as error:
        raise MissingError(f"it could not be computed, as happens with few pictures: {error}") from error


def write_folders(folder: Path, columns: dict[str, Sequence[Tensor]]) -> None:
    """A folder for each column with its pictures [H, W, 3] (bytes) numbered, as programs for whole folders want it."""
    for name, pictures in columns.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(pictures):
            Image.fromarray(np.asarray(picture)).save(folder / name / f"{number:04d}.png")
