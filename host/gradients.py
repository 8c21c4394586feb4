"""Gradients through a loaded model of the host."""

import functools
import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import comfy.ldm.modules.attention
import comfy.model_patcher
import comfy.patcher_extension
import torch
from torch import Tensor, nn

from .checkpointing import RECOMPUTE, checkpointed
from .inference_tensors import OrdinaryOperands, ordinary, ordinary_weights
from .versions import is_clone, lends_weights, without_clones

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

__all__ = ["RECOMPUTE", "constant_controls", "differentiable", "must_checkpoint", "ordinary", "parts_of"]

WHY_CHECKPOINTED = (
    "ComfyUI streams this model's weights, and a gradient has to keep its own copies of them: those of one block at a "
    "time instead of all"
)


@contextmanager
def differentiable(
    patcher: "ModelPatcher", model_options: dict[str, Any], *, checkpointing: bool | Collection[nn.Module] = False
) -> Iterator[dict[str, Any]]:
    """Enter this around one call of a loaded model and its backward pass, inside the host's inference mode or not.

    Inside, gradients are on, weights are ordinary constants and attention is differentiable. The values that go into
    the call have to be ordinary tensors as well (see `ordinary`), ControlNets constants (`constant_controls`).

    Args:
        patcher: the loaded model, usually the guider's `model_patcher`.
        model_options: the options of this step; left as they are.
        checkpointing: keep less of the graph and run residual and transformer blocks, all or these, twice (see
            `checkpointing.checkpointed`: hooks that record have to know).

    Yields:
        The options to hand to `comfy.samplers.calc_cond_batch` in their place.
    """
    parts = parts_of(patcher)
    call = _Call(patcher, any(map(lends_weights, parts)))
    options = without_clones(comfy.model_patcher.create_model_options_clone(model_options))
    to = options.setdefault("transformer_options", {})
    to["optimized_attention_override"] = _differentiable_attention(to.get("optimized_attention_override"))
    for kind in ("patches", "patches_replace"):
        to[kind] = _apart_from_graph(to.get(kind, {}))
    # The skip goes into the decoder, where ControlNets and other patches write into it, while the encoder's next block
    # keeps what it got for the backward pass: that must be another tensor.
    patches = to.setdefault("patches", {})
    patches.setdefault("input_block_patch_after_skip", []).append(_apart)
    comfy.patcher_extension.add_wrapper_with_key(
        comfy.patcher_extension.WrappersMP.APPLY_MODEL, "semantic_style_gradients", call, to
    )
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(ordinary_weights(*(part.model for part in parts)))
        if checkpointing:
            only = None if checkpointing is True else checkpointing
            stack.enter_context(checkpointed(patcher.model.diffusion_model, call.around, only))
        yield options


def _apart_from_graph(patches: Any) -> Any:
    """The host's tables of patches with every patch in a wrapper: it gets copies of tensors that the graph holds."""
    if isinstance(patches, dict):
        return {name: _apart_from_graph(entry) for name, entry in patches.items()}
    if isinstance(patches, (list, tuple)):
        return type(patches)(_apart_from_graph(entry) for entry in patches)
    # AnimateDiff-Evolved's name the class of layer that they are for.
    if isinstance(patches, type) or not callable(patches):
        return patches

    @functools.wraps(patches, updated=())
    def call(*args: Any, **kwargs: Any) -> Any:
        # Patches may write into what they are given (FreeU does), while the layer before, or a line of the patch
        # itself, keeps it for the backward pass. What is one tensor (query and context) stays one.
        copies = {id(a): a.clone() for a in args if isinstance(a, Tensor) and a.requires_grad}
        held = (copies.get(id(a), a) for a in args)
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda kept: kept):
            return patches(*held, **kwargs)

    return call


def must_checkpoint(patcher: "ModelPatcher") -> bool:
    """Whether the graph of a whole call would hold a copy of all weights of the loaded model, because the host uses
    their memory again (see `versions.lends_weights`). With checkpointing it is a block's at a time."""
    return any(map(lends_weights, parts_of(patcher)))


def parts_of(patcher: "ModelPatcher") -> list["ModelPatcher"]:
    """Whatever may run in a call of the model."""
    parts = [patcher, *patcher.get_nested_additional_models(), *patcher.model_patches_models()]
    return [part for part in parts if isinstance(getattr(part, "model", None), nn.Module) and not is_clone(part)]


