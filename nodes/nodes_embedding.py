"""Spin's semantic embedding: what the subject of a picture is, learnt as a word."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ..files.embedding_file import SUFFIX, check_name, file_of, free_name, save_embedding
from ..host.learn_word import LearningTask, latent_as_picture, learn_embedding, summary, tell
from ..host.models import check_same, identify
from ..host.pseudo_words import IT, make_prompt
from ..pictures.report_plot import HEIGHT, WIDTH
from ..pictures.word_plot import embedding_plot
from ..regions.crops import as_encoded
from ..regions.masks import as_mask, mask_on_grid, numbers
from ..samplers.inversion import Inversion
from ..samplers.word_learning import (
    LEAST_PIXELS,
    MOST_SKIPPED,
    PUBLISHED_RATE,
    PUBLISHED_STEPS,
    Learned,
    LearningSettings,
)
from .late import attempt
from .nodes_inversion import MAX_SEED
from .schema import checkpointing_input, schema
from .types import Inversion as InversionSocket

CATEGORY = "semantic_style/spin"
CANCELLED = "_cancelled"
# ComfyUI runs a node again when what is connected to it changes, and knows nothing of files that a text names.
TYPED = "prompts that were run keep the old word until their text changes"


class SpinEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStyleSpinEmbedding",
            display_name="Spin Embedding (Semantic Style)",
            category=CATEGORY,
            description="Learns what the subject of a picture looks like as a word that prompts can use: a few token "
            "vectors, found by looking at the subject under noise (textual inversion with a loss that sees the "
            "subject only). Model and text encoder stay as they are.",
            search_aliases=["textual inversion", "train embedding", "pseudo word", "learn concept"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="SD1.x, SD2.x, SDXL or a model that builds on them. LoRAs on it stay, attention patches "
                    "(IPAdapter, SCSA) are left aside. No motion module.",
                ),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                io.String.Input(
                    "class_word",
                    default="object",
                    tooltip="What the subject is, in a word or a few: house, red vase. The search starts there. The "
                    "closer, the better.",
                ),
                io.Int.Input(
                    "tokens",
                    default=2,
                    min=1,
                    max=8,
                    tooltip="How many token vectors the word has (for each text encoder). More can hold more of the "
                    "subject, and leave less room for the rest of a prompt to change it.",
                ),
                io.Int.Input(
                    "steps",
                    default=PUBLISHED_STEPS,
                    min=1,
                    max=100000,
                    tooltip="How long to learn: 200 as published. Each step is one model call with its gradient.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=PUBLISHED_RATE,
                    min=1e-6,
                    max=10.0,
                    step=0.0001,
                    round=0.000001,
                    tooltip="About how far a vector's values move per step: 0.0005 as published, for CLIP, whose "
                    "values are about 0.02 in size. Paperland's are about 1: take 0.02 there.",
                ),
                io.Int.Input(
                    "batch",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Noisy versions of the picture per step: more is steadier, slower and takes more memory.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=False,
                    tooltip="Of the noise. The same seed gives the same embedding.",
                ),
                io.String.Input(
                    "name",
                    default="spin",
                    tooltip="Name of the file in models/embeddings. Any prompt can then say embedding:name. A number "
                    "is added where the name is taken.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The picture with the subject, or several of it. This, an inversion, or an image with a "
                    "VAE is needed.",
                ),
                InversionSocket.Input(
                    "inversion", optional=True, tooltip="The picture as an inversion of this model, in latent's place."
                ),
                io.Image.Input("image", optional=True, tooltip="The picture as pixels, in latent's place; needs vae."),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Encodes the image; also used to show the pictures in the report at full detail.",
                ),
                io.Mask.Input(
                    "saliency",
                    optional=True,
                    tooltip="Where the subject is (Find Subject, or any mask), of any size; grey counts in part. "
                    "Without it the whole picture is learnt and its background leaks into the word.",
                ),
                io.String.Input(
                    "template",
                    default=IT,
                    optional=True,
                    tooltip=f"Prompt to learn with; {IT} stands for the new word. What you write around it the word "
                    "need not learn: a photo of <it>.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    optional=True,
                    tooltip="Replace an embedding of that name instead of adding a number. A prompt that was typed and "
                    "run before keeps the old word until its text changes (a space will do); one that this node is "
                    "connected to follows by itself.",
                ),
                io.Float.Input(
                    "skip_clean",
                    default=0.0,
                    min=0.0,
                    max=MOST_SKIPPED,
                    step=0.05,
                    round=0.001,
                    optional=True,
                    tooltip="Part of the noise levels, from the cleanest on, that is not learnt from. 0 as published; "
                    "a third makes the word say colours and shapes rather than the grain of this one picture.",
                ),
                checkpointing_input(),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="The template with the word learnt: Apply Spin's reference."
                ),
                io.String.Output(
                    display_name="embedding",
                    tooltip="embedding:name, to put into prompts: 'a pencil drawing of embedding:name'. Empty where "
                    "the file could not be written.",
                ),
                io.Image.Output(
                    display_name="report",
                    tooltip="The loss over the steps; the picture, and what the model makes of it under the same noise "
                    "with the class word and with the word learnt.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        class_word: str,
        tokens: int,
        steps: int,
        learning_rate: float,
        batch: int,
        seed: int,
        name: str,
        latent: dict | None = None,
        inversion: Inversion | None = None,
        image: Tensor | None = None,
        vae: Any = None,
        saliency: Tensor | None = None,
        template: str = IT,
        overwrite: bool = False,
        skip_clean: float = 0.0,
        checkpointing: bool = False,
    ) -> io.NodeOutput:
        check_name(name)
        settings = LearningSettings(steps, learning_rate, batch=batch, seed=seed, skip_clean=skip_clean)
        picture = _picture(model, latent, inversion, image, vae)
        where, empty = None, ""
        if saliency is not None:
            grid = picture.shape[-2], picture.shape[-1]
            where = mask_on_grid(as_encoded(as_mask(saliency, "saliency"), grid), grid)
            picture, where, empty = _with_subject(picture, where)
        prompt = make_prompt(clip, template, class_word, tokens)
        folder = _writable_folder()

        def keep(learned: Learned, name: str, overwrite: bool) -> str:
            """Save it; the name under which it is."""
            said = {"class_word": class_word, "template": prompt.text, "model": identify(model).name}
            said["learned"] = summary(learned)
            if overwrite:
                path = file_of(name, [folder, *_folders()]) or folder / (name + SUFFIX)
                try:
                    save_embedding(path, learned.vectors, said)
                    logging.info("Saved embedding:%s to %s.", name, path)
                    return name
                except OSError as error:
                    logging.warning("Semantic Style: %s cannot be replaced (%s): a number is added.", path, error)
            name = free_name(name, _folders())
            path = folder / (name + SUFFIX)
            save_embedding(path, learned.vectors, said)
            logging.info("Saved embedding:%s to %s.", name, path)
            return name

        def broken_off(learned: Learned) -> None:
            # What ended the run goes on from here.
            attempt("Saving what was learnt", lambda: keep(learned, name + CANCELLED, False), "")

        task = LearningTask(model, prompt, picture, where, settings, checkpointing, broken_off)
        learned = learn_embedding(task)
        tell(learned)
        taken = free_name(name, _folders()) != name
        saved, not_saved = attempt(f"Saving embedding:{name}", lambda: keep(learned, name, overwrite), "")
        conditioning = clip.encode_from_tokens_scheduled(prompt.with_vectors(learned.vectors))
        replaced = f"embedding:{name} replaced: {TYPED}" if taken and saved == name else ""
        notes = [note for note in (replaced, empty) if note]
        for note in notes:
            logging.warning("Spin Embedding: %s", note)
        said = not_saved or summary(learned), "; ".join(notes)
        report, _ = attempt(
            "The report",
            lambda: _report(model, vae, picture, learned, saved or name, *said),
            torch.zeros(1, HEIGHT, WIDTH, 3),
        )
        # No prompt shall name what is not there.
        return io.NodeOutput(conditioning, f"embedding:{saved}" if saved else "", report)


def _folders() -> list[str]:
    return folder_paths.get_folder_paths("embeddings")


def _writable_folder() -> Path:
    """The first embeddings folder that can be written; ValueError, before the run, where there is none."""
    errors = []
    for folder in map(Path, _folders()):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError as error:
            errors.append(f"{folder} ({error})")
    raise ValueError(f"embeddings are saved in {', '.join(errors)}, where nothing can be written")


def _picture(model: Any, latent: dict | None, inversion: Inversion | None, image: Tensor | None, vae: Any) -> Tensor:
    """The pictures [B, C, *S] to learn from, in the host's coordinates."""
    given = [n for n, v in (("latent", latent), ("inversion", inversion), ("image", image)) if v is not None]
    if len(given) != 1:
        raise ValueError(
            f"connect the picture as one of latent, inversion or image (with vae); got {' and '.join(given) or 'none'}"
        )
    if latent is not None:
        return latent["samples"]
    if inversion is not None:
        # Only the picture in it is used: any checkpoint of the architecture has made the same one.
        check_same(inversion.model, identify(model), allow_other=True)
        return inversion.to_outer(inversion.clean)
    if vae is None:
        raise ValueError("an image needs a vae to encode it: connect the one that belongs to the model")
    assert image is not None
    return vae.encode(image[..., :3])


def _with_subject(picture: Tensor, saliency: Tensor) -> tuple[Tensor, Tensor, str]:
    """Pictures and masks without those whose mask is empty, and a line that names them."""
    there = saliency.flatten(1).sum(dim=1) >= LEAST_PIXELS
    if len(there) != len(picture) or there.all() or not there.any():
        return picture, saliency, ""
    said = f"left out, their masks being empty: {numbers(~there)} of {len(there)} pictures"
    return picture[there.to(picture.device)], saliency[there], said


def _report(model: Any, vae: Any, picture: Tensor, learned: Learned, name: str, note: str, warning: str) -> Tensor:
    shown = {
        "the picture": picture[:1],
        "seen with the class word": learned.before[None],
        f"seen with embedding:{name}": learned.after[None],
    }
    pictures = {said: latent_as_picture(model, vae, latent) for said, latent in shown.items()}
    with torch.inference_mode(False):
        return embedding_plot(learned, pictures, note, warning).clone()


NODES: list[type[io.ComfyNode]] = [SpinEmbedding]
