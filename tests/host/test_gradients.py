"""Gradients through the host's own model call, inside its own guider, on small random UNets shaped like SD1.5."""

import collections
import copy
from contextlib import nullcontext
from types import SimpleNamespace

import comfy.cldm.cldm
import comfy.conds
import comfy.controlnet
import comfy.hooks
import comfy.ldm.modules.attention as attention
import comfy.model_management
import comfy.ops
import comfy.samplers
import pytest
import torch
from newer_hosts import dynamic
from semantic_style.attention.layers import feature_blocks
from semantic_style.benchmarks.random_models import conditioning, sd15_config, small_sd15
from semantic_style.host.checkpointing import checkpointed
from semantic_style.host.gradients import RECOMPUTE, constant_controls, differentiable, must_checkpoint, ordinary
from semantic_style.paperland.unet import PaperlandUNet, UNetConfig

from nodes import common_ksampler

pytestmark = pytest.mark.usefixtures("one_thread", "as_the_host_runs_nodes")

POSITIVE, NEGATIVE = conditioning(1), conditioning(2)
SIGMA = 1.3
CPU = torch.device("cpu")
ATTENTION = "diffusion_model.output_blocks.5.1.transformer_blocks.0.attn1.to_q.weight"
CONVOLUTION = "diffusion_model.input_blocks.1.0.in_layers.2.weight"


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        return small_sd15()


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Call:
    """What a guider has at one step, and a scalar of the decoder's features at its x."""

    def __init__(self, guider, x, sigma, options):
        self.guider, self.x, self.sigma, self.options = guider, x, sigma, options
        self.model, self.conds = guider.model_patcher, [guider.conds["positive"]]
        self.blocks = feature_blocks(self.model.model.diffusion_model)

    def scalar(self, x, options, sigma=None, conds=None):
        features = {}

        def record(h, skip, to):
            features.setdefault((tuple(to["uuids"]), to["block"][1]), h)
            return h, skip

        to = dict(options["transformer_options"])
        patches = to.get("patches", {})
        to["patches"] = {**patches, "output_block_patch": [*patches.get("output_block_patch", []), record]}
        self.out = comfy.samplers.calc_cond_batch(
            self.model.model,
            conds or self.conds,
            x,
            self.sigma if sigma is None else sigma,
            {**options, "transformer_options": to},
        )
        # Both calls, where differing hooks make two of them, count.
        kept = [f for (_, block), f in features.items() if block in self.blocks]
        return sum((f.double() * draw(*f.shape, seed=i)).mean() for i, f in enumerate(kept))

    def value(self, x=None):
        """As the host would evaluate it."""
        return self.scalar(self.x if x is None else x, self.options)

    def gradient(self, checkpointing=False):
        with differentiable(self.model, self.options, checkpointing=checkpointing) as options:
            x = ordinary(self.x).clone().requires_grad_()
            conds = constant_controls(ordinary(self.conds))
            (g,) = torch.autograd.grad(self.scalar(x, options, ordinary(self.sigma), conds), x)
        return g

    def assert_finite_difference(self, g, step=1e-4, rtol=1e-6):
        for seed in range(2):
            direction = draw(*g.shape, seed=seed).to(g)
            direction /= direction.norm()
            expected = (self.value(self.x + step * direction) - self.value(self.x - step * direction)) / (2 * step)
            slope = (g * direction).sum().double()
            torch.testing.assert_close(slope, expected, rtol=rtol, atol=rtol * float(g.norm()))