def _apart(h: Tensor, options: dict[str, Any]) -> Tensor:
    return h.clone() if torch.is_grad_enabled() else h


def _differentiable_attention(before: Callable | None) -> Callable:
    """An attention override: the host's PyTorch attention, through the override that was there.

    An override that chooses a backend of its own without a gradient (SageAttention's nodes) keeps its value and gets
    the gradient of PyTorch's attention.
    """
    pytorch = comfy.ldm.modules.attention.attention_pytorch
    # Past the host's own look at the override, which would come back here.
    pytorch = getattr(pytorch, "__wrapped__", pytorch)

    def attend(func: Callable, *args: Any, **kwargs: Any) -> Tensor:
        if before is None:
            return pytorch(*args, **kwargs)
        out = before(pytorch, *args, **kwargs)
        if out.requires_grad or not torch.is_grad_enabled():
            return out
        exact = pytorch(*args, **kwargs)
        return out + (exact - exact.detach()).to(out.dtype) if exact.requires_grad else out

    return attend


class _Call:
    """APPLY_MODEL wrapper of one `differentiable` context.

    Tensors that only turn up during the call (made lazily, or by somebody's patch) may be inference tensors. Looking
    for them at every operation would slow every call down, so a call that fails on one is made again, looking.
    """

    def __init__(self, patcher: "ModelPatcher", lent: bool) -> None:
        self.patcher = patcher
        self.lent = self.guarded = lent

    def around(self) -> AbstractContextManager:
        return OrdinaryOperands(copy_all=self.lent) if self.guarded else nullcontext()

    def __call__(self, executor: Callable, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return self._run(executor, args, kwargs)
        except RuntimeError as error:
            if self.guarded or "inference tensor" not in str(error).lower():
                raise
            logging.debug("An inference tensor turned up in the model's call, which is made again: %s", error)
        self.guarded = True
        return self._run(executor, args, kwargs)

    def _run(self, executor: Callable, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        with self.around():
            # The network takes a ControlNet's outputs off their lists; a second call needs them again.
            out = executor(*map(_fresh_lists, args), **{k: _fresh_lists(v) for k, v in kwargs.items()})
        if torch.is_grad_enabled():
            self._keep_weights()
        return out

    def _keep_weights(self) -> None:
        """Give weights that hooks patch in place to this call's graph, and the module copies for the next hooks."""
        for key in {key for patches in getattr(self.patcher, "hook_patches", {}).values() for key in patches}:
            name, _, slot = key.rpartition(".")
            parameters = self.patcher.model.get_submodule(name)._parameters
            if parameters.get(slot) is not None:
                parameters[slot] = nn.Parameter(parameters[slot].detach().clone(), requires_grad=False)


def _fresh_lists(value: Any) -> Any:
    if not isinstance(value, dict) or "output" not in value:
        return value
    return {k: list(v) if isinstance(v, list) else v for k, v in value.items()}


def constant_controls(conds: Any) -> Any:
    """Processed conditionings whose ControlNets stay in effect and are constants for the gradient.

    Args:
        conds: the host's processed conditionings in any nesting of dicts and lists. Give those that go into one call
            together: the host batches conditionings that have the same control object.

    Returns:
        A copy down to the dicts that hold a `control`; each control object has one stand-in.
    """
    return _constant(conds, {})


def _constant(value: Any, made: dict[int, "_ConstantControl"]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_constant(item, made) for item in value)
    if not isinstance(value, dict):
        return value
    if value.get("control") is not None:
        control = value["control"]
        return {**value, "control": made.setdefault(id(control), _ConstantControl(control))}
    if "model_conds" in value:
        return value
    return {k: _constant(v, made) for k, v in value.items()}


class _ConstantControl:
    """Stands for a control object of the host, whose state it shares; its outputs carry no graph."""

    def __init__(self, control: Any) -> None:
        self.__dict__["_control"] = control

    def get_control(self, x_noisy: Tensor, t: Tensor, cond: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # Inference mode is what a ControlNet, its weights and its buffers are used to.
        with torch.inference_mode():
            control = self._control.get_control(x_noisy.detach(), t.detach(), cond, *args, **kwargs)
        return ordinary(control)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            # What Python looks for when it copies objects must not be taken from another one.
            raise AttributeError(name)
        return getattr(self.__dict__["_control"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_control"], name, value)
