"""A word as the prompt that a subject is found by: the host's conditioning of it and the positions of its tokens."""

from typing import TYPE_CHECKING

from .pseudo_words import ENCODERS
from .small_model import SmallTextModel

if TYPE_CHECKING:
    import comfy.sd


def empty_prompt(clip: "comfy.sd.CLIP") -> list:
    """The CONDITIONING of the prompt without words."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(""))


def word_prompt(clip: "comfy.sd.CLIP", text: str) -> tuple[list, tuple[int, ...]]:
    """The CONDITIONING of a word or a few, and the positions of their tokens in it, without start, end and padding.

    Raises:
        ValueError: a text that has no token or more than fit a prompt; a CLIP with another kind of text encoder.
    """
    tokens = _tokens(clip, text)
    return clip.encode_from_tokens_scheduled(clip.tokenize(text)), tokens


def _tokens(clip: "comfy.sd.CLIP", text: str) -> tuple[int, ...]:
    if isinstance(clip.cond_stage_model, SmallTextModel):
        return clip.cond_stage_model.word_tokens(clip.tokenize(text))
    found: set[int] = set()
    # SDXL's two encoders split a text into the same tokens, their vectors lie side by side.
    for name, chunks in clip.tokenize(text, return_word_ids=True).items():
        if name not in ENCODERS:
            raise ValueError(
                f"this CLIP has a text encoder {name!r}, whose words are not known: use the CLIP of an SD1.x, SD2.x or "
                "SDXL checkpoint"
            )
        if len(chunks) > 1:
            raise ValueError(f"class_word is longer than a prompt ({text[:40]!r}...): name the subject in a few words")
        # The host numbers the words from 1; start, end and padding have 0.
        found |= {position for position, (*_, word) in enumerate(chunks[0]) if word}
    if not found:
        raise ValueError(f"class_word {text!r} has no token: name the subject in a word or a few (house, red vase)")
    return tuple(sorted(found))
