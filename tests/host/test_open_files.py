"""Files that the pack has read can be deleted and replaced while it runs, as Windows asks for: nothing stays mapped."""

from pathlib import Path

import folder_paths
import pytest
import torch
from semantic_style.benchmarks.random_models import conditioning, small_sd15
from semantic_style.benchmarks.text_models import small_clip
from semantic_style.files.embedding_file import save_embedding
from semantic_style.host.pseudo_words import make_prompt
from semantic_style.nodes.nodes_files import LoadInversion, SaveInversion
from semantic_style.nodes.nodes_inversion import DDPMInversion
from semantic_style.nodes.nodes_paperland import LoadPaperland

pytestmark = pytest.mark.usefixtures("one_thread", "as_the_host_runs_nodes")


def mapped():
    """Safetensors and embedding files that are part of this process's memory, deleted ones too."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in lines if ".safetensors" in line or "semantic-style" in line}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "embeddings", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path


def test_mapped_files_are_seen(folder):
    from safetensors.torch import load_file

    save_embedding(folder / "one.safetensors", {"clip_l": torch.zeros(1, 8)})
    before = mapped()
    held = load_file(folder / "one.safetensors")
    assert held.keys() == {"emb_params"}
    assert mapped() - before == {str(folder / "one.safetensors")}


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl", "demo"])
def test_a_prompt_around_a_pseudo_word_holds_no_file(folder, kind):
    before = mapped()
    if kind == "demo":
        clip = LoadPaperland.execute("fp32").result[1]
    else:
        clip = small_clip(kind)
    width = {k: v.shape[1] for k, v in make_prompt(clip, "<it>", "house", 1).start.items()}
    save_embedding(folder / "mine.safetensors", {k: torch.zeros(1, w) for k, w in width.items()})
    prompt = make_prompt(clip, "(<it>:1.2) before embedding:mine", "house", 2)
    assert prompt.tokens
    assert mapped() == before


def test_an_inversion_from_a_file_holds_it_not():
    before, prompt = mapped(), conditioning(1)
    image = {"samples": torch.zeros(1, 4, 8, 8)}
    made = DDPMInversion.execute(small_sd15(), prompt, prompt, image, 1, "normal", 1.0, 0).args[0]
    loaded = LoadInversion.execute(SaveInversion.execute(made, "inversions/mapped").args[0]).args[0]
    assert loaded.positive is not None
    assert mapped() == before
