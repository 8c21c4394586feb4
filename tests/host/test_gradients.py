"""Gradients through the host's own model call, on small random UNets shaped like SD1.5."""

import comfy.hooks
import comfy.ldm.modules.attention
import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.sampler_helpers import convert_cond
from semantic_style.benchmarks.models import conditioning, small_sd15
from semantic_style.host.gradients import constant_controls, differentiable, ordinary
from semantic_style.samplers.features import FeatureTap, feature_blocks

POSITIVE, NEGATIVE = conditioning(1), conditioning(2)
SIGMA = 1.3


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """More threads than idle cores make such small layers many times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _as_the_host_runs_nodes():
    with torch.inference_mode():
        yield


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def load(model):
    """What the host does before it samples."""
    comfy.model_management.load_models_gpu([model])
    model.pre_run()
    return model


class Run:
    """One model call of the host on (x, sigma), as a guider makes it, and a scalar of its decoder features."""

    def __init__(self, model, *conds, dtype=torch.float32, shape=(1, 4, 8, 8), options=None, change=None):
        self.model, self.options = load(model), options or model.model_options
        self.x = 2 * draw(*shape, seed=3, dtype=dtype)
        self.sigma = torch.full((shape[0],), SIGMA)
        conds = {f"cond {i}": convert_cond(cond) for i, cond in enumerate(conds or (POSITIVE,))}
        comfy.samplers.preprocess_conds_hooks(conds)
        self.conds = list(comfy.samplers.process_conds(model.model, self.x, conds, self.x.device, self.x).values())
        self.tap = FeatureTap(feature_blocks(model.model.diffusion_model))

    def scalar(self, x, options, sigma=None, conds=None):
        to = self.tap.options(options.get("transformer_options"))
        out = comfy.samplers.calc_cond_batch(
            self.model.model,
            conds or self.conds,
            x,
            self.sigma if sigma is None else sigma,
            {**options, "transformer_options": to},
        )
        self.out = out
        probes = [draw(*f.shape, seed=10 + i, dtype=torch.float64) for i, f in enumerate(self.tap.features.values())]
        return sum((f.double() * p).mean() for f, p in zip(self.tap.features.values(), probes, strict=True))

    def value(self, x=None):
        """Without gradient, as the host would."""
        return self.scalar(self.x if x is None else x, self.options)

    def gradient(self, checkpointing=False, controls=False):
        with differentiable(self.model, self.options, checkpointing=checkpointing) as options:
            x = ordinary(self.x).requires_grad_()
            conds = constant_controls(ordinary(self.conds)) if controls else ordinary(self.conds)
            (g,) = torch.autograd.grad(self.scalar(x, options, ordinary(self.sigma), conds), x)
        return g

    def slope(self, direction, step):
        """Central difference of the scalar along a direction."""
        return (self.value(self.x + step * direction) - self.value(self.x - step * direction)) / (2 * step)


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        return small_sd15()


@pytest.mark.parametrize(("dtype", "step", "rtol"), [(torch.float64, 1e-4, 1e-6), (torch.float32, 1e-2, 3e-3)])
def test_the_gradient_is_the_finite_difference(dtype, step, rtol):
    run = Run(small_sd15(dtype=dtype), dtype=dtype)
    g = run.gradient()
    for seed in range(3):
        direction = draw(*g.shape, seed=seed, dtype=dtype)
        direction /= direction.norm()
        torch.testing.assert_close(
            (g * direction).sum().double(), run.slope(direction, step), rtol=rtol, atol=rtol * g.norm().item()
        )


def test_checkpointing_gives_the_same_gradient(model):
    run = Run(model, POSITIVE, NEGATIVE)
    assert torch.equal(run.gradient(checkpointing=True), run.gradient())
    assert all("forward" not in part.__dict__ for part in model.model.modules())
