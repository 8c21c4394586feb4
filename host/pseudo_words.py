"""A pseudo-word's vectors in the host's prompts: where they go, what they start from, with a gradient to them."""

import copy
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from .inference_tensors import OrdinaryOperands
from .small_model import KEY, SmallTextModel
from .versions import lends_weights, set_execution_device

if TYPE_CHECKING:
    import comfy.sd

IT = "<it>"
PLACEHOLDER = "semantic_style_pseudo_word"
# Values of the placeholder's vectors: the first has this one, the next one more. No model has such vectors.
MARK = 1.0e6
ENCODERS = ("l", "g", "h")  # the host's names of SD1.x's and SDXL's two, and SD2.x's


class _NormsApart(TorchFunctionMode):
    """The host's text encoders add in place (`x += ...`) to what a layer norm keeps for the backward pass: in here a
    norm keeps a copy."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__name__", "") == "layer_norm" and torch.is_grad_enabled():
            args = (args[0].clone(), *args[1:])
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Place:
    """Where a vector goes in the host's tokens."""

    key: str
    chunk: int
    at: Any
    encoder: str
    row: int


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt around a pseudo-word, for one CLIP.

    Attributes:
        clip: the host's CLIP, used as it is. text: with "<it>" where the pseudo-word stands.
        start: the class word's vectors [n, width] of every text encoder, on the CPU.
        tokens: the host's tokens with placeholders for the vectors. places: where those are.
    """

    clip: "comfy.sd.CLIP"
    text: str
    start: dict[str, Tensor]
    tokens: dict[str, list]
    places: tuple[_Place, ...]

    def with_vectors(self, vectors: dict[str, Tensor]) -> dict[str, list]:
        """Tokens for the host's encoder, the vectors in their places."""
        tokens = {key: [copy.copy(chunk) for chunk in chunks] for key, chunks in self.tokens.items()}
        for place in self.places:
            chunk, given = tokens[place.key][place.chunk], vectors[place.encoder]
            if isinstance(chunk, dict):
                chunk[place.at] = given
            else:
                chunk[place.at] = (given[place.row], *chunk[place.at][1:])
        return tokens

    def conditioning(self, vectors: dict[str, Tensor]) -> list:
        """The host's CONDITIONING of the prompt, with a graph that leads to the vectors. The CLIP must be loaded."""
        model, tokens = self.clip.cond_stage_model, self.with_vectors(vectors)
        model.reset_clip_options()
        if self.clip.layer_idx is not None:
            model.set_clip_options({"layer": self.clip.layer_idx})
        set_execution_device(model, self.clip.patcher.load_device)
        lent = lends_weights(self.clip.patcher)
        with _NormsApart(), OrdinaryOperands(copy_all=True) if lent else nullcontext():
            try:
                cond, pooled, *extra = model.encode_token_weights(tokens)
            except RuntimeError as error:
                # Weights that the host makes lazily are inference tensors.
                if lent or "inference tensor" not in str(error).lower():
                    raise
                with OrdinaryOperands():
                    cond, pooled, *extra = model.encode_token_weights(tokens)
        more: dict[str, Any] = {"pooled_output": pooled, **(extra[0] if extra else {})}
        self.clip.add_hooks_to_dict(more)
        return [[cond, more]]


