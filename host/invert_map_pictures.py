"""Pictures of a semantic map as references of SCSA: drawn, encoded and inverted like the content."""

import logging
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

from torch import Tensor

from ..regions.map_pictures import draw_map
from ..regions.semantic_map import SemanticMap
from ..samplers.inversion import Inversion
from .fingerprint import NoFingerprintError, fingerprint, token
from .invert import InversionTask, invert_ddim
from .reference_cache import ReferenceCache

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

Pair: TypeAlias = tuple[Inversion, Inversion]

# The last pictures of each map that is still in somebody's hands: who turns a knob of the node does not wait for them
# again. What is in it never changes a result.
_KEPT: WeakKeyDictionary[SemanticMap, tuple[Hashable, Pair]] = WeakKeyDictionary()


def invert_map_pictures(
    model: "ModelPatcher",
    pictures: Pair,
    regions: SemanticMap,
    vae: Any | None,
    cache: ReferenceCache,
) -> Pair:
    """The content's and the style's map as pictures of their sizes, inverted by DDIM on the content's levels.

    Args:
        model: the model without SCSA.
        pictures: content and style; the content's prompt is taken.
        vae: the host's.
        cache: of `invert_ddim`.
    Raises:
        ValueError: no VAE, a content without prompt, a VAE that does not belong to the content's latents.
    """
    if vae is None:
        raise ValueError(
            "SCSA also looks at pictures of the semantic map. Connect the VAE, so that they can be made here; or "
            "connect the inversions of both maps' pictures (content_map, style_map); or set a1 to 0, which does "
            "without them"
        )
    content = pictures[0]
    if content.positive is None:
        raise ValueError("the content's inversion has no prompt to invert the map's pictures with: invert it again")
    key = _key(model, pictures, vae)
    known, kept = _KEPT.get(regions, (None, None))
    if kept is not None and key is not None and known == key:
        return kept
    ratio = vae.spacial_compression_encode()
    sizes = [(ratio * p.clean.shape[-2], ratio * p.clean.shape[-1]) for p in pictures]
    latents = [vae.encode(pixels) for pixels in draw_map(regions, *sizes)]
    for latent, picture in zip(latents, pictures, strict=True):
        if latent.shape[1:] != picture.clean.shape[1:]:
            raise ValueError(
                f"this VAE makes a latent {list(latent.shape)} of a map's picture, the inversion holds "
                f"{list(picture.clean.shape)}: connect the VAE that the picture was encoded with"
            )
    logging.info("Inverting the pictures of the semantic map (%d steps).", content.steps)
    # Each by itself, as SCSA asks the model about them: what is kept of their calls is then the same to the last bit.
    made = _invert(model, content, latents[0], cache), _invert(model, content, latents[1], cache)
    if key is not None:
        _KEPT[regions] = key, made
    return made


def _invert(model: "ModelPatcher", like: Inversion, latent: Tensor, cache: ReferenceCache) -> Inversion:
    assert like.positive is not None
    negative = like.positive if like.negative is None else like.negative
    task = InversionTask(model, like.positive, negative, latent, like.steps, "", 1.0, like.seed, like.sigmas)
    return invert_ddim(task, cache=cache)


def _key(model: "ModelPatcher", pictures: Pair, vae: Any) -> Hashable | None:
    """What the inverted pictures of a map depend on; None where that is not known."""
    content, style = pictures
    options = model.model_options
    if set(options) - {"transformer_options"} or options.get("transformer_options") or model.wrappers:
        return None
    levels = tuple(content.sigmas.tolist())
    try:
        objects = sorted((name, token(o)) for name, o in getattr(model, "object_patches", {}).items())
        thing = token(model.model), str(model.patches_uuid), tuple(objects), token(vae)
        return (*thing, fingerprint(content.positive), levels, content.clean.shape, style.clean.shape)
    except NoFingerprintError:
        return None
