"""Textual-inversion files: what is learnt, as any prompt can use it with `embedding:name`.

The format is the safetensors one that ComfyUI and AUTOMATIC1111's webui read: `emb_params` [n, width] for a model with
one text encoder, one entry for each encoder otherwise (SDXL: `clip_l`, `clip_g`).
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from .listing import Listing
from .whole import write_whole

ONLY = "emb_params"
SUFFIX = ".safetensors"
# A prompt's name ends at a space or comma, and what follows a bracket or colon is a weight.
NAME = re.compile(r"[\w][\w.-]*")
READ_AS = (SUFFIX, ".pt", ".bin", "")
# Devices, whatever ending they are given: Windows writes into them without a word.
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
IN_PROMPT = re.compile(r"(?<![^\s(])embedding:([^\s,;:()]+)")


def check_name(name: str) -> None:
    """Raise ValueError unless a prompt can say the name and a file can have it."""
    if not NAME.fullmatch(name) or name.lower().endswith(READ_AS[:3]) or len(name) > 120:
        raise ValueError(
            f"an embedding's name has letters, digits, '_', '-' and '.' only, without the file's ending, so that a "
            f"prompt can name it; got {name!r}"
        )
    if DEVICES.fullmatch(name):
        raise ValueError(f"{name!r} is the name of a device on Windows, where no file can have it: take another")


def free_name(name: str, folders: Iterable[str | Path]) -> str:
    """`name`, or with the first number from 2 on that no embedding in or below the folders has.

    Raises:
        ValueError: see `check_name`.
    """
    check_name(name)
    # Case does not tell files apart everywhere.
    taken = {file.rpartition("/")[2].lower() for folder in folders for file in _everything().below(folder)}

    def is_taken(candidate: str) -> bool:
        return any(candidate.lower() + ending in taken for ending in READ_AS)

    number, found = 1, name
    while is_taken(found):
        number += 1
        found = f"{name}_{number}"
    return found


def file_of(name: str, folders: Iterable[str | Path]) -> Path | None:
    """The safetensors file in or below the folders that a prompt's `embedding:name` means; None where there is none."""
    wanted = f"{name}{SUFFIX}".lower()
    found = (Path(folder, file) for folder in folders for file in _everything().below(folder))
    return next((file for file in found if file.name.lower() == wanted), None)


def _everything() -> Listing:
    return Listing(lambda _: True)


def save_embedding(path: Path, vectors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write vectors [n, width] of each text encoder; a file that is there is replaced when the new one is complete."""
    one = len(vectors) == 1
    tensors = {ONLY if one else key: v.detach().to("cpu").float().contiguous() for key, v in vectors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda unfinished: save_file(tensors, unfinished, dict(metadata or {})))


def take_embeddings(text: str, load: Callable[[str], Tensor | None]) -> tuple[str, dict[str, Tensor]]:
    """Put a pseudo-word in the place of every `embedding:name` of a prompt.

    Args:
        load: vectors [n, width] of a name; None where there is no such embedding, which is then left out.
    Returns:
        the text with pseudo-words such as "<embedding-0>", and their vectors.
    """
    found: dict[str, Tensor] = {}

    def replace(match: re.Match) -> str:
        name = match[1]
        vectors = load(name)
        if vectors is None and (shorter := name.rstrip(".")) != name:
            vectors = load(shorter)
        if vectors is None:
            return ""
        word = f"<embedding-{len(found)}>"
        found[word] = vectors.reshape(-1, vectors.shape[-1])
        return word + name[len(name.rstrip(".")) :]

    return IN_PROMPT.sub(replace, text), found
