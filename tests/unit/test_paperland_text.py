"""The caption encoder: parsing, padding, the null caption, pseudo-words."""

import pytest
import torch
from semantic_style.paperland import text


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return text.CaptionEncoder(16).eval()


def test_parse_gives_every_word_its_region_and_place():
    tokens, unknown = text.parse("Red and blue striped sky, a fluffy green sun")
    sky, sun = 1, 2
    assert tokens == [
        ("red", sky, 0),
        ("blue", sky, 1),
        ("striped", sky, 2),
        ("sky", sky, 3),
        ("green", sun, 0),
        ("sun", sun, 1),
    ]
    assert unknown == ["fluffy"]


def test_phrase_without_region():
    assert text.parse("red dotted")[0] == [("red", 0, 0), ("dotted", 0, 1)]


def test_length_is_fixed_and_the_order_of_phrases_does_not_matter(encoder):
    a, b = encoder(["red sky, blue sun", "blue sun, red sky"])
    assert a.shape == (text.LENGTH, 16)
    assert torch.equal(a[0], b[0])
    assert torch.allclose(torch.sort(a, dim=0).values, torch.sort(b, dim=0).values)


def test_word_binds_to_its_region(encoder):
    a, b = encoder(["red sky, blue sun", "blue sky, red sun"])
    assert not torch.allclose(torch.sort(a, dim=0).values, torch.sort(b, dim=0).values)


def test_null_caption_is_start_end_and_padding(encoder):
    (null,) = encoder([""])
    assert torch.equal(null[2], null[-1])
    assert not torch.equal(null[0], null[1])
    assert torch.equal(encoder(["gibberish"])[0], null)


def test_pseudo_word_takes_the_place_of_a_word(encoder):
    vectors = {"<it>": encoder.word.weight[text.WORDS.index("red")][None]}
    assert torch.equal(encoder(["<it> sky"], vectors), encoder(["red sky"]))
    two = {"<it>": torch.randn(2, 16)}
    assert not torch.equal(encoder(["<it> sky"], two), encoder(["red sky"]))
    assert torch.equal(encoder(["<it> sky"]), encoder(["sky"]))


def test_gradient_reaches_a_pseudo_word(encoder):
    vector = torch.randn(1, 16, requires_grad=True)
    encoder(["a red <it>"], {"<it>": vector}).square().sum().backward()
    assert vector.grad is not None


def test_too_long_a_caption_is_refused(encoder):
    with pytest.raises(ValueError, match=f"{text.LENGTH} fit"):
        encoder([", ".join(["red and blue striped sky"] * 10)])


def test_an_embedding_is_no_unknown_word():
    tokens, unknown = text.parse("embedding:My-red.v2 house, (embedding:sky:1.2) red sky")
    assert [word for word, _, _ in tokens] == ["house", "red", "sky"]
    assert unknown == []


def test_words_are_what_a_pseudo_word_starts_from(encoder):
    vectors = encoder.words("a red house")
    assert torch.equal(vectors, encoder.word.weight[[text.WORDS.index("red"), text.WORDS.index("house")]])
    assert torch.equal(encoder(["<it>, blue sky"], {"<it>": vectors[:1]}), encoder(["red, blue sky"]))
    with pytest.raises(ValueError, match="knows none of the words in 'vase'"):
        encoder.words("vase")


@pytest.mark.parametrize(
    ("template", "class_word", "prompt"),
    [
        ("<it>", "house", "<it> house"),
        ("<it>", "red sky", "<it> sky"),
        ("<it> house", "house", "<it> house"),
        ("red <it>, blue sky", "house", "red <it> house, blue sky"),
        ("<it> house, <it> roof", "house", "<it> house, <it> roof"),
        ("blue sky", "house", "blue sky"),
        ("<it>", "red", "<it>"),
    ],
)
def test_a_template_without_region_gets_the_class_word_s(encoder, template, class_word, prompt):
    assert encoder.prompt(template, class_word) == prompt
