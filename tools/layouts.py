"""How the graphs of workflows/ are laid out, and what their notes say; workflows.py draws them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """A graph's title and note, and its groups from left to right.

    Each group has a title and columns, each column the ids of its nodes from top to bottom.
    """

    title: str
    note: str
    groups: dict[str, list[list[int]]]


LAYOUTS = {
    "paperland_text_to_image": Layout(
        title="Text to image with Paperland",
        note="The demo model of this pack draws paper-cut landscapes from captions; nothing has to be downloaded.\n\n"
        "Change colours, textures (shaded, striped, dotted, wavy) and regions in **Caption**, or the **seed**.",
        groups={
            "Captions": [[1, 4], [2, 3]],
            "Sample": [[5, 6]],
            "Pictures": [[7]],
        },
    ),
    "invert_and_reconstruct": Layout(
        title="Invert and reconstruct",
        note="DDPM inversion finds the noise from which the model makes exactly this scene; the replay makes it "
        "again.\n\n"
        "To edit, give **Same captions and CFG** another caption and set **skip** on **Replay** to 20 to 30 of "
        "the 60 steps.",
        groups={
            "Scene": [[1, 2], [3, 4, 5]],
            "Invert": [[6]],
            "Replay": [[7, 8], [9, 10]],
            "Pictures": [[11, 12]],
        },
    ),
    "adain_regions": Layout(
        title="Restyle per region with AdaIN",
        note="Both scenes are inverted (DDIM). At the same step the content's noise takes the statistics of the "
        "style's, region by region, and is replayed. **Restyled as a whole** is the same without regions.\n\n"
        "Turn **Noisy steps to skip**: fewer let the model repaint more, more keep the content.",
        groups={
            "Scenes": [[1, 2, 3], [4, 5, 6]],
            "Invert both": [[7, 8, 9]],
            "AdaIN": [[10, 11, 12, 13, 14]],
            "Replay": [[15, 16, 19], [17, 18, 20, 21]],
            "Pictures": [[22, 23], [24, 25]],
        },
    ),
    "invert_and_reconstruct_sd15": Layout(
        title="Invert and reconstruct a picture with SD1.5",
        note="Choose a checkpoint and a picture, and write what it shows. The replay makes the picture again, as "
        "exactly as the checkpoint's VAE can.\n\n"
        "To edit, give **Same prompts and CFG** another prompt and set **skip** on **Replay** to 20 to 30 of "
        "the 60 steps.",
        groups={
            "Picture": [[1, 2, 3], [4, 5, 6]],
            "Invert": [[7]],
            "Replay": [[8, 9], [10, 11]],
            "Pictures": [[12, 13]],
        },
    ),
    "adain_sd15": Layout(
        title="Take over a picture's colours with AdaIN and SD1.5",
        note="Choose a checkpoint and two pictures. At the same step of both inversions (DDIM) the content's noise "
        "takes the statistics of the style's and is replayed.\n\n"
        "Turn **Noisy steps to skip**: fewer let the model repaint more, more keep the content.",
        groups={
            "Pictures": [[1, 2, 4], [3, 5, 6, 7, 8]],
            "Invert both": [[9, 10, 11]],
            "AdaIN": [[12, 13, 14]],
            "Replay": [[16, 15], [17, 18]],
            "Results": [[19, 20], [21]],
        },
    ),
}
