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
IT = "<it>"  # the pseudo-word of a template
SLOTS = 12  # places within a phrase; words beyond share the last one

Token = tuple[str, int, int]  # word, region of its phrase (0: none, else 1 + index), place in the phrase


def parse(text: str, extra: frozenset[str] = frozenset()) -> tuple[list[Token], list[str]]:
    """Split a caption into tokens and the words that are not in the vocabulary.

    Phrases are separated by commas or full stops; a phrase belongs to the last region word in it. `extra` are the
    pseudo-words that may be used besides the vocabulary. An `embedding:name` is no word: who encodes a caption puts a
    pseudo-word there before.
    """
    tokens: list[Token] = []
    unknown: list[str] = []
    for phrase in re.split(r"[,.;\n]", _EMBEDDING.sub(" ", text.lower())):
        words = [w for w in re.findall(r"<[\w-]+>|[a-z]+", phrase) if w not in FILLERS]
        known = [w for w in words if w in _INDEX or w in extra]
        unknown += [w for w in words if w not in known]
        region = next((1 + REGIONS.index(w) for w in reversed(known) if w in REGIONS), 0)
        tokens += [(w, region, min(place, SLOTS - 1)) for place, w in enumerate(known)]
    return tokens, unknown


_EMBEDDING = re.compile(r"\bembedding:[^\s,;:()]+")
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
                word. A phrase's region comes from its other words: "<it> house".

        Returns:
            [B, LENGTH, channels] on the encoder's device and of its dtype.

        Raises:
            ValueError: a caption has more tokens than fit.
        """
        pseudo = pseudo or {}
        return torch.stack([self._encode(c, pseudo) for c in captions])

    def words(self, text: str, pseudo: Mapping[str, Tensor] | None = None) -> Tensor:
        """Vectors [n, channels] of the words of `text` that are in the vocabulary or pseudo-words, before region and
        place are added: what a pseudo-word can start from. Those of the encoded text follow its first token in this
        order. Raises ValueError where there is none."""
        pseudo = pseudo or {}
        known = [word for word, _, _ in parse(text, frozenset(pseudo))[0]]
        if not known:
            raise ValueError(f"Paperland knows none of the words in {text!r}; it knows {', '.join(WORDS[3:])}")
        return torch.cat([self._vectors(word, pseudo) for word in known])

    def prompt(self, template: str, class_word: str) -> str:
        """The template with the class word's region after "<it>" in phrases that name no region: without one a phrase
        speaks of nothing in particular."""
        regions = [word for word in parse(class_word)[0] if word[1]]

        def complete(phrase: str) -> str:
            tokens, _ = parse(phrase, frozenset({IT}))
            if not regions or not tokens or tokens[0][1]:
                return phrase
            return phrase.replace(IT, f"{IT} {REGIONS[regions[-1][1] - 1]}")

        return "".join(complete(part) for part in re.split(r"([,.;\n])", template))

    def _encode(self, caption: str, pseudo: Mapping[str, Tensor]) -> Tensor:
        tokens, _ = parse(caption, frozenset(pseudo))
        words: list[Tensor] = [self._word(START)]
        regions, places = [0], [0]
        for word, region, place in tokens:
            vectors = self._vectors(word, pseudo)
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

    def _vectors(self, word: str, pseudo: Mapping[str, Tensor]) -> Tensor:
        return pseudo[word].to(self.word.weight) if word in pseudo else self._word(word)

    def _word(self, word: str) -> Tensor:
        return self.word.weight[_INDEX[word]][None]
