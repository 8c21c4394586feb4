"""Inversions on disk: the same value back, and a clear word for every file that is none."""

import json
import logging

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from semantic_style.files.inversion_file import load_inversion, save_inversion
from semantic_style.samplers.ddim_inversion import ddim_inversion
from semantic_style.samplers.ddpm_inversion import ddpm_inversion, noised_path
from semantic_style.samplers.inversion import Inversion, ModelIdentity

SIGMAS = torch.tensor([10.0, 3.0, 1.0, 0.0])


def model(x, sigma):
    return 0.5 * x


def make(**changes):
    clean = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    inversion = ddpm_inversion(model, clean, SIGMAS, seed=9)
    return Inversion(**{**vars(inversion), "latent_format": "SD15", "cfg": 3.5, **changes})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


def parts(path):
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata()


def test_everything_comes_back(path):
    words = torch.randn(1, 7, 16)
    options = {
        "pooled_output": torch.randn(1, 8),
        "mask": torch.ones(1, 6, 5),
        "strength": 0.5,
        "area": ("percentage", 0.5, 1.0, 0.0, 0.25),
        "sizes": [1, [2, 3]],
        "default": None,
    }
    saved = make(
        scale=torch.tensor([1.0, 2.0, 3.0, 4.0]),
        shift=torch.zeros(4),
        model=ModelIdentity("UNet", "abc", ((1.0, 0.1), (2.0, 3.0)), "torch.float16"),
        positive=[[words, options], [words, {}]],
        negative=[[words[:, :3], {"pooled_output": None}]],
    )
    save_inversion(path, saved)
    loaded = load_inversion(path, shape=(2, 4, 6, 5))
    for name in ("kind", "seed", "cfg", "latent_format", "model"):
        assert getattr(loaded, name) == getattr(saved, name)
    for name in ("clean", "trajectory", "noise_maps", "residual", "sigmas", "scale", "shift"):
        assert torch.equal(getattr(loaded, name), getattr(saved, name))
    (first, first_options), (second, _) = loaded.positive
    assert torch.equal(first, words)
    assert torch.equal(second, words)
    assert first_options.keys() == options.keys()
    for key, value in options.items():
        same = (
            torch.equal(first_options[key], value) if isinstance(value, torch.Tensor) else first_options[key] == value
        )
        assert same, key
    assert torch.equal(loaded.negative[0][0], words[:, :3])
    assert list(path.parent.iterdir()) == [path]


def test_ddim_without_conditioning(path):
    saved = ddim_inversion(model, torch.randn(1, 4, 2, 3, 3), SIGMAS)
    save_inversion(path, saved)
    loaded = load_inversion(path)
    assert loaded.kind == "ddim"
    assert loaded.noise_maps is loaded.residual is loaded.model is loaded.positive is None
    assert torch.equal(loaded.trajectory, saved.trajectory)


def test_objects_of_the_host_are_left_out_with_a_warning(path, caplog):
    with caplog.at_level(logging.WARNING):
        save_inversion(path, make(positive=[[None, {"control": object(), "strength": 1.0}]]))
    assert "positive conditioning's 'control' (object)" in caplog.text
    assert load_inversion(path).positive == [[None, {"strength": 1.0}]]


def test_no_file_and_no_inversion(path):
    with pytest.raises(FileNotFoundError, match=r"a\.safetensors"):
        load_inversion(path)
    path.write_bytes(b"GIF89a" + bytes(100))
    with pytest.raises(ValueError, match="no safetensors file or is cut off"):
        load_inversion(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="not an inversion"):
        load_inversion(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_file(path, share):
    save_inversion(path, make())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match="cut off"):
        load_inversion(path)


def test_another_latent_size_or_channel_count(path):
    save_inversion(path, make())
    with pytest.raises(ValueError, match=r"\[2, 4, 6, 5\].*\[2, 4, 8, 8\]"):
        load_inversion(path, shape=(2, 4, 8, 8))
    tensors, metadata = parts(path)
    for bad in (torch.zeros(2, 2, 4, 6, 9), torch.zeros(2, 2, 16, 6, 5)):
        save_file({**tensors, "noise_maps": bad}, path, metadata)
        with pytest.raises(ValueError, match=r"a\.safetensors cannot be used: noise_maps has the shape"):
            load_inversion(path)


def test_damaged_and_newer_files(path):
    save_inversion(path, make())
    tensors, metadata = parts(path)
    save_file(tensors, path, {**metadata, "version": "99"})
    with pytest.raises(ValueError, match="version 99"):
        load_inversion(path)
    for header in ("not json", "[]", "{}", json.dumps({**json.loads(metadata["header"]), "positive": [{}]})):
        save_file(tensors, path, {**metadata, "header": header})
        with pytest.raises(ValueError, match="inversion file"):
            load_inversion(path)
    save_file({name: value for name, value in tensors.items() if name != "trajectory"}, path, metadata)
    with pytest.raises(ValueError, match="lacks trajectory"):
        load_inversion(path)
    save_file({**tensors, "clean": tensors["clean"] * torch.nan}, path, metadata)
    with pytest.raises(ValueError, match="NaN"):
        load_inversion(path)


def test_a_failed_save_leaves_the_old_file(path, monkeypatch):
    save_inversion(path, make())
    before = path.read_bytes()

    def full_disk(*args):
        raise OSError("no space left")

    monkeypatch.setattr("semantic_style.files.inversion_file.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_inversion(path, make(seed=1))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["part", "noised"])
def test_inversions_that_older_packs_cannot_know(path, kind):
    if kind == "part":
        saved = make(**vars(ddpm_inversion(model, torch.randn(2, 4, 6, 5), SIGMAS, skip=1)))
    else:
        saved = noised_path(torch.randn(2, 4, 6, 5), SIGMAS)
    save_inversion(path, saved)
    assert parts(path)[1]["version"] == "3"
    loaded = load_inversion(path)
    assert (loaded.kind, loaded.skipped, loaded.schedule_steps) == (saved.kind, saved.skipped, 3)
    assert torch.equal(loaded.trajectory, saved.trajectory)
    assert (loaded.noise_maps is None) == (kind == "noised")