def guided(model, body, positive=POSITIVE, dtype=torch.float32, shape=(1, 4, 8, 8)):
    """Runs body(call) in place of a guider's prediction at one step of a run; gives back what it returned."""

    class Guider(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            # Newer hosts sample in float32 whatever comes in.
            self.result = body(Call(self, x.to(dtype), timestep.to(dtype), model_options))
            return x

    guider = Guider(model)
    guider.set_conds(positive, NEGATIVE)
    guider.sample(
        draw(*shape, seed=3, dtype=dtype),
        torch.zeros(shape, dtype=dtype),
        comfy.samplers.sampler_object("euler"),
        torch.tensor([SIGMA, 0.0]),
        disable_pbar=True,
        seed=0,
    )
    return guider.result


def gradient(model, **settings):
    checkpointing = settings.pop("checkpointing", False)
    return guided(model, lambda call: call.gradient(checkpointing), **settings)


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


def parts(model):
    for module in model.model.modules():
        yield from (p for p in (*module._parameters.values(), *module._buffers.values()) if p is not None)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("dtype", "step", "rtol"), [(torch.float64, 1e-4, 1e-6), (torch.float32, 1e-2, 3e-3)])
def test_the_gradient_is_the_finite_difference(dtype, step, rtol, checkpointing):
    def body(call):
        call.assert_finite_difference(call.gradient(checkpointing), step, rtol)

    guided(small_sd15(dtype=dtype), body, dtype=dtype, shape=(1, 4, 6, 9))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close_to_float32(dtype):
    half, full = small_sd15(dtype=dtype), small_sd15()
    for weight, rounded in zip(parts(full), parts(half), strict=True):
        weight.data.copy_(rounded)
    g = gradient(half)
    assert g.dtype == torch.float32
    assert cosine(g, gradient(full)) > 0.998


def asking(model):
    """Its weights ask for gradients, as some hosts leave them."""
    for p in model.model.parameters():
        p.requires_grad_(True)
    return model


def test_weights_are_ordinary_inside_and_as_before_outside():
    made = asking(small_sd15())
    made.model.diffusion_model.out[2].bias.requires_grad_(False)
    twin = made.model.diffusion_model.out[2]
    twin.register_buffer("again", twin.weight)
    assert all(p.is_inference() for p in made.model.diffusion_model.parameters())
    asked = [p.requires_grad for p in parts(made)]
    assert any(asked)

    def body(call):
        before = [(p, p.clone(), p.data_ptr()) for p in parts(made)]
        with differentiable(call.model, call.options):
            assert not torch.is_inference_mode_enabled()
            assert torch.is_grad_enabled()
            inside = list(parts(made))
            assert not any(p.is_inference() or p.requires_grad for p in inside)
            # Converting costs no memory, and tensors that were one stay one.
            assert [p.data_ptr() for p in inside] == [address for _, _, address in before]
            assert twin.again is twin.weight
        assert torch.is_inference_mode_enabled()
        assert all(torch.equal(p, value) for p, (_, value, _) in zip(parts(made), before, strict=True))
        assert [p.requires_grad for p in parts(made)] == asked
        with differentiable(call.model, call.options):
            assert all(a is b for a, b in zip(parts(made), inside, strict=True))

    guided(made, body)


def test_weights_moved_in_inference_mode():
    with torch.inference_mode(False):
        moved = small_sd15()
    moved.model.to(torch.float64).to(torch.float32)
    assert any(p.is_inference() for p in parts(moved))
    assert torch.equal(gradient(moved), gradient(small_sd15()))


def test_weights_that_ask_for_gradients_get_none_and_cost_nothing():
    with torch.inference_mode(False):
        told, still = asking(small_sd15()), small_sd15()
        for p in still.model.parameters():
            p.requires_grad_(False)

    def body(call):
        with differentiable(call.model, call.options) as options, saved() as count:
            x = ordinary(call.x).clone().requires_grad_()
            scalar = call.scalar(x, options, ordinary(call.sigma), ordinary(call.conds))
        scalar.backward()
        assert x.grad.abs().max() > 0
        assert all(p.grad is None for p in call.model.model.parameters())
        return count.bytes

    assert guided(told, body) == guided(still, body)
    assert all(p.requires_grad for p in told.model.diffusion_model.parameters())


class saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that the graph keeps, each tensor's memory once; weights are not counted."""

    def __init__(self):
        self.seen, self.bytes = {}, 0
        super().__init__(self.pack, lambda kept: kept)

    def __enter__(self):
        super().__enter__()
        return self

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if not isinstance(tensor if tensor._base is None else tensor._base, torch.nn.Parameter):
            self.bytes += 0 if storage.data_ptr() in self.seen else storage.nbytes()
            self.seen[storage.data_ptr()] = tensor
        return tensor


