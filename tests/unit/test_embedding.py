"""Learning a pseudo-word: the loss, the steps against an independent computation, what is best, what is refused."""

import math

import pytest
import torch
from semantic_style.paperland import model as paperland
from semantic_style.paperland import scenes
from semantic_style.paperland.text import WORDS
from semantic_style.paperland.unet import UNetConfig
from semantic_style.samplers.word_learning import JUDGED_LEVELS, Learned, LearningSettings, learn, masked_loss

LEVELS = torch.linspace(0.1, 5.0, 40, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_mask(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def painter(vectors: dict) -> torch.Tensor:
    """A prompt whose meaning is a colour [3]: what `colour_model` believes every place to be."""
    return vectors["w"].mean(dim=0)


def colour_model(x: torch.Tensor, sigma: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
    """Believes half what it sees, half that everything has one colour."""
    return 0.5 * x + 0.5 * torch.tanh(colour).reshape(1, -1, *[1] * (x.ndim - 2))


def test_loss_is_the_weighted_mean_of_each_row():
    eps, predicted, saliency = normal(2, 3, 4, 5), normal(2, 3, 4, 5, seed=1), a_mask(2, 4, 5)
    rows = []
    for b in range(2):
        above = below = 0.0
        for i in range(4):
            for j in range(5):
                for c in range(3):
                    above += float(saliency[b, i, j] * (eps[b, c, i, j] - predicted[b, c, i, j]) ** 2)
                below += 3 * float(saliency[b, i, j])
        rows.append(above / below)
    assert masked_loss(eps, predicted, saliency).item() == pytest.approx(sum(rows) / 2, rel=1e-12)


def test_loss_with_an_axis_between_channels_and_places():
    eps, predicted, saliency = normal(1, 3, 2, 4, 5), normal(1, 3, 2, 4, 5, seed=1), a_mask(1, 4, 5)
    frames = [masked_loss(eps[:, :, f], predicted[:, :, f], saliency) for f in range(2)]
    assert masked_loss(eps, predicted, saliency).item() == pytest.approx(float(sum(frames)) / 2, rel=1e-12)


def test_loss_does_not_see_what_is_outside():
    eps, predicted, saliency = normal(1, 3, 4, 4), normal(1, 3, 4, 4, seed=1), torch.zeros(1, 4, 4).double()
    saliency[:, :2] = 1
    changed = predicted.clone()
    changed[..., 2:, :] += 100
    assert masked_loss(eps, changed, saliency) == masked_loss(eps, predicted, saliency)
    assert masked_loss(eps, changed, torch.ones_like(saliency)) > 100


def by_hand(start, clean, saliency, settings, steps):
    """The same run with differences for the gradient and AdamW written out. Draws: the fixed noises, then per step the
    timesteps and the noise."""
    generator = torch.Generator().manual_seed(settings.seed)
    torch.randn((JUDGED_LEVELS, *clean.shape[1:]), generator=generator, dtype=clean.dtype)
    v, m, u = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    losses = []
    for step in range(1, steps + 1):
        t = torch.randint(len(LEVELS), (settings.batch,), generator=generator)
        eps = torch.randn((settings.batch, *clean.shape[1:]), generator=generator, dtype=clean.dtype)

        def loss(vectors, t=t, eps=eps, step=step):
            total = 0.0
            for row in range(settings.batch):
                picture = ((step - 1) * settings.batch + row) % len(clean)
                s, mask = LEVELS[t[row]], saliency[picture % len(saliency)]
                x = clean[picture] + s * eps[row]
                denoised = 0.5 * x + 0.5 * torch.tanh(vectors.mean(dim=0))[:, None, None]
                error = (eps[row] - (x - denoised) / s) ** 2
                total += float((mask * error).sum() / (mask.sum() * len(clean[0])))
            return total / settings.batch

        gradient = torch.zeros_like(v)
        for at in range(v.numel()):
            h = torch.zeros_like(v)
            h.view(-1)[at] = 1e-5
            gradient.view(-1)[at] = (loss(v + h) - loss(v - h)) / 2e-5
        losses.append(loss(v))
        m, u = 0.9 * m + 0.1 * gradient, 0.999 * u + 0.001 * gradient**2
        v = v * (1 - settings.learning_rate * settings.weight_decay)
        v = v - settings.learning_rate * (m / (1 - 0.9**step)) / ((u / (1 - 0.999**step)).sqrt() + 1e-8)
    return v, losses


@pytest.mark.parametrize(("pictures", "masks", "batch"), [(1, 1, 1), (3, 1, 2), (2, 2, 3)])
def test_steps_are_adamw_on_the_loss(pictures, masks, batch):
    clean, saliency, start = normal(pictures, 3, 4, 5), a_mask(masks, 4, 5), normal(2, 3, seed=4)
    settings = LearningSettings(steps=5, learning_rate=0.05, weight_decay=0.1, batch=batch, seed=9, checks=5)
    seen = []
    learn(colour_model, painter, {"w": start}, clean, saliency, LEVELS, settings, lambda s: seen.append(s["learned"]))
    vectors, losses = by_hand(start, clean, saliency, settings, 5)
    assert seen[-1].losses == pytest.approx(losses, rel=1e-9)
    # Judged after every step: where the last is the best, these are its vectors.
    best = seen[-1].step
    expected, _ = by_hand(start, clean, saliency, settings, best)
    assert torch.allclose(seen[-1].vectors["w"], expected, atol=1e-7)
    assert vectors.shape == expected.shape


def test_the_subject_s_colour_is_found_and_without_saliency_the_background_leaks_in():
    clean, saliency = torch.full((1, 3, 8, 8), -0.6).double(), torch.zeros(1, 8, 8).double()
    clean[..., :4, :4] = 0.7
    saliency[:, :4, :4] = 1
    settings = LearningSettings(steps=400, learning_rate=0.02, weight_decay=0.0, batch=4, checks=10)
    found = [
        learn(colour_model, painter, {"w": torch.zeros(1, 3)}, clean, s, LEVELS, settings).vectors["w"].tanh().mean()
        for s in (saliency, torch.ones_like(saliency))
    ]
    assert found[0] == pytest.approx(0.7, abs=0.1)
    assert found[1] == pytest.approx(0.25 * 0.7 - 0.75 * 0.6, abs=0.1)


def a_run(seed: int = 0, callback=None, **settings) -> Learned:
    settings = {"steps": 8, "learning_rate": 0.05, "batch": 2, "checks": 4} | settings
    return learn(
        colour_model,
        painter,
        {"w": normal(2, 3, seed=4)},
        normal(1, 3, 4, 4),
        a_mask(1, 4, 4),
        LEVELS,
        LearningSettings(seed=seed, **settings),
        callback,
    )


def test_same_seed_same_vectors_and_nobody_else_s_randomness():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = a_run(), a_run(), a_run(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.vectors["w"], same.vectors["w"])
    assert one.losses == same.losses
    assert one.losses != other.losses


def test_arguments_stay_as_they_are():
    start, clean, saliency = normal(1, 3), normal(1, 3, 4, 4), a_mask(1, 4, 4)
    copies = [t.clone() for t in (start, clean, saliency)]
    learn(colour_model, painter, {"w": start}, clean, saliency, LEVELS, LearningSettings(steps=3, checks=1))
    assert all(torch.equal(a, b) for a, b in zip((start, clean, saliency), copies, strict=True))
    assert not start.requires_grad


def test_the_best_that_was_judged_is_given_back():
    wild = a_run(learning_rate=0.2, steps=12, checks=12)
    assert set(wild.judged) == set(range(13))
    assert wild.step == min(wild.judged, key=wild.judged.get)
    assert 0 < wild.step < 12, "the case should have its best in the middle"
    # Judging the vectors again gives the figure that they were chosen by.
    again = learn(
        colour_model,
        painter,
        wild.vectors,
        normal(1, 3, 4, 4),
        a_mask(1, 4, 4),
        LEVELS,
        LearningSettings(steps=1, checks=1),
    )
    assert again.judged[0] == pytest.approx(wild.judged[wild.step], rel=1e-12)
    assert torch.equal(again.before, wild.after)


def test_checks_are_spread_over_the_run():
    assert LearningSettings(steps=200).judged_at == {0, 25, 50, 75, 100, 125, 150, 175, 200}
    assert LearningSettings(steps=1).judged_at == {0, 1}
    assert LearningSettings(steps=3, checks=8).judged_at == {0, 1, 2, 3}


@pytest.mark.parametrize(("stop", "step"), [(1, 2), (5, 4)])
def test_a_run_that_is_broken_off_leaves_what_it_learnt(stop, step):
    """Before anything but the start was judged the latest vectors, then the best."""
    seen = []

    def callback(state):
        seen.append(state["learned"])
        if state["i"] == stop:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        a_run(callback=callback, steps=16, checks=4)
    whole = a_run(steps=step, checks=1)
    assert seen[-1].step == step
    assert len(seen[-1].losses) == stop + 1
    assert torch.equal(seen[-1].vectors["w"], whole.vectors["w"])


def test_in_inference_mode_as_a_host_runs_nodes():
    plain = a_run()
    with torch.inference_mode():
        inside = a_run()
    assert torch.equal(plain.vectors["w"], inside.vectors["w"])
    assert not inside.vectors["w"].is_inference()


class InHalf(torch.autograd.Function):
    """Passes values through and gradients as a model in half precision does."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.half().to(gradient.dtype)


@pytest.mark.parametrize("factor", [1e-4, 3e4])
def test_half_precision_neither_loses_nor_overflows_the_gradient(factor):
    """Gradients of this size inside the model, however small a part of the loss a place is."""
    args = (
        {"w": torch.zeros(1, 3)},
        normal(1, 3, 16, 16).float(),
        torch.ones(1, 16, 16),
        LEVELS,
        LearningSettings(steps=1),
    )

    def model(x, sigma, colour):
        return colour_model(x, sigma, InHalf.apply(colour / factor) * factor)

    in_half, plain = (learn(p, painter, *args).vectors["w"] for p in (model, colour_model))
    assert plain.abs().min() > 4e-4
    assert torch.allclose(in_half, plain, atol=1e-6)


def test_the_cleanest_levels_can_be_left_out():
    seen = []

    def model(x, sigma, colour):
        seen.extend(sigma.tolist())
        return colour_model(x, sigma, colour)

    settings = LearningSettings(steps=60, batch=2, checks=1, skip_clean=0.3)
    args = {"w": torch.zeros(1, 3)}, normal(1, 3, 4, 4), a_mask(1, 4, 4), LEVELS
    learn(model, painter, *args, settings)
    assert set(seen) <= set(LEVELS[12:].tolist())
    assert min(seen) == LEVELS[12]
    assert max(seen) == LEVELS[-1]


def test_two_encoders_learn_together():
    start = {"l": normal(2, 3), "g": normal(2, 5, seed=1)}

    def both(vectors):
        return vectors["l"].mean(dim=0) + vectors["g"].mean(dim=0)[:3]

    out = learn(
        colour_model, both, start, normal(1, 3, 4, 4), a_mask(1, 4, 4), LEVELS, LearningSettings(steps=4, checks=1)
    )
    assert not torch.equal(out.vectors["l"], start["l"])
    assert not torch.equal(out.vectors["g"][:, :3], start["g"][:, :3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"saliency": torch.zeros(1, 4, 4)}, "mask is empty"),
        ({"saliency": torch.ones(1, 8, 8)}, "does not fit"),
        ({"saliency": torch.ones(2, 4, 4)}, "one for each picture"),
        ({"saliency": torch.full((1, 4, 4), math.nan)}, "finite and from 0 to 1"),
        ({"saliency": torch.full((1, 4, 4), 255.0)}, "finite and from 0 to 1"),
        ({"clean": torch.full((1, 3, 4, 4), math.nan)}, "NaN"),
        ({"clean": torch.zeros(1, 3, 4)}, "two axes of positions"),
        ({"levels": torch.zeros(5)}, "above 0"),
        ({"levels": LEVELS.flip(0)}, "must rise"),
        ({"start": {}}, "no vectors"),
        ({"start": {"w": torch.zeros(0, 3)}}, "number, width"),
        ({"start": {"w": torch.full((1, 3), math.inf)}}, "finite"),
        ({"encode": lambda vectors: torch.zeros(3)}, "must contain the pseudo-word"),
        ({"encode": lambda vectors: vectors["w"][0]}, "must contain the pseudo-word"),
        ({"predict": lambda x, sigma, colour: x[:, :1] + colour[0]}, "model returned"),
    ],
)
def test_refusals(change, message):
    given = {
        "predict": colour_model,
        "encode": painter,
        "start": {"w": torch.zeros(1, 3), "other": torch.zeros(1, 3)},
        "clean": torch.zeros(1, 3, 4, 4),
        "saliency": torch.ones(1, 4, 4),
        "levels": LEVELS,
    }
    with pytest.raises(ValueError, match=message):
        learn(**given | change, settings=LearningSettings(steps=2))


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"batch": 0},
        {"checks": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"weight_decay": -1.0},
        {"skip_clean": 1.0},
        {"skip_clean": -0.1},
    ],
)
def test_settings_out_of_range(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        LearningSettings(**change)


def test_a_loss_that_is_not_finite_names_step_level_and_dtype():
    class Breaks:
        dtype = torch.float16
        calls = 0

        def __call__(self, x, sigma, colour):
            self.calls += 1
            return colour_model(x, sigma, colour) * (math.nan if self.calls == 4 else 1.0)

    with pytest.raises(FloatingPointError, match=r"loss .* step 3, sigma [\d.]+, with the model in torch.float16"):
        learn(
            Breaks(),
            painter,
            {"w": torch.zeros(1, 3)},
            torch.zeros(1, 3, 4, 4),
            torch.ones(1, 4, 4),
            LEVELS,
            LearningSettings(steps=5, checks=1),
        )


def test_a_gradient_that_is_not_finite_at_any_scale_is_an_error():
    def model(x, sigma, colour):
        return colour_model(x, sigma, colour + 0 * (colour - colour.detach()).abs().sqrt())

    with pytest.raises(FloatingPointError, match=r"gradient .* step 1"):
        learn(model, painter, {"w": torch.zeros(1, 3)}, torch.zeros(1, 3, 4, 4), torch.ones(1, 4, 4), LEVELS)


def test_paperland_without_comfyui():
    """The shape of a headless run: the demo model's own parts are all that it takes."""
    torch.manual_seed(0)
    config = UNetConfig(channels=32, multipliers=(1, 1, 2), context_channels=16, head_channels=16)
    model = paperland.Paperland(config).eval()
    drawn = scenes.single("tree", 3, 5)
    clean = paperland.encode_pixels(drawn.images)
    subject = (drawn.labels == scenes.REGIONS.index("tree")).float()
    saliency = torch.nn.functional.avg_pool2d(subject, paperland.PATCH)
    start = model.text.word.weight[[WORDS.index("tree")]]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    out = learn(
        model,
        lambda vectors: model.text(["<it> tree"], vectors),
        {"<it>": start},
        clean,
        saliency,
        model.sigmas,
        LearningSettings(steps=6, learning_rate=0.02, batch=2, checks=2),
    )
    assert min(out.judged.values()) < out.judged[0]
    assert out.vectors["<it>"].shape == (1, 16)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
