"""Embedding files: names, what is written, how prompts name them."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from semantic_style.files.embedding_file import check_name, free_name, save_embedding, take_embeddings


def test_one_encoder_has_the_entry_that_everybody_reads(tmp_path):
    vectors = torch.randn(2, 4, dtype=torch.float64)
    save_embedding(tmp_path / "new" / "spin.safetensors", {"clip_h": vectors}, {"class_word": "house"})
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["spin.safetensors"]
    loaded = load_file(tmp_path / "new" / "spin.safetensors")
    assert list(loaded) == ["emb_params"]
    assert torch.equal(loaded["emb_params"], vectors.float())
    with safe_open(tmp_path / "new" / "spin.safetensors", "pt") as file:
        assert file.metadata() == {"class_word": "house"}


def test_two_encoders_have_an_entry_each(tmp_path):
    vectors = {"clip_l": torch.randn(1, 4), "clip_g": torch.randn(1, 6)}
    save_embedding(tmp_path / "spin.safetensors", vectors)
    loaded = load_file(tmp_path / "spin.safetensors")
    assert set(loaded) == set(vectors)
    assert all(torch.equal(loaded[k], v) for k, v in vectors.items())


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path):
    save_embedding(tmp_path / "spin.safetensors", {"w": torch.ones(1, 4)})
    with pytest.raises(TypeError):
        save_embedding(tmp_path / "spin.safetensors", {"w": torch.zeros(1, 4)}, {"number": 1})  # type: ignore[dict-item]
    assert [f.name for f in tmp_path.iterdir()] == ["spin.safetensors"]
    assert torch.equal(load_file(tmp_path / "spin.safetensors")["emb_params"], torch.ones(1, 4))


@pytest.mark.parametrize(
    ("there", "free"),
    [
        ([], "spin"),
        (["other.safetensors", "spinning.safetensors"], "spin"),
        (["spin.safetensors"], "spin_2"),
        (["Spin.PT"], "spin_2"),
        (["below/deep/spin.bin", "spin_2.safetensors"], "spin_3"),
        (["spin"], "spin_2"),
    ],
)
def test_a_free_name(tmp_path, there, free):
    for name in there:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert free_name("spin", [tmp_path / "missing", tmp_path]) == free


@pytest.mark.parametrize(
    "name", ["", "../spin", "a b", "a,b", "(a)", "a:b", "a.safetensors", ".hidden", "x" * 200, "<it>"]
)
def test_names_that_no_prompt_could_say(name):
    with pytest.raises(ValueError, match="name has letters"):
        check_name(name)


@pytest.mark.parametrize("name", ["spin", "spin-2.v1", "Haus_ß"])
def test_names_that_can_be_said(name):
    check_name(name)


LOADED = {"spin": torch.arange(8.0).reshape(2, 4), "one": torch.ones(4), "v1.5": torch.zeros(1, 4)}


@pytest.mark.parametrize(
    ("text", "left", "names"),
    [
        ("embedding:spin house", "<embedding-0> house", ["spin"]),
        ("red sky, embedding:one", "red sky, <embedding-0>", ["one"]),
        ("embedding:spin, embedding:one", "<embedding-0>, <embedding-1>", ["spin", "one"]),
        ("embedding:spin embedding:spin", "<embedding-0> <embedding-1>", ["spin", "spin"]),
        ("(embedding:spin house:1.2)", "(<embedding-0> house:1.2)", ["spin"]),
        ("(embedding:spin:1.2)", "(<embedding-0>:1.2)", ["spin"]),
        ("a\nembedding:spin\nb", "a\n<embedding-0>\nb", ["spin"]),
        ("an embedding:spin.", "an <embedding-0>.", ["spin"]),
        ("an embedding:v1.5 house", "an <embedding-0> house", ["v1.5"]),
        ("embedding:gone house", " house", []),
        ("noembedding:spin", "noembedding:spin", []),
        ("embedding: spin", "embedding: spin", []),
        ("nothing", "nothing", []),
    ],
)
def test_embeddings_in_a_prompt(text, left, names):
    got, found = take_embeddings(text, LOADED.get)
    assert got == left
    assert list(found) == [f"<embedding-{i}>" for i in range(len(names))]
    for vectors, name in zip(found.values(), names, strict=True):
        assert torch.equal(vectors, LOADED[name].reshape(-1, 4))