def stock(model):
    image = {"samples": torch.zeros(1, 4, 8, 8)}
    return common_ksampler(model, 5, 3, 4.0, "euler", "normal", POSITIVE, NEGATIVE, image)[0]["samples"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "problem", [None, RuntimeError("a failing patch"), comfy.model_management.InterruptProcessingException()]
)
def test_the_stock_sampler_is_the_same_before_and_after(problem, checkpointing):
    made = small_sd15()
    before = stock(made)
    options = []

    def fail(n, extra):
        if problem is not None:
            raise problem
        return n

    def body(call):
        broken = call.model.clone()
        broken.set_model_attn1_output_patch(fail)
        options.append(call.options)
        call.options = {**call.options, "transformer_options": broken.model_options["transformer_options"]}
        return call.gradient(checkpointing)

    if problem is None:
        guided(made, body)
    else:
        with pytest.raises(type(problem)):
            guided(made, body)
    assert torch.is_inference_mode_enabled()
    assert "optimized_attention_override" not in options[0]["transformer_options"]
    assert made.model_options == {"transformer_options": {}}
    assert not any("forward" in part.__dict__ for part in made.model.modules())
    assert torch.equal(stock(made), before)
    comfy.model_management.unload_all_models()
    assert torch.equal(stock(made), before)
    if problem is None:
        assert torch.equal(gradient(made), gradient(small_sd15()))


def lora(model, strength=0.8, seed=5):
    """Low-rank changes of an attention and a convolution, made as the LoRA nodes make them."""
    weights = model.model.state_dict()
    patches = {}
    for i, key in enumerate((ATTENTION, CONVOLUTION)):
        out, *rest = weights[key].shape
        up, down = draw(out, 4, seed=seed + i).float(), draw(4, *rest, seed=seed + 10 + i).float()
        patches[key] = comfy.weight_adapter.LoRAAdapter({"test"}, (up, down, 4.0, None, None, None))
    return patches, strength


def with_lora(model):
    patched = model.clone()
    patches, strength = lora(model)
    assert len(patched.add_patches(patches, strength)) == 2
    return patched


def merged(model):
    """The same LoRA added to the weights by hand."""
    other = small_sd15()
    patches, strength = lora(model)
    for name, value in other.model.named_parameters():
        if name in patches:
            up, down, alpha = patches[name].weights[:3]
            change = (up @ down.flatten(1)).reshape(value.shape) * (alpha / down.shape[0])
            value.data += strength * change
    return other


def offloaded(body):
    """As on a small GPU: no weight is on the device, every layer casts its own, LoRA included, when it is called."""

    def run(call):
        call.model.partially_unload(CPU, 1e32)
        layers = [m for m in call.model.model.modules() if hasattr(m, "comfy_cast_weights")]
        assert all(m.comfy_cast_weights for m in layers if list(m.parameters()))
        return body(call)

    return run


@pytest.mark.parametrize("checkpointing", [False, True])
def test_low_memory_and_loras_keep_their_effect(checkpointing):
    plain = small_sd15()
    expected, without = gradient(merged(plain)), gradient(plain)
    patched = gradient(with_lora(plain), checkpointing=checkpointing)
    torch.testing.assert_close(patched, expected, rtol=1e-3, atol=1e-6)
    assert cosine(patched, without) < 0.99

    def body(call):
        return call.gradient(checkpointing)

    torch.testing.assert_close(guided(plain, offloaded(body)), without, rtol=1e-5, atol=1e-7)

    def with_functions(call):
        assert any(getattr(m, "weight_function", None) for m in call.model.model.modules())
        return body(call)

    low = guided(with_lora(plain), offloaded(with_functions))
    torch.testing.assert_close(low, expected, rtol=1e-3, atol=1e-6)


