"""What newer ComfyUIs do with models, on any of them: what the host does not do itself is added to its own classes."""

import inspect

import comfy.context_windows
import comfy.model_patcher
import torch
from comfy.context_windows import IndexListContextHandler, IndexListContextWindow

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
