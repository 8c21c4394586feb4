"""Models compiled by torch (TorchCompileModel): what this pack adds is compiled once, not at every layer or step."""

import comfy.samplers
import pytest
import torch
import torch._dynamo
from comfy_api.torch_helpers import set_torch_compile_wrapper
from semantic_style.benchmarks.random_models import conditioning, small_sd15
from semantic_style.host.apply_spin import apply_spin

pytestmark = pytest.mark.usefixtures("one_thread", "as_the_host_runs_nodes")

POSITIVE, NEGATIVE, REFERENCE = conditioning(1), conditioning(2), conditioning(3, tokens=5)
STEPS, SIZE = 3, (16, 24)


@pytest.fixture
def compiler():
    """A backend that compiles to the same, and how many graphs it was asked for."""
    torch._dynamo.reset()
    graphs = []

    def compile_nothing(graph, inputs):
        graphs.append(graph)
        return graph.forward

    yield compile_nothing, graphs
    torch._dynamo.reset()


def compiled(model, backend):
    clone = model.clone()
    set_torch_compile_wrapper(clone, backend=backend)
    return clone


def sample(model, seed=0):
    noise = torch.randn(1, 4, *SIZE, generator=torch.Generator().manual_seed(seed))
    sampler = comfy.samplers.KSampler(model, STEPS, model.load_device, "euler", "normal", 1.0, model.model_options)
    empty = torch.zeros_like(noise)
    return sampler.sample(noise, POSITIVE, NEGATIVE, 3.5, latent_image=empty, disable_pbar=True, seed=0)


def left_half():
    mask = torch.zeros(1, 8 * SIZE[0], 8 * SIZE[1])
    mask[..., : 4 * SIZE[1]] = 1
    return mask


def test_spin_is_compiled_with_the_network_once(compiler):
    backend, graphs = compiler
    model = small_sd15()
    with_spin = apply_spin(compiled(model, backend), REFERENCE, left_half())
    first, second = sample(with_spin), sample(with_spin, seed=1)
    assert len(graphs) == 1, "the network in one piece, for all steps of all runs"
    plain = apply_spin(model, REFERENCE, left_half())
    torch.testing.assert_close(first, sample(plain))
    torch.testing.assert_close(second, sample(plain, seed=1))