def test_weights_cast_to_another_precision_at_each_call():
    half = small_sd15(dtype=torch.float16)
    full = small_sd15()
    for weight, rounded in zip(parts(full), parts(half), strict=True):
        weight.data.copy_(rounded)
    cast = half.clone()
    cast.set_model_compute_dtype(torch.float32)
    torch.testing.assert_close(gradient(cast), gradient(full), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_hooks_that_patch_weights_between_two_parts_of_a_call(checkpointing):
    made = small_sd15(dtype=torch.float64)
    hook = comfy.hooks.WeightHook(strength_model=0.8)
    hook.weights, hook.need_weight_init = lora(made)[0], False
    group = comfy.hooks.HookGroup()
    group.add(hook)
    both = [*comfy.hooks.set_hooks_for_conditioning(POSITIVE, group), *conditioning(4)]

    def body(call):
        g = call.gradient(checkpointing)
        call.assert_finite_difference(g)
        return g

    g = guided(made, body, positive=both, dtype=torch.float64)
    assert cosine(g, guided(made, body, positive=[*POSITIVE, *conditioning(4)], dtype=torch.float64)) < 0.999


@pytest.mark.parametrize("backend", ["attention_sub_quad", "attention_split", "without gradient"])
def test_another_default_backend_is_overridden(model, monkeypatch, backend):
    expected = gradient(model)

    @attention.wrap_attn
    def without_gradient(*args, **kwargs):
        with torch.no_grad():
            return attention.attention_pytorch(*args, **kwargs)

    function = getattr(attention, backend, without_gradient)
    monkeypatch.setattr(attention, "optimized_attention", function)
    torch.testing.assert_close(gradient(model), expected, rtol=1e-5, atol=1e-8)
    assert attention.optimized_attention is function


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_override_that_is_there_is_called_with_the_differentiable_function(model, checkpointing):
    functions = collections.Counter()

    def halve(func, *args, **kwargs):
        functions[func] += 1
        return 0.5 * func(*args, **kwargs)

    overridden = small_sd15(dtype=torch.float64)
    overridden.model_options["transformer_options"]["optimized_attention_override"] = halve

    def body(call):
        g = call.gradient(checkpointing)
        assert list(functions) == [attention.attention_pytorch.__wrapped__]
        # 16 transformer blocks with two attentions; nothing has to be run again after the last feature, with 3 of them.
        assert functions.total() == 32 + 26 * checkpointing
        assert call.options["transformer_options"]["optimized_attention_override"] is halve
        call.assert_finite_difference(g)

    guided(overridden, body, dtype=torch.float64)


def test_an_override_without_a_gradient_keeps_its_value_and_gets_one(model):
    def sage(func, *args, **kwargs):
        with torch.no_grad():
            return 1.01 * attention.attention_pytorch.__wrapped__(*args, **kwargs)

    overridden = model.clone()
    overridden.model_options["transformer_options"]["optimized_attention_override"] = sage

    def body(call):
        g = call.gradient()
        inside = call.out[0].detach().clone()
        call.value()
        assert torch.equal(call.out[0], inside)
        return g

    g = guided(overridden, body)
    assert cosine(g, gradient(model)) > 0.999


class Recorder:
    """Cross-attention maps of one transformer block, as a hook that records takes them."""

    place = ("output", 8, 0)

    def __init__(self):
        self.maps, self.again, self.places = [], 0, []

    def __call__(self, q, k, v, extra):
        heads = extra["n_heads"]
        split = [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)]
        weights = (split[0] @ split[1].transpose(-1, -2) / extra["dim_head"] ** 0.5).softmax(-1)
        self.places.append((extra["block"], extra["block_index"], extra["transformer_index"]))
        if extra.get(RECOMPUTE):
            self.again += 1
        else:
            self.maps.append(weights.mean(1))
        return (weights @ split[2]).transpose(1, 2).flatten(2)

    def on(self, model):
        other = model.clone()
        other.set_model_attn2_replace(self, *self.place)
        return other


