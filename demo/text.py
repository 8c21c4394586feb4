"""A tiny encoder for Paperland captions: one vector per word, plus the region that its phrase speaks of."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .scenes import COLORS, REGIONS, TEXTURES

PAD, START, END = "<pad>", "<start>", "<end>"
WORDS = (PAD, START, END, *COLORS, *TEXTURES, *REGIONS)
FILLERS = frozenset({"and", "a", "an", "the", "with", "of", "paper", "scene"})
LENGTH = 40  # tokens of every encoded caption, padding included
SLOTS = 12  # places within a phrase; words beyond share the last one
PSEUDO = re.compile(r"<[\w-]+>")

Token = tuple[str, int, int]  # word, region of its phrase (0: none, else 1 + index), place in the phrase


def parse(text: str, extra: frozenset[str] = frozenset()) -> tuple[list[Token], list[str]]:
    """Split a caption into tokens and the words that are not in the vocabulary.

    Phrases are separated by commas or full stops; a phrase belongs to the last region word in it. `extra` are the
    pseudo-words
    that may be used besides the vocabulary.
    """
    tokens: list[Token] = []
    unknown: list[str] = []
    for phrase in re.split(r"[,.;\n]", text.lower()):
        words = [w for w in re.findall(r"<[\w-]+>|[a-z]+", phrase) if w not in FILLERS]
        known = [w for w in words if w in _INDEX or w in extra]
        unknown += [w for w in words if w not in known]
        region = next((1 + REGIONS.index(w) for w in reversed(known) if w in REGIONS), 0)
        tokens += [(w, region, min(place, SLOTS - 1)) for place, w in enumerate(known)]
    return tokens, unknown


_INDEX = {word: i for i, word in enumerate(WORDS)}


class CaptionEncoder(nn.Module):
    """Captions to tokens [B, LENGTH, channels]. The empty caption is the null condition of classifier-free guidance.

    The first token is always `<start>`, as in CLIP, so code that leaves the first token out works here too.
    """

    def __init__(self, channels: int = 128) -> None:
        super().__init__()
        self.word = nn.Embedding(len(WORDS), channels)
        self.region = nn.Embedding(1 + len(REGIONS), channels)
        self.place = nn.Embedding(SLOTS, channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, captions: list[str], pseudo: Mapping[str, Tensor] | None = None) -> Tensor:
        """Encode captions.

        Args:
            captions: texts in the vocabulary `WORDS`; other words are left out (`parse` names them).
            pseudo: vectors [n, channels] of pseudo-words such as "<it>"; each stands for n tokens in the place of that
                word.

        Returns:
            [B, LENGTH, channels] on the encoder's device and of its dtype.

        Raises:
            ValueError: a caption has more tokens than fit.
        """
        pseudo = pseudo or {}
        return torch.stack([self._encode(c, pseudo) for c in captions])

    def _encode(self, caption: str, pseudo: Mapping[str, Tensor]) -> Tensor:
        tokens, _ = parse(caption, frozenset(pseudo))
        words: list[Tensor] = [self._word(START)]
        regions, places = [0], [0]
        for word, region, place in tokens:
            vectors = pseudo[word].to(self.word.weight) if word in pseudo else self._word(word)
            words.append(vectors)
            regions += [region] * len(vectors)
            places += [place] * len(vectors)
        if (count := len(regions) + 1) > LENGTH:
            raise ValueError(f"caption has {count} tokens, {LENGTH} fit: name fewer regions ({caption!r})")
        rest = LENGTH - count
        words += [self._word(END), self._word(PAD).expand(rest, -1)]
        device = self.word.weight.device
        where = torch.tensor([regions + [0] * (rest + 1), places + [0] * (rest + 1)], device=device)
        return self.norm(torch.cat(words) + self.region(where[0]) + self.place(where[1]))

    def _word(self, word: str) -> Tensor:
        return self.word.weight[_INDEX[word]][None]
