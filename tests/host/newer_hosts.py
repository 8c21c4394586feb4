"""What newer ComfyUIs do with models, on any of them: what the host does not do itself is added to its own classes."""

import inspect
import json

import comfy.context_windows
import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import torch
from comfy.context_windows import IndexListContextHandler, IndexListContextWindow

QUANTISES = hasattr(comfy.supported_models.SD15, "quant_config")
LEADS_IN = "causal_window_fix" in inspect.signature(IndexListContextHandler).parameters
COUNTS_FRAMES = "total_frames" in inspect.signature(IndexListContextWindow).parameters


def host_window(frames, total):
    return IndexListContextWindow(frames, **({"total_frames": total} if COUNTS_FRAMES else {}))


def context_handler(length, overlap):
    """ComfyUI's context windows, with the frame before each put in front of it."""
    schedule = comfy.context_windows.get_matching_context_schedule("standard_static")
    fuse = comfy.context_windows.get_matching_fuse_method("pyramid")
    handler = IndexListContextHandler if LEADS_IN else _LeadingIn
    return handler(schedule, fuse, length, overlap, context_stride=1, closed_loop=False, dim=0)


class _LeadingIn(IndexListContextHandler):
    def get_context_windows(self, *args):
        windows = super().get_context_windows(*args)
        for window in windows:
            window.__class__ = _Led
            if window.index_list[0] > 0:
                window.causal_anchor_index = window.index_list[0] - 1
        return windows

    def execute(self, calc_cond_batch, *args):
        def call(model, conds, x, timestep, model_options):
            out = calc_cond_batch(model, conds, x, timestep, model_options)
            window = model_options["transformer_options"]["context_window"]
            return [rows[len(window.leading) :] for rows in out]

        return super().execute(call, *args)


class _Led(IndexListContextWindow):
    @property
    def leading(self):
        anchor = getattr(self, "causal_anchor_index", None)
        return [] if anchor is None else [anchor]

    def get_tensor(self, full, device=None, dim=None):
        if (self.dim if dim is None else dim) == 0 and len(full) == 1:
            return full
        return full[[*self.leading, *self.index_list]].to(device)


def dynamic(patcher, inference=True):
    """The patcher's model as dynamic VRAM has it: a layer's weights lie in memory that is another's once it has run.

    Args:
        inference: the memory is made in inference mode.
    """
    patcher.model.lent_in_inference = inference
    return DynamicPatcher(patcher.model, patcher.load_device, patcher.offload_device)


class DynamicPatcher(comfy.model_patcher.ModelPatcher):
    def is_dynamic(self):
        return True

    def loaded_ram_size(self):
        return 0

    def load(self, *args, **kwargs):
        super().load(*args, **kwargs)
        for layer in self.model.modules():
            if hasattr(layer, "weight_function") and not hasattr(layer, "pages"):
                lend(layer, self.model.lent_in_inference)


def lend(layer, inference):
    """Let a layer of the host's calculate with weights that are gone when it has done so."""
    layer.pages = []

    def pin(weight):
        with torch.inference_mode(inference):
            page = torch.empty_like(weight, requires_grad=False)
            layer.pages.append(page.copy_(weight.detach()))
        return page

    def unpin(*_):
        with torch.inference_mode(inference):
            while layer.pages:
                # As the next layer would write there: autograd does not hear of it.
                layer.pages.pop().data.fill_(float("nan"))

    layer.weight_function.append(pin)
    layer.bias_function.append(pin)
    layer.register_forward_hook(unpin)


FORMATS = ("float8_e4m3fn", "int8_tensorwise", "nvfp4")


def quantised(patcher, kind):
    """The patcher's model as a checkpoint with quantised weights gives it: in its linear layers tensors that stand for
    their values and have no memory of their own."""
    if not QUANTISES:
        return _quantised_in_place(patcher, kind)
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    layout = QUANT_ALGOS[kind]["comfy_tensor_layout"]
    config, state = patcher.model.model_config, {}
    linear = {name for name, m in patcher.model.diffusion_model.named_modules() if isinstance(m, torch.nn.Linear)}
    for key, value in patcher.model.diffusion_model.state_dict().items():
        layer, _, slot = key.rpartition(".")
        if layer not in linear or slot != "weight":
            state[key] = value
            continue
        scale = {"scale": "recalculate"} if kind.startswith("float8") else {}
        state.update(QuantizedTensor.from_float(value, layout, **scale).state_dict(key))
        told = json.dumps({"format": kind}).encode()
        state[f"{layer}.comfy_quant"] = torch.tensor(list(told), dtype=torch.uint8)
    own = comfy.supported_models.SD15(config.unet_config)
    own.unet_extra_config, own.latent_format, own.quant_config = {}, config.latent_format, {"mixed_ops": True}
    own.set_inference_dtype(torch.float32, torch.float32)
    model = comfy.model_base.BaseModel(own, patcher.model.model_type, device=patcher.offload_device)
    model.diffusion_model.load_state_dict(state)
    return comfy.model_patcher.ModelPatcher(model.eval(), patcher.load_device, patcher.offload_device)


def _quantised_in_place(patcher, kind):
    for layer in patcher.model.diffusion_model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight = torch.nn.Parameter(Quantised.of(layer.weight.detach(), kind), requires_grad=False)
    return patcher


class Quantised(torch.Tensor):
    """Stands for `codes * scale`; 4-bit codes share bytes."""

    @staticmethod
    def __new__(cls, codes, scale, shape):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device=codes.device)

    def __init__(self, codes, scale, shape):
        self.codes, self.scale = codes, scale

    @classmethod
    def of(cls, weight, kind):
        most = {"float8_e4m3fn": 448, "int8_tensorwise": 127, "nvfp4": 7}[kind]
        grouped = weight.reshape(-1, 16)
        scale = grouped.abs().amax(dim=1, keepdim=True) / most
        codes = grouped / scale
        if kind == "float8_e4m3fn":
            return cls(codes.to(torch.float8_e4m3fn), scale, weight.shape)
        codes = codes.round().to(torch.int8)
        if kind == "nvfp4":
            codes = (codes[:, ::2] + 8 + 16 * (codes[:, 1::2].int() + 8)).to(torch.uint8)
        return cls(codes, scale, weight.shape)

    def __tensor_flatten__(self):
        return ["codes", "scale"], self.shape

    @staticmethod
    def __tensor_unflatten__(parts, shape, *_):
        return Quantised(parts["codes"], parts["scale"], shape)

    def dequantize(self):
        codes = self.codes
        if codes.dtype == torch.uint8:
            codes = torch.stack([codes % 16, codes // 16], dim=2).int().flatten(1) - 8
        return (codes.float() * self.scale).view(self.shape)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            (held,) = args[:1]
            return cls(func(held.codes), func(held.scale), held.shape)
        plain = torch.utils._pytree.tree_map_only(cls, cls.dequantize, (args, kwargs or {}))
        return func(*plain[0], **plain[1])