def test_checkpointing_gives_the_same_gradient_and_keeps_less(model):
    def body(call):
        results = []
        for checkpointing in (False, True):
            recorder = Recorder()
            call.options = {
                **recorder.on(model).model_options,
                "transformer_options": {
                    **call.options["transformer_options"],
                    **recorder.on(model).model_options["transformer_options"],
                },
            }
            with differentiable(call.model, call.options, checkpointing=checkpointing) as options:
                x = ordinary(call.x).clone().requires_grad_()
                with saved() as count:
                    scalar = call.scalar(x, options, ordinary(call.sigma), ordinary(call.conds))
                # The map is a side result of the block: its own gradient has to come through, too.
                (side,) = torch.autograd.grad(recorder.maps[0].square().sum(), x, retain_graph=True)
                (g,) = torch.autograd.grad(scalar, x)
            assert len(recorder.maps) == 1
            assert recorder.again == 2 * checkpointing
            assert set(recorder.places) == {(("output", 8), 0, 12)}
            results.append((g, side, call.out[0].detach(), count.bytes))
        (*plain, many), (*thrifty, few) = results
        assert all(torch.equal(a, b) for a, b in zip(plain, thrifty, strict=True))
        assert plain[1].abs().max() > 0
        assert few < 0.4 * many

    guided(model, body, shape=(1, 4, 16, 16))


def test_checkpointing_of_the_network_without_the_host():
    recorder = Recorder()
    recorder.place = ("output", 3, 0)
    with torch.inference_mode(False):
        torch.manual_seed(0)
        network = PaperlandUNet(UNetConfig(channels_in=4, channels=32, context_channels=16)).requires_grad_(False)
        x, t, context = (draw(2, 4, 8, 12), torch.tensor([500.0, 20.0]), draw(2, 5, 16).float())
        results = []
        for context_manager in (nullcontext(), checkpointed(network)):
            x = x.detach().float().requires_grad_()
            options = {"patches_replace": {"attn2": {recorder.place: recorder}}}
            with context_manager, saved() as count:
                out = network(x, t, context, options)
                (g,) = torch.autograd.grad(out.square().sum() + recorder.maps[-1].square().sum(), x)
            results.append((g, count.bytes))
    assert torch.equal(results[0][0], results[1][0])
    assert results[1][1] < 0.5 * results[0][1]
    assert (len(recorder.maps), recorder.again) == (2, 1)
    assert len(set(recorder.places)) == 1


def test_hooks_of_others_are_not_run_twice_without_checkpointing(model):
    calls = []
    hooked = model.clone()
    hooked.set_model_attn1_output_patch(lambda n, extra: calls.append(extra) or n)
    gradient(hooked)
    assert len(calls) == 16
    assert not any(RECOMPUTE in extra for extra in calls)