def make_prompt(clip: "comfy.sd.CLIP", template: str, class_word: str, count: int) -> Prompt:
    """Tokenise a template and take the first vectors from the class word.

    The host itself places the vectors: it tokenises `embedding:name` of a placeholder's file, weights and several
    chunks included. So the prompt is exactly what a user gets who writes `embedding:name` there.

    Args:
        template: has "<it>" at least once.
        class_word: one word or several; their tokens start the vectors, over again where more are asked for.
        count: vectors of each text encoder.
    Raises:
        ValueError: a CLIP with another kind of text encoder, an unusable template, an empty class word.
    """
    if count < 1:
        raise ValueError(f"tokens must be at least 1, got {count}")
    if IT not in template:
        raise ValueError(f"the template must contain {IT}, which stands for what is learnt; got {template!r}")
    words = _class_vectors(clip, class_word)
    text = template
    if isinstance(clip.cond_stage_model, SmallTextModel):
        text = clip.cond_stage_model.encoder.prompt(template, class_word)
    start = {key: vectors.repeat(-(-count // len(vectors)), 1)[:count] for key, vectors in words.items()}
    marks = {k: MARK + torch.arange(count)[:, None].expand(-1, v.shape[1]) for k, v in start.items()}
    with tempfile.TemporaryDirectory(prefix="semantic-style-") as folder:
        # Not as safetensors: those stay mapped, and Windows deletes no file that is.
        torch.save({k: v.contiguous() for k, v in marks.items()}, Path(folder, f"{PLACEHOLDER}.pt"))
        reading = clip.clone()
        reading.tokenizer = _reading_from(clip.tokenizer, folder)
        # Spaces around it, without which the host would not see an embedding, mean nothing to a tokenizer.
        tokens = reading.tokenize(text.replace(IT, f" embedding:{PLACEHOLDER} "))
    # Other embeddings in the template as well.
    tokens = tree_map_only(Tensor, torch.clone, tokens)
    places = tuple(_find(tokens))
    for key in start:
        found = [p.row for p in places if p.encoder == key]
        wanted = text.count(IT) * (1 if key == KEY else count)
        if len(found) != wanted:
            raise ValueError(
                f"this CLIP did not take {IT} in {text!r} as an embedding ({len(found)} of {wanted} vectors found); "
                f"try the template {IT} alone"
            )
    return Prompt(clip, text, start, tokens, places)


def _class_vectors(clip: "comfy.sd.CLIP", class_word: str) -> dict[str, Tensor]:
    clip.load_model()
    model = clip.cond_stage_model
    if isinstance(model, SmallTextModel):
        with torch.inference_mode(False):
            return {KEY: model.encoder.words(class_word).detach().float().cpu().clone()}
    found = {}
    asked, empty = clip.tokenize(class_word), clip.tokenize("")
    for name, chunks in asked.items():
        encoder = getattr(model, f"clip_{name}", None)
        if name not in ENCODERS or encoder is None:
            raise ValueError(
                f"this CLIP has a text encoder {name!r}, for which no embedding can be learnt: use the CLIP of an "
                "SD1.x, SD2.x or SDXL checkpoint"
            )
        ids = _content([t[0] for t in chunks[0]], [t[0] for t in empty[name][0]])
        if not ids or len(chunks) > 1 or not all(isinstance(i, int) for i in ids):
            raise ValueError(
                f"class_word must be a word or a few (what the subject is: house, dog), got {class_word!r}"
            )
        table: nn.Embedding = encoder.transformer.get_input_embeddings()
        with torch.inference_mode(False):
            found[f"clip_{name}"] = table.weight.detach()[ids].float().cpu().clone()
    return found


def _content(ids: list, empty: list) -> list:
    """The tokens of a text without start, end and padding: what moves the rest of the empty text's tokens aside."""
    start, rest = 1, empty[1:]
    for n in range(len(ids) - start):
        if ids[start + n :] == rest[: len(ids) - start - n]:
            return ids[start : start + n]
    return ids[start:]


def _reading_from(tokenizer: Any, folder: str) -> Any:
    """A copy of the host's tokenizer that also finds the embeddings in a folder."""
    own = copy.copy(tokenizer)
    for name, part in vars(tokenizer).items():
        if hasattr(part, "embedding_directory"):
            setattr(own, name, _reading_from(part, folder))
    if hasattr(own, "embedding_directory"):
        known = own.embedding_directory or []
        own.embedding_directory = [folder, *([known] if isinstance(known, str) else known)]
    return own


def _find(tokens: dict[str, list]) -> list[_Place]:
    found = []
    for key, chunks in tokens.items():
        for i, chunk in enumerate(chunks):
            entries = chunk.items() if isinstance(chunk, dict) else enumerate(chunk)
            for at, entry in entries:
                value = entry[0] if isinstance(entry, (tuple, list)) else entry
                if isinstance(value, Tensor) and bool((value.reshape(-1, value.shape[-1])[:, 0] >= MARK).all()):
                    encoder = KEY if isinstance(chunk, dict) else f"clip_{key}"
                    found.append(_Place(key, i, at, encoder, int(value.flatten()[0] - MARK)))
    return found
