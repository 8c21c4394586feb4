"""The nodes that keep inversions in ComfyUI's folders, and AdaIN of latents as a node."""

import os
from pathlib import Path

import folder_paths
import pytest
import torch
from semantic_style.nodes.nodes_adain import AdaIN, MapFromLabels
from semantic_style.nodes.nodes_files import LoadInversion, SaveInversion
from semantic_style.nodes.schema import schema
from semantic_style.regions.adain import adain
from semantic_style.samplers.ddpm_inversion import ddpm_inversion


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """ComfyUI's input and output folders, empty."""
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    return tmp_path


@pytest.fixture
def inversion():
    clean = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    return ddpm_inversion(lambda x, sigma: 0.5 * x, clean, torch.tensor([5.0, 1.0, 0.0]), seed=3)


def save(inversion, prefix="inversions/inversion"):
    return SaveInversion.execute(inversion, prefix).args[0]


def choices():
    return LoadInversion.define_schema().inputs[0].options


def test_many_other_files_are_read_once(folders, inversion, monkeypatch):
    """The list is asked for at every look at the nodes and every queueing."""
    everything = [Path(folder_paths.get_input_directory()), Path(folder_paths.get_output_directory(), "inversions")]
    for folder in everything:
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(20):
            (folder / f"{i}.png").touch()
        then = folder.stat().st_mtime_ns - 60 * 10**9
        os.utime(folder, ns=(then, then))
    before = choices()
    monkeypatch.setattr(os, "scandir", lambda path: pytest.fail(f"{path} was read again"))
    assert choices() == before


def test_saved_files_are_numbered_listed_and_loaded(folders, inversion):
    names = [save(inversion), save(inversion)]
    assert names == [f"inversions/inversion_0000{i}_.safetensors [output]" for i in (1, 2)]
    assert choices() == names
    (folders / "output" / names[0].removesuffix(" [output]")).rename(folders / "input" / "mine.safetensors")
    assert choices() == ["mine.safetensors", names[1]]
    for name in choices():
        assert LoadInversion.validate_inputs(name) is True
        loaded = LoadInversion.execute(name).args[0]
        assert torch.equal(loaded.noise_maps, inversion.noise_maps)
        assert loaded.seed == 3


def test_a_changed_file_is_read_again(folders, inversion):
    name = save(inversion)
    path = folders / "output" / name.removesuffix(" [output]")
    before = LoadInversion.fingerprint_inputs(file=name)
    assert LoadInversion.fingerprint_inputs(file=name) == before
    os.utime(path, ns=(1, 1))
    assert LoadInversion.fingerprint_inputs(file=name) != before


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "../secret.safetensors [output]", "a/../../secret.safetensors", "."],
)
def test_names_that_lead_out_of_the_folders_are_refused(folders, inversion, name):
    (folders / "secret.safetensors").write_bytes(b"")
    assert "below ComfyUI's input or output folder" in LoadInversion.validate_inputs(name)
    with pytest.raises(ValueError, match="below ComfyUI's"):
        LoadInversion.execute(name)


def test_links_in_the_folders_may_lead_anywhere(folders, inversion):
    name = save(inversion).removesuffix(" [output]")
    (folders / "output" / name).rename(folders / "elsewhere.safetensors")
    (folders / "input" / "link.safetensors").symlink_to(folders / "elsewhere.safetensors")
    assert choices() == ["link.safetensors"]
    assert LoadInversion.execute("link.safetensors").args[0].seed == 3


def test_a_missing_file_and_an_escaping_prefix(folders, inversion):
    assert "there is no inversion" in LoadInversion.validate_inputs("gone.safetensors")
    with pytest.raises(FileNotFoundError):
        LoadInversion.execute("gone.safetensors")
    with pytest.raises(Exception, match="outside the output folder"):
        save(inversion, "../../escaped")
    assert not list(folders.parent.glob("escaped*"))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def semantic_map(content, style):
    return MapFromLabels.execute(content, style).args[0]


def test_adain_of_different_sizes_keeps_what_else_is_in_the_latent():
    content, style = random(2, 4, 9, 7), 3 + random(1, 4, 5, 12, seed=1)
    mask = torch.ones(1, 9, 7)
    out = AdaIN.execute({"samples": content, "noise_mask": mask}, {"samples": style}, 1.0).args[0]
    assert torch.equal(out["samples"], adain(content, style))
    assert out["noise_mask"] is mask
    assert torch.equal(AdaIN.execute({"samples": content}, {"samples": style}, 0.0).args[0]["samples"], content)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_regions_at_pixel_size_restyle_latents_of_different_sizes(dtype):
    content, style = random(1, 4, 8, 6), random(1, 4, 4, 10, seed=1)
    style[..., :5] += 10.0
    labels_c, labels_s = torch.zeros(1, 64, 48, dtype=dtype), torch.zeros(1, 32, 80, dtype=dtype)
    labels_c[:, 32:] = 1
    labels_s[..., 40:] = 1
    regions = semantic_map(labels_c, labels_s)
    out = AdaIN.execute({"samples": content}, {"samples": style}, 1.0, regions).args[0]["samples"]
    for mine, theirs in ((out[..., :4, :], style[..., :5]), (out[..., 4:, :], style[..., 5:])):
        torch.testing.assert_close(mine.mean((2, 3)), theirs.mean((2, 3)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("maps", [1, 2, 6])
def test_regions_of_videos(maps):
    content, style = random(2, 4, 3, 8, 8), 5 + random(1, 4, 6, 6, seed=1)
    labels_c = torch.zeros(maps, 8, 8, dtype=torch.int64)
    labels_c[:, 4:] = 1
    labels_s = torch.zeros(1, 6, 6, dtype=torch.int64)
    labels_s[:, 3:] = 1
    regions = semantic_map(labels_c, labels_s)
    out = AdaIN.execute({"samples": content}, {"samples": style}, 1.0, regions).args[0]["samples"]
    assert out.shape == content.shape
    for frame in out.flatten(0, 0).transpose(1, 2).flatten(0, 1):
        torch.testing.assert_close(frame[:, :4].mean((1, 2)), style[0, :, :3].mean((1, 2)), rtol=0, atol=1e-4)


def test_refusals_say_what_to_do():
    with pytest.raises(ValueError, match="channels"):
        AdaIN.execute({"samples": random(1, 4, 8, 8)}, {"samples": random(1, 16, 8, 8)}, 1.0)
    with pytest.raises(ValueError, match="integer"):
        semantic_map(torch.zeros(1, 8, 8), torch.zeros(1, 8, 8, dtype=torch.int64))
    regions = semantic_map(torch.zeros(1, 8, 8, dtype=torch.int64), torch.zeros(1, 8, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="one for each of 3, got 2"):
        AdaIN.execute({"samples": random(3, 4, 8, 8)}, {"samples": random(2, 4, 8, 8)}, 1.0, regions)


def test_schema_keywords_of_other_host_versions_are_left_out():
    assert (
        schema(node_id="SemanticStyleTest", search_aliases=["x"], from_the_future=True).node_id == "SemanticStyleTest"
    )