def small_controlnet():
    network = comfy.cldm.cldm.ControlNet(
        **{**sd15_config(32), "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0]}, hint_channels=3, device=CPU
    )
    generator = torch.Generator().manual_seed(8)
    for weight in network.parameters():
        fan_in = max(weight[0].numel(), 1)
        weight.data = torch.randn(weight.shape, generator=generator) / fan_in**0.5
    control = comfy.controlnet.ControlNet(network, load_device=CPU)
    return control.set_cond_hint(draw(1, 3, 64, 64, seed=9).float(), 0.7)


class Frozen:
    """A control object that gives the outputs of another one at one place, whatever it is asked."""

    def __init__(self, outputs):
        self.outputs = outputs

    def get_control(self, *_):
        return {k: [None if t is None else t.clone() for t in v] for k, v in self.outputs.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_controlnet_stays_in_effect_as_a_constant(model, checkpointing):
    control, other = small_controlnet(), conditioning(4)
    controlled = [[c[0], {"control": control, "control_apply_to_uncond": True}] for c in (*POSITIVE, *other)]
    rows = []

    def body(call):
        handle = control.control_model.register_forward_pre_hook(
            lambda m, a, k: rows.append(len(k["x"])), with_kwargs=True
        )
        g = call.gradient(checkpointing)
        handle.remove()
        outputs = []
        real = control.get_control
        control.get_control = lambda *args: outputs.append(real(*args)) or ordinary(outputs[0])
        call.value()
        del control.get_control
        frozen = Frozen(ordinary(outputs[0]))
        call.conds = [[{**cond, "control": frozen} for cond in call.conds[0]]]
        call.assert_finite_difference(g, 1e-2, 3e-3)
        return g

    g = guided(model, body, positive=controlled)
    # Both conditionings in one call, once.
    assert rows == [2]
    assert cosine(g, gradient(model, positive=[*POSITIVE, *other])) < 0.9


def test_stand_ins_of_controls_share_the_state_and_are_one_per_object():
    control = SimpleNamespace(strength=1.0)
    conds = {"positive": [{"control": control, "uuid": 1}, {"uuid": 2}], "negative": [{"control": control}]}
    first, second = constant_controls([conds["positive"], conds["negative"], None])[:2]
    assert first[0]["control"] is second[0]["control"]
    assert first[1] == {"uuid": 2}
    first[0]["control"].strength = 0.5
    assert control.strength == 0.5
    assert copy.copy(first[0]["control"]).strength == 0.5
    assert conds["positive"][0]["control"] is control
    assert constant_controls(conds)["negative"][0]["control"].strength == 0.5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_inference_tensors_that_turn_up_during_the_call(model, checkpointing):
    """A patch of somebody else with a tensor that a node made, and weights that a layer makes when it is called."""
    factor = 1 + 0.3 * draw(1, 1, 64).float()
    assert factor.is_inference()
    patched = model.clone()
    patched.set_model_attn1_output_patch(lambda n, extra: n * factor if extra["block"] == ("output", 7) else n)
    # The network takes what it adds off these lists, this before the patch fails.
    control = Frozen({"input": [], "middle": [], "output": [None] * 5 + [draw(1, 64, 4, 4).float()] + [None] * 6})
    calls = []

    def wrapper(apply, args):
        calls.append(args["c"]["control"])
        return apply(args["input"], args["timestep"], **args["c"])

    def body(call):
        call.options = {**call.options, "model_function_wrapper": wrapper}
        call.conds = [[{**cond, "control": control} for cond in call.conds[0]]]
        g = call.gradient(checkpointing)
        assert len(calls) == 1
        call.assert_finite_difference(g, 1e-2, 3e-3)

    guided(patched, body)


@pytest.mark.parametrize(("checkpointing", "inference"), [(False, True), (False, False), (True, True)])
def test_weights_whose_memory_is_used_again(model, checkpointing, inference):
    expected = gradient(model)
    made = dynamic(small_sd15(), inference)
    assert must_checkpoint(made)
    assert not must_checkpoint(model)
    torch.testing.assert_close(gradient(made, checkpointing=checkpointing), expected, rtol=1e-5, atol=1e-8)
    assert all(not layer.pages for layer in made.model.modules() if hasattr(layer, "pages"))


def test_ordinary_goes_through_the_hosts_values():
    tensor, plain = torch.ones(2), torch.inference_mode(False)(torch.ones)(2)
    Pair = collections.namedtuple("Pair", "left right")
    cond, untouched, other = comfy.conds.CONDRegular(tensor), {"a": [1, (plain, "x")]}, object()
    many = comfy.conds.CONDList([tensor, plain])
    value = {
        "t": tensor,
        "list": [tensor, plain],
        "pair": Pair(tensor, 3),
        "cond": cond,
        "same": untouched,
        "o": other,
        "many": many,
    }
    result = ordinary(value)
    for made in (result["t"], result["list"][0], result["pair"].left, result["cond"].cond, result["many"].cond[0]):
        assert not made.is_inference()
        assert torch.equal(made, tensor)
    assert result["t"] is result["list"][0]
    assert type(result["cond"]) is comfy.conds.CONDRegular
    assert result["list"][1] is plain
    assert result["pair"].right == 3
    assert result["same"] is untouched
    assert result["o"] is other
    assert value["t"] is tensor
    assert cond.cond is tensor
    assert ordinary(plain) is plain
    assert ordinary(None) is None
