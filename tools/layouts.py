"""How the graphs of workflows/ are laid out, and what their notes say; workflows.py draws them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """A graph's title and note, and its groups from left to right.

    Each group has a title and columns, each column the ids of its nodes from top to bottom. `thumbnail` are the titles
    of the pictures that the thumbnail shows, the first ones where it says nothing.
    """

    title: str
    note: str
    groups: dict[str, list[list[int]]]
    thumbnail: tuple[str, ...] = ()


FAMILIES = {"sd15": "SD1.5", "sdxl": "SDXL"}

LAYOUTS = {
    "semantix_simple": Layout(
        title="Restyle a picture (Semantix)",
        note="The content is restyled like the style picture, each thing like its counterpart. The demo model "
        "draws both; "
        "nothing has to be downloaded.\n\n"
        "Turn **style** and **structure** on **Restyle** and queue again: only the sampler runs. **i** on a node opens "
        "its help.",
        groups={"Pictures": [[1], [2, 3]], "Restyle": [[4]], "Results": [[5, 6], [7, 8]]},
        thumbnail=("Content", "Style", "Restyled"),
    ),
    "scsa_simple": Layout(
        title="Restyle a picture by regions (SCSA)",
        note="Every region of the content is painted with what the style has in the region of the same colour. "
        "The node "
        "shows the regions after a run.\n\n"
        "Turn **pattern**: 0 takes over colours, 1 patterns. Disconnect both colour pictures and the model "
        "finds regions "
        "by itself.",
        groups={"Pictures": [[1], [2, 3]], "Restyle by regions": [[7]], "Results": [[4, 5], [6]]},
        thumbnail=("Content", "Style", "Restyled"),
    ),
    "spin_simple": Layout(
        title="Paint a subject into a picture (Spin)",
        note="The reference's sun is learnt as a word, once, and painted into the mask of a landscape that has "
        "none.\n\n"
        "Turn **blend** for more of the background's colours, **seed** for another picture, **variants** for several.",
        groups={"Pictures": [[1], [2, 3, 4]], "Paint": [[8]], "Results": [[5, 6], [7]]},
        thumbnail=("Reference", "Background", "Painted"),
    ),
    **{
        f"semantix_simple_{family}": Layout(
            title=f"Restyle a picture with {name} (Semantix)",
            note="Choose a checkpoint and two pictures of any size, and write what the content shows. It is "
            "restyled like "
            "the style picture, each thing like its counterpart.\n\n"
            "Turn **style** and **structure** and queue again: only the sampler runs. **i** on a node opens its help.",
            groups={"Pictures": [[1], [2, 3]], "Restyle": [[4]], "Results": [[5, 6]]},
        )
        for family, name in FAMILIES.items()
    },
    **{
        f"scsa_simple_{family}": Layout(
            title=f"Restyle a picture by regions with {name} (SCSA)",
            note="Choose a checkpoint and two pictures of any size. The model finds regions that both share; "
            "the node shows "
            "them after a run, and each is painted with what the style has there.\n\n"
            "Are the regions wrong, connect two pictures that have them painted in the same colours.",
            groups={"Pictures": [[1], [2, 3]], "Restyle by regions": [[4]], "Results": [[5]]},
        )
        for family, name in FAMILIES.items()
    },
    **{
        f"spin_simple_{family}": Layout(
            title=f"Paint a subject into a picture with {name} (Spin)",
            note="Choose a checkpoint, a picture of the subject and a background; paint the background's mask "
            "(right click: "
            "Open in MaskEditor). Write what the subject is and what the background shows.\n\n"
            "The subject is learnt once; **subject**, **blend** and **seed** only sample again.",
            groups={"Pictures": [[1], [2, 3]], "Paint": [[4]], "Results": [[5, 6]]},
        )
        for family, name in FAMILIES.items()
    },
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
    "edit_flow": Layout(
        title="Edit a picture with Flux",
        note="Choose Flux (or a model like it), its text encoders and VAE, and a picture; write what it shows and what "
        "it **shall show**. With one prompt and one guidance at both places the picture comes back.\n\n"
        "**skip** on **Replay** keeps more, the **guidance of the edit** changes more; CFG stays at 1 with distilled "
        "models.",
        groups={
            "Picture": [[1, 2, 3], [4, 5, 9]],
            "Prompts": [[6, 7, 8]],
            "Invert": [[17, 10]],
            "Replay with the new prompt": [[11, 18], [12, 13, 14]],
            "Pictures": [[15, 16]],
        },
    ),
    "edit_flow_qwen_image": Layout(
        title="Edit a picture with Qwen-Image",
        note="Choose Qwen-Image, its text encoder and VAE, and a picture; write what it shows and what it **shall "
        "show**. With the first prompt at both places the picture comes back.\n\n"
        "**skip** on **Replay** keeps more; the **cfg** of **The new prompt** changes more.",
        groups={
            "Picture": [[1, 2, 3], [4, 5, 9]],
            "Prompts": [[6, 7, 8]],
            "Invert": [[17, 10]],
            "Replay with the new prompt": [[11, 12], [13, 14]],
            "Pictures": [[15, 16]],
        },
    ),
    "restyle_noise_flow": Layout(
        title="Take over a picture's colours per region with a flow model",
        note="Choose a flow model (here Flux), two pictures, and for each a picture of its regions: equal colours are "
        "the same region. The replay gives each region the statistics of the style's, step by step.\n\n"
        "Turn **Noisy steps to skip** and **adain_start**: less of both lets the style's colours in further.",
        groups={
            "Pictures": [[1, 2, 3], [4, 5, 15], [6, 7, 16]],
            "Regions": [[8, 9, 12], [10, 11]],
            "Invert both": [[13, 14], [17, 18]],
            "Replay": [[19, 20], [21, 22, 23]],
            "Results": [[24, 25], [26, 27]],
        },
    ),
    "semantix_image": Layout(
        title="Semantix: style transfer between two scenes, in parts",
        note="Both scenes are inverted (DDPM). **Restyle** makes the context again, while an energy draws each place "
        "to its match in the reference; **Restyle region by region** looks for it in the same region only.\n\n"
        "Turn **style_weight** and **spatial_weight** and look at **What the terms did**. Queueing again is faster: "
        "the inversions and what the references need are kept.",
        groups={
            "Scenes": [[1, 2, 3], [4, 5, 6, 7]],
            "Invert both": [[8, 9]],
            "Restyle": [[11, 13], [12, 14, 10]],
            "Pictures": [[15, 16, 19], [17, 18]],
        },
        thumbnail=("Context", "Reference", "Restyled", "Restyled region by region"),
    ),
    "semantix_two_references": Layout(
        title="Semantix: two references, each for its part",
        note="Masks say which part of the context (**content_mask**) takes its style from which part of which "
        "reference (**style_mask**): here the sky from one, all else from another. Each has its own **style_weight**; "
        "the second's spatial and semantic weights are 0, since the first's act everywhere and energies add.\n\n"
        "Bypass **Colours of** ... to switch AdaIN off.",
        groups={
            "Scenes and masks": [[1, 2, 3, 4], [5, 6, 7, 8, 9], [13, 14, 15, 16, 17]],
            "Invert all": [[10, 11, 12]],
            "An energy for each": [[18, 19], [20, 21]],
            "Replay": [[22, 23, 24], [25, 26]],
            "Pictures": [[27, 30], [28, 29]],
        },
        thumbnail=("Context", "The sky's reference", "The land's reference", "Restyled"),
    ),
    "semantix_ablations": Layout(
        title="Semantix: what each term does",
        note="The same two inversions, restyled with all terms and with some switched off (weight 0; adain_start 1 "
        "switches AdaIN off).\n\n"
        "With nothing at all the context comes back. Without the style term only AdaIN changes colours; without the "
        "spatial term shapes get lost.",
        groups={
            "Scenes": [[1, 2, 3], [4, 5, 6, 7]],
            "Invert both": [[8, 9]],
            "Restyle with and without": [[10, 15], [11, 16], [12, 17], [13, 18], [14, 19]],
            "Pictures": [[20, 21], [22, 23], [24]],
        },
        thumbnail=("AdaIN only", "Without the style term", "Without the spatial term", "All terms"),
    ),
    "semantix_video": Layout(
        title="Semantix: style transfer to a moving scene, in parts",
        note="The frames are a batch, inverted and restyled together with the weights **published for video**; the one "
        "reference serves all of them.\n\n"
        "For longer or larger clips lower **frames** first to see how long one takes.",
        groups={
            "Scenes": [[1, 2, 3], [4, 5, 6, 7]],
            "Invert both": [[8, 9]],
            "Restyle": [[10, 11]],
            "Pictures": [[12, 13], [14, 15]],
        },
        thumbnail=("Context", "Reference", "Restyled"),
    ),
    "semantix_image_sd15": Layout(
        title="Semantix: style transfer with SD1.5, in parts",
        note="Choose a checkpoint and two pictures, and write what the context shows. Any SD1.x, SD2.x or SDXL "
        "checkpoint does (SDXL: scale to 1024).\n\n"
        "More **style_weight**: more of the reference's look. More **spatial_weight**: more of the context's shapes. "
        "Faster: **guide_every** 2. Out of memory: **checkpointing** *always*.",
        groups={
            "Pictures": [[1, 2, 3], [4, 5], [6, 7, 8, 9]],
            "Invert both": [[10, 11]],
            "Restyle": [[12, 13]],
            "Results": [[14, 15]],
        },
    ),
    "semantix_video_sd15": Layout(
        title="Semantix: style transfer to a video with SD1.5, in parts",
        note="Choose a checkpoint, a video and a picture, and write what the video shows. Frame by frame as it is; for "
        "frames that know each other put **AnimateDiff-Evolved** (*Apply AnimateDiff Model*, *Use Evolved Sampling*) "
        "behind the checkpoint and connect its MODEL to both inversions and to **Restyle**.",
        groups={
            "Video and picture": [[1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11]],
            "Invert both": [[12, 13]],
            "Restyle": [[14, 15]],
            "Results": [[16, 17]],
        },
    ),
    "scsa_colors": Layout(
        title="SCSA: region by region, with colour maps, in parts",
        note="Both scenes and the pictures of their regions are inverted (DDIM), as one batch. **SCSA** lets every "
        "region of the content be painted with what the style has in the same region; equal colours in the two maps "
        "are the same region. It begins with the content's noise, whose regions take the statistics of the style's, "
        "here by half: all of it, as published, makes specks at the borders of flat regions.\n\n"
        "Turn **temperature** on **SCSA** and **strength** on **AdaIN per region**, and look at **Regions** first.",
        groups={
            "Scenes": [[1, 2, 3], [4, 9]],
            "Invert the four": [[23, 24, 25], [5, 7], [26, 27, 28, 29]],
            "SCSA": [[10], [11, 12, 13, 14]],
            "Replay": [[15, 16, 17, 18]],
            "Pictures": [[19, 20], [21, 22]],
        },
        thumbnail=("Content", "Style", "Restyled"),
    ),
    "scsa_auto": Layout(
        title="SCSA: region by region, with an automatic map, in parts",
        note="As with colour maps, but the regions are found by the model itself: places of both pictures whose "
        "features are alike are one region.\n\n"
        "Look at **Regions**: another **seed**, or a number of **regions**, on **Regions found by the model** gives "
        "other ones.",
        groups={
            "Scenes": [[1, 2, 3], [4, 5, 6]],
            "Invert both": [[7, 8, 9]],
            "SCSA": [[10], [11, 12, 13, 14]],
            "Replay": [[15, 16, 17, 18]],
            "Pictures": [[19, 20], [21, 22]],
        },
        thumbnail=("Content", "Style", "Restyled"),
    ),
    "scsa_semantix": Layout(
        title="SCSA and Semantix together",
        note="One sampler with both: **SCSA** changes the attention of the model, **Semantix with SCSA** draws each "
        "place to its match in the reference, in the same regions. Both use the same two inversions (DDPM).\n\n"
        "Bypass **SCSA**, or set the weights to 0, to see what each of them does.",
        groups={
            "Scenes": [[1, 2, 3], [4, 5, 6, 7]],
            "Invert both": [[8, 9, 10]],
            "Restyle": [[11], [12, 13]],
            "Pictures": [[14, 15], [16, 17]],
        },
        thumbnail=("Context", "Reference", "Restyled by both"),
    ),
    "scsa_colors_sd15": Layout(
        title="SCSA with SD1.5 and colour maps, in parts",
        note="Choose a checkpoint, two pictures, and for each a picture of its regions: equal colours are the same "
        "region, smooth borders and JPEG do no harm. The four are inverted as one batch.\n\n"
        "Look at **Regions** first. 50 steps, empty prompt and CFG 1 as published; **temperature** and **end_percent** "
        "on **SCSA** are worth turning.",
        groups={
            "Pictures": [[1, 2, 3], [4, 5, 10]],
            "Regions": [[6, 7, 15], [8, 9]],
            "Invert the four": [[29, 30, 31], [11, 13], [32, 33, 34, 35]],
            "SCSA": [[16], [17, 18, 19, 20]],
            "Replay": [[21, 22, 23, 24]],
            "Results": [[25, 26], [27, 28]],
        },
    ),
    "scsa_auto_sd15": Layout(
        title="SCSA with SD1.5 and an automatic map, in parts",
        note="Choose a checkpoint and two pictures. The regions are found by the checkpoint itself: places of both "
        "pictures whose features are alike.\n\n"
        "Look at **Regions**: another **seed** or number of **regions** gives other ones. 50 steps, empty prompt and "
        "CFG 1 as published.",
        groups={
            "Pictures": [[1, 2, 3], [4, 5, 6]],
            "Invert both": [[7, 8], [9, 10, 11]],
            "SCSA": [[12], [13, 14, 15, 16]],
            "Replay": [[17, 18, 19, 20]],
            "Results": [[21, 22], [23, 24]],
        },
    ),
    "scsa_semantix_sd15": Layout(
        title="SCSA and Semantix together with SD1.5",
        note="Choose a checkpoint and two pictures, and write what the context shows. **SCSA** changes the attention, "
        "**Semantix with SCSA** draws each place to its match in the reference; the regions are found by the "
        "checkpoint.\n\n"
        "Bypass **SCSA**, or set the weights to 0, to see what each of them does.",
        groups={
            "Pictures": [[1, 2, 3], [4, 5, 6, 7]],
            "Invert both": [[8, 9], [10, 11, 12]],
            "Restyle": [[13], [14, 15]],
            "Results": [[16, 17], [18, 19]],
        },
    ),
    "spin_insert": Layout(
        title="Spin: a thing of one scene into another, in parts",
        note="The reference's sun is learnt as a word; **Spin** lets the white part of the mask attend to that word, "
        "all else to the background's caption. **Fit in with the background** is an energy that draws the inside to "
        "the background's look.\n\n"
        "Change the scenes' seeds, the **seed** of **Paint**, or the energy's **weight**: at 3 this night takes the "
        "sun's colours away. What was learnt is kept: painting again is fast.",
        groups={
            "Scenes": [[1, 2], [3, 4], [6, 7]],
            "The subject as a word": [[8, 10], [11]],
            "The place": [[9, 12, 13]],
            "Paint": [[19, 20, 21, 22], [14, 15, 16, 17, 18]],
            "Paint with style energy": [[23, 24, 25], [26, 27, 28, 29, 30, 31]],
            "Pictures": [[5, 32], [33, 34], [35]],
        },
        thumbnail=("Reference", "Background", "Painted in"),
    ),
    "spin_insert_text": Layout(
        title="Spin: the learnt thing in other words, in parts",
        note="The word that was learnt can be said in prompts, as `embedding:paperland_sun`, and other words beside "
        "it change the thing: the more of them, the more. **Words for...** put both together.\n\n"
        "Change the words there, or say the embedding in any caption of your own.",
        groups={
            "Scenes": [[1, 2], [3, 4], [6, 7]],
            "The subject as a word": [[8, 10], [11]],
            "The place": [[9, 12, 13]],
            "As learnt": [[14, 15, 16, 17]],
            "Green, said once": [[18, 19], [20, 21, 22, 23]],
            "Green, said twice": [[24, 25], [26, 27, 28, 29]],
            "Pictures": [[5, 30], [31], [32, 33]],
        },
        thumbnail=("Reference", "As learnt", "Green, said once", "Green, said twice"),
    ),
    "spin_with_scsa": Layout(
        title="Spin, then SCSA on the whole",
        note="A thing of the reference is painted into the background, then **SCSA** restyles the whole picture region "
        "by region. The regions are the background's, with the painted thing's laid over them.\n\n"
        "Each half works as in **spin_insert** and **scsa_colors**.",
        groups={
            "Scenes": [[1, 2], [3, 4], [6, 7, 18]],
            "The subject as a word": [[8, 10], [11]],
            "Paint it in": [[9, 12, 13], [14, 15, 16, 17]],
            "Restyle": [[19, 20, 21, 22], [23, 24], [25], [26, 27, 28, 29], [30, 31, 32, 33]],
            "Pictures": [[5, 34], [35, 36], [37, 38]],
        },
        thumbnail=("Reference", "Background", "Painted in", "Restyled"),
    ),
    "spin_insert_sd15": Layout(
        title="Spin with SD1.5: a picture's subject into another, in parts",
        note="Choose a checkpoint, the reference and the background, and paint the place into the background (right "
        "click on it, *Open in MaskEditor*). Say in **class_word** what the subject is, and what the background "
        "shows.\n\n"
        "Look at **Its subject** first; any other mask may take its place. Learning takes 200 steps and is kept.",
        groups={
            "Pictures": [[1, 2, 3], [4, 5], [6, 7, 8]],
            "The subject as a word": [[9, 10, 11], [13], [14]],
            "The place": [[12, 15, 16]],
            "Paint": [[17, 18, 19, 20]],
            "Paint with style energy": [[21, 22, 23], [24, 25, 26, 27, 28, 29]],
            "Results": [[30, 31], [32, 33]],
        },
    ),
    "spin_insert_text_sd15": Layout(
        title="Spin with SD1.5: the learnt subject in other words, in parts",
        note="Choose a checkpoint, the reference and the background, and paint the place into the background (right "
        "click on it, *Open in MaskEditor*). **Words before it** and the learnt word are the prompt of the inside: a "
        "red one, a wooden one.\n\n"
        "Fewer **tokens** leave more of the subject to the other words.",
        groups={
            "Pictures": [[1, 2, 3], [4, 5], [6, 7, 8]],
            "The subject as a word": [[9, 10, 11], [13], [14]],
            "The place": [[12, 15, 16]],
            "Other words": [[17, 18]],
            "Paint": [[19, 20, 21, 22]],
            "Results": [[23, 24], [25]],
        },
    ),
    "spin_with_scsa_sd15": Layout(
        title="Spin with SD1.5, then SCSA on the whole",
        note="Choose a checkpoint, a reference, a background into which you paint the place (*Open in MaskEditor*), a "
        "style, and the regions of background and style in colours. The subject's region is red: make its counterpart "
        "in the style red as well.\n\n"
        "Look at **Its subject** and **Regions** first.",
        groups={
            "Pictures": [[1, 2, 3], [4, 5], [6, 7, 8]],
            "The subject as a word": [[9, 10, 11], [13], [14]],
            "Paint it in": [[12, 15, 16], [17, 18, 19, 20]],
            "Style and regions": [[21, 22], [23, 24], [25, 26], [27, 28, 29]],
            "Restyle": [[30, 31], [32, 33], [34], [35, 36, 37, 38], [39, 40, 41, 42]],
            "Results": [[43, 44], [45, 46], [47]],
        },
    ),
}
