"""What is asked of the host where its versions differ."""

import comfy.model_management
import pytest
import torch
from semantic_style.benchmarks.random_models import small_sd15
from semantic_style.host.versions import free_memory, is_oom, lends_weights, memory_of, storage_of

CPU = torch.device("cpu")


def test_out_of_memory_is_told_from_other_faults():
    assert is_oom(torch.cuda.OutOfMemoryError("too big"))
    assert not is_oom(RuntimeError("too big"))


def test_the_host_s_own_word_on_memory_counts(monkeypatch):
    """Where it has one: accelerators have faults of their own, and a model knows what of itself can go."""
    fault, model = RuntimeError("accelerator: out of memory"), small_sd15()
    monkeypatch.setattr(comfy.model_management, "is_oom", lambda error: error is fault, raising=False)
    assert is_oom(fault)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_: 5)
    assert free_memory(model, CPU) == 5
    monkeypatch.setattr(model, "get_free_memory", lambda device: 7 if device == CPU else 0, raising=False)
    assert free_memory(model, CPU) == 7


def test_an_accelerator_out_of_memory():
    error = getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory")
    assert is_oom(error) == hasattr(comfy.model_management, "is_oom")


def test_weights_on_another_device_than_the_model_s_go_through_a_buffer(monkeypatch):
    """On hosts that have one; only weights that are cast when they are used."""
    model = small_sd15()
    layer = model.model.diffusion_model.out[2]
    monkeypatch.setattr(comfy.model_management, "get_cast_buffer", lambda *_: None, raising=False)
    assert not lends_weights(model)
    monkeypatch.setattr(layer, "comfy_cast_weights", True)
    assert not lends_weights(model)
    layer.weight = torch.nn.Parameter(layer.weight.to("meta"), requires_grad=False)
    assert lends_weights(model)
    monkeypatch.delattr(comfy.model_management, "get_cast_buffer")
    assert not lends_weights(model)


@pytest.mark.parametrize(
    ("dtype", "storage"),
    [
        (torch.float32, (32, "torch.float32")),
        (torch.float16, (16, "torch.float16")),
        (torch.float8_e4m3fn, (8, "torch.float8_e4m3fn")),
    ],
)
def test_storage_of_ordinary_weights(dtype, storage):
    weight = torch.zeros(4, 4).to(dtype)
    assert storage_of(weight) == storage
    assert memory_of(weight) == (weight,)
