"""What the picture of each node's help page shows; for help_pictures.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from help_bench import STEPS, Bench, Graph, but, demo, new
from PIL import Image, ImageChops

MAGNIFIED = 8
# Pixels of a row of four pictures of the demo model.
WIDE = 4 * 128 + 3 * 6
# Of the regions in a scene's `label_image`.
SKY, SUN = 0x96C8F0, 0xFAD23C

Cell = tuple[str, Image.Image]


@dataclass(frozen=True)
class Recipe:
    """Makes labelled pictures, so many beside each other."""

    make: Callable[[Bench], Sequence[Cell]]
    columns: int


RECIPES: dict[str, Recipe] = {}


def recipe(name: str, columns: int = 3) -> Callable:
    """Of the node SemanticStyle`name`."""

    def keep(make: Callable[[Bench], Sequence[Cell]]) -> Callable:
        RECIPES[f"SemanticStyle{name}"] = Recipe(make, columns)
        return make

    return keep


def sweep(bench: Bench, graph: Graph, node: str, name: str, values: Sequence[float], shown: str) -> list[Cell]:
    """What the node `shown` gives at each value of an input."""
    return [(f"{name} {value:g}", bench.image(but(graph, **{f"_{node}": {name: value}}), shown)) for value in values]


def difference(one: Image.Image, other: Image.Image) -> Image.Image:
    return ImageChops.difference(one, other).point(lambda value: min(255, value * MAGNIFIED))


def narrowed(image: Image.Image) -> Image.Image:
    """As wide as four pictures of the demo model."""
    return image.resize((WIDE, WIDE * image.height // image.width), Image.Resampling.LANCZOS)


# The demo model and its world


@recipe("PaperlandModel", 2)
def paperland_model(bench: Bench) -> Sequence[Cell]:
    pictures = bench.images(demo("paperland_text_to_image"), "6")
    return [(f"picture {i}", picture) for i, picture in enumerate(pictures, start=1)]


@recipe("PaperlandEncode")
def paperland_encode(bench: Bench) -> Sequence[Cell]:
    graph = but(demo("paperland_text_to_image"), _4={"batch_size": 1})
    caption = graph["2"]["inputs"]["caption"]
    cells = [("the caption of the graph", bench.image(graph, "6"))]
    for phrase, other in (
        ("green and lime striped hill", "red and yellow dotted hill"),
        ("cyan and cream shaded sky", "pink and yellow shaded sky"),
    ):
        caption = caption.replace(phrase, other)
        cells.append((f"with {other}", bench.image(but(graph, _2={"caption": caption}), "6")))
    return cells


@recipe("PaperlandLatent")
def paperland_latent(bench: Bench) -> Sequence[Cell]:
    graph = but(demo("paperland_text_to_image"), _4={"batch_size": 1})
    wide = but(graph, _4={"width": 192})
    return [
        ("empty, 128 x 128", bench.image(graph, "4", kind="latent")),
        ("after KSampler", bench.image(graph, "6")),
        ("after KSampler, 192 x 128", bench.image(wide, "6")),
    ]


@recipe("PaperlandScene")
def paperland_scene(bench: Bench) -> Sequence[Cell]:
    graph = demo("semantix_image")
    return [
        ("image", bench.image(graph, "2")),
        ("label_image", bench.image(graph, "2", 3)),
        ("subject", bench.image(graph, "2", 4, "mask")),
        ("another layout_seed", bench.image(but(graph, _2={"layout_seed": 151}), "2")),
        ("another style_seed", bench.image(but(graph, _2={"style_seed": 651}), "2")),
        ("only: one house", bench.image(but(graph, _2={"only": "one house"}), "2")),
    ]


@recipe("PaperlandClip", 2)
def paperland_clip(bench: Bench) -> Sequence[Cell]:
    frames = bench.images(but(demo("semantix_video"), _2={"frames": 13}), "2")
    return [(f"frame {i + 1}", frames[i]) for i in (0, 4, 8, 12)]


# Sizes and lists


def fitting() -> Graph:
    graph = but(demo("semantix_image"), _2={"width": 224, "height": 144})
    graph["fit"] = new("SemanticStyleFitPicture", image=["2", 0], model=["1", 0], vae=["1", 2], mask=["2", 4], side=0)
    graph["back"] = new("SemanticStyleOriginalSize", image=["fit", 0], original=["fit", 2])
    return graph


def sized(label: str, image: Image.Image) -> Cell:
    return f"{label}, {image.width} x {image.height}", image


@recipe("FitPicture", 2)
def fit_picture(bench: Bench) -> Sequence[Cell]:
    graph = fitting()
    return [
        sized("as it came", bench.image(graph, "2")),
        sized("for the model", bench.image(graph, "fit")),
        ("its mask", bench.image(graph, "2", 4, "mask")),
        ("the mask with it", bench.image(graph, "fit", 1, "mask")),
    ]


@recipe("OriginalSize", 2)
def original_size(bench: Bench) -> Sequence[Cell]:
    graph = fitting()
    return [sized("made", bench.image(graph, "fit")), sized("back", bench.image(graph, "back"))]


@recipe("ListItem", 2)
def list_item(bench: Bench) -> Sequence[Cell]:
    graph = demo("semantix_two_references")
    graph["two"] = new("ImageBatch", image1=["2", 0], image2=["3", 0])
    graph["batch"] = new("ImageBatch", image1=["two", 0], image2=["4", 0])
    graph["list"] = new("RebatchImages", images=["batch", 0], batch_size=1)
    graph["item"] = new("SemanticStyleListItem", items=["list", 0], index=1)
    listed = [(f"list, {i}", bench.image(graph, node)) for i, node in enumerate(("2", "3", "4"))]
    return [*listed, ("index 1", bench.image(graph, "item"))]


@recipe("KeepResult", 2)
def keep_result(bench: Bench) -> Sequence[Cell]:
    graph = demo("invert_and_reconstruct")
    graph["keep"] = new("SemanticStyleKeepResult", model=["1", 0], key="replayed", a=["10", 0])
    made = bench.image(graph, "keep")
    return [
        ("made, and kept", made),
        ("given again, nothing connected", bench.image(but(graph, _keep={"a": None}), "keep")),
    ]


# Inversions


def path(bench: Bench, graph: Graph, inversion: str, steps: Sequence[int]) -> list[Cell]:
    """An inversion's latents at these steps."""
    taken = new("SemanticStyleInversionLatent", inversion=[inversion, 0], step=0)
    decoded = new("VAEDecode", samples=["taken", 0], vae=["1", 2])
    return sweep(bench, {**graph, "taken": taken, "decoded": decoded}, "taken", "step", steps, "decoded")


@recipe("DDIMInversion")
def ddim_inversion(bench: Bench) -> Sequence[Cell]:
    graph = but(demo("adain_regions"), _9={"value": 0}, _16={"start": None})
    (_, half), (_, top) = path(bench, graph, "7", (STEPS // 2, 0))
    picture, replayed = bench.image(graph, "2"), bench.image(graph, "18")
    refined = bench.image(but(graph, _7={"refine": 2}), "18")
    return [
        ("picture", picture),
        ("half of the steps up", half),
        ("at the top", top),
        ("replayed", replayed),
        (f"its error, x {MAGNIFIED}", difference(picture, replayed)),
        (f"error, refine 2, x {MAGNIFIED}", difference(picture, refined)),
    ]


def edited(bench: Bench) -> Graph:
    """The scene of invert_and_reconstruct replayed with another sky and another hill in the caption."""
    graph = demo("invert_and_reconstruct")
    phrases = bench.text(graph, "2", 2).split(", ")
    other = {"sky": "navy and purple dotted sky", "hill": "pink and red striped hill"}
    caption = ", ".join(other.get(phrase.split()[-1], phrase) for phrase in phrases)
    graph["other"] = new("SemanticStylePaperlandEncode", clip=["1", 1], caption=caption)
    return but(graph, _8={"positive": ["other", 0]})


@recipe("DDPMInversion")
def ddpm_inversion(bench: Bench) -> Sequence[Cell]:
    graph = demo("invert_and_reconstruct")
    (_, half), (_, top) = path(bench, graph, "6", (STEPS // 2, 0))
    picture, replayed = bench.image(graph, "2"), bench.image(graph, "10")
    return [
        ("picture", picture),
        ("half of the steps up", half),
        ("at the top", top),
        ("replayed", replayed),
        (f"its error, x {MAGNIFIED}", difference(picture, replayed)),
        ("replayed with another caption", bench.image(but(edited(bench), _7={"skip": 5}), "10")),
    ]


@recipe("Replay", 2)
def replay(bench: Bench) -> Sequence[Cell]:
    graph = edited(bench)
    swept = sweep(bench, graph, "7", "skip", (0, 6, 12), "10")
    return [("picture", bench.image(graph, "2")), *((f"edited, {label}", image) for label, image in swept)]


@recipe("InversionLatent", 2)
def inversion_latent(bench: Bench) -> Sequence[Cell]:
    return path(bench, demo("invert_and_reconstruct"), "6", (0, 12, 16, STEPS))


@recipe("InversionFromBatch", 2)
def inversion_from_batch(bench: Bench) -> Sequence[Cell]:
    graph = demo("scsa_colors")
    graph["at"] = new("SemanticStyleInversionLatent", inversion=["7", 0], step=14)
    batch = bench.images(graph, "at", kind="latent")
    taken = but(graph, at={"inversion": ["27", 0]})
    return [
        *((f"batch, {i}", picture) for i, picture in enumerate(batch[:3])),
        ("batch_index 1", bench.image(taken, "at", kind="latent")),
    ]


def from_file(bench: Bench) -> Graph:
    """The replay of `edited` from a file."""
    graph = edited(bench)
    graph["save"] = new("SemanticStyleSaveInversion", inversion=["6", 0], filename_prefix="inversions/scene")
    graph["load"] = new("SemanticStyleLoadInversion", file=bench.text(graph, "save", 0))
    return but(graph, _7={"inversion": ["load", 0]})


@recipe("SaveInversion", 2)
def save_inversion(bench: Bench) -> Sequence[Cell]:
    cells = path(bench, from_file(bench), "load", (STEPS, 16, 12, 0))
    return [(f"in the file: {label}", image) for label, image in cells]


@recipe("LoadInversion")
def load_inversion(bench: Bench) -> Sequence[Cell]:
    graph = from_file(bench)
    return [
        ("picture", bench.image(graph, "2")),
        ("replayed from the file", bench.image(but(graph, _8={"positive": ["3", 0]}), "10")),
        ("with another caption", bench.image(but(graph, _7={"skip": 5}), "10")),
    ]


# Regions


def sides(bench: Bench, graph: Graph) -> list[Cell]:
    return [("content", bench.image(graph, "2")), ("style", bench.image(graph, "3"))]


def preview(bench: Bench, graph: Graph, node: str, opacity: float = 0.5) -> Image.Image:
    """What Preview Semantic Map shows of the map that `node` makes."""
    view = new("SemanticStylePreviewMap", semantic_map=[node, 0], opacity=opacity, content=["2", 0], style=["3", 0])
    return bench.image({**graph, "preview": view}, "preview")


@recipe("AdaIN", 2)
def adain(bench: Bench) -> Sequence[Cell]:
    graph = but(demo("adain_regions"), _9={"value": 11})
    return [
        *sides(bench, graph),
        ("whole picture", bench.image(graph, "21")),
        ("region by region", bench.image(graph, "18")),
    ]


@recipe("MapFromColors", 4)
def map_from_colors(bench: Bench) -> Sequence[Cell]:
    return regions_given(bench, demo("scsa_colors"), "9", "colours")


@recipe("MapFromLabels", 4)
def map_from_labels(bench: Bench) -> Sequence[Cell]:
    return regions_given(bench, demo("adain_regions"), "12", "labels")


def regions_given(bench: Bench, graph: Graph, node: str, what: str) -> Sequence[Cell]:
    content, style = sides(bench, graph)
    return [
        content,
        (f"its {what}", bench.image(graph, "2", 3)),
        style,
        (f"its {what}", bench.image(graph, "3", 3)),
        ("the map that they give", narrowed(preview(bench, graph, node))),
    ]


@recipe("MapFromMasks", 4)
def map_from_masks(bench: Bench) -> Sequence[Cell]:
    graph, cells = demo("scsa_colors"), []
    for side, scene in (("content", "2"), ("style", "3")):
        for number, color in enumerate((SKY, SUN), start=1):
            graph[f"{side}{number}"] = new("ImageColorToMask", image=[scene, 3], color=color)
            graph[f"{side}{number}_image"] = new("MaskToImage", mask=[f"{side}{number}", 0])
            cells.append((f"{side}, mask {number}", bench.image(graph, f"{side}{number}", kind="mask")))
        both = [[f"{side}{number}_image", 0] for number in (1, 2)]
        graph[f"{side}_images"] = new("ImageBatch", image1=both[0], image2=both[1])
        graph[f"{side}_masks"] = new("ImageToMask", image=[f"{side}_images", 0], channel="red")
    masks = {side: [f"{side}_masks", 0] for side in ("content", "style")}
    graph["map"] = new("SemanticStyleMapFromMasks", **masks, gaps="auto", frames=1, order="region by region")
    return [*cells, ("the map that they give; 0 is what no mask covers", narrowed(preview(bench, graph, "map")))]


@recipe("PreviewMap", 1)
def preview_map(bench: Bench) -> Sequence[Cell]:
    return [(f"opacity {o:g}", narrowed(preview(bench, demo("scsa_colors"), "9", o))) for o in (0.2, 0.8)]


@recipe("AutoMap", 1)
def auto_map(bench: Bench) -> Sequence[Cell]:
    graph = demo("scsa_auto")
    return [
        ("regions 0: the number is chosen", narrowed(preview(bench, graph, "9"))),
        ("regions 5", narrowed(preview(bench, but(graph, _9={"regions": 5}), "9"))),
    ]


# SCSA


@recipe("ApplySCSA")
def apply_scsa(bench: Bench) -> Sequence[Cell]:
    graph = demo("scsa_colors")
    replayed = sweep(bench, but(graph, _16={"start": None}), "10", "strength", (0.0, 0.5, 1.0), "18")
    return [*sides(bench, graph), *replayed, ("strength 1 after AdaIN", bench.image(graph, "18"))]


@recipe("SCSARestyle")
def scsa_restyle(bench: Bench) -> Sequence[Cell]:
    graph = demo("scsa_simple")
    half = sweep(bench, graph, "7", "style", (0.5,), "7")
    return [*sides(bench, graph), *half, *sweep(bench, graph, "7", "pattern", (0.0, 0.5, 1.0), "7")]


# Semantix


@recipe("SemantixRestyle")
def semantix_restyle(bench: Bench) -> Sequence[Cell]:
    graph = demo("semantix_simple")
    return [*sides(bench, graph), *sweep(bench, graph, "4", "style", (0.0, 0.25, 0.5, 1.0), "4")]


@recipe("KSampler")
def semantix_sampler(bench: Bench) -> Sequence[Cell]:
    graph = demo("semantix_image")
    cells = [("context", bench.image(graph, "2")), ("reference", bench.image(graph, "3"))]
    return [*cells, *sweep(bench, graph, "11", "style_weight", (0.0, 3.0, 6.0, 12.0), "13")]


# In place of the energy guider in the graph with two references.
PLAIN_GUIDER = new("CFGGuider", model=["1", 0], positive=["5", 0], negative=["6", 0], cfg=3.5)


def one_energy() -> Graph:
    """The graph with two references, with the sky's energy alone on the whole picture, and without AdaIN."""
    graph = but(demo("semantix_two_references"), _21={"energy": ["18", 0]}, _25={"sampler": ["22", 1]})
    return but(graph, _18={"content_mask": None, "style_mask": None})


@recipe("SemantixEnergy")
def semantix_energy(bench: Bench) -> Sequence[Cell]:
    graph = one_energy()
    graph["land"] = new("InvertMask", mask=["14", 0])
    masked = but(graph, _18={"content_mask": ["16", 0], "style_mask": ["land", 0]})
    (strong,) = sweep(bench, masked, "18", "style_weight", (9.0,), "26")
    return [
        ("context", bench.image(graph, "2")),
        ("reference", bench.image(graph, "3")),
        *sweep(bench, graph, "18", "style_weight", (3.0, 9.0), "26"),
        ("a content_mask", bench.image(graph, "16", kind="mask")),
        (f"{strong[0]} in it", strong[1]),
    ]


@recipe("CombineEnergies")
def combine_energies(bench: Bench) -> Sequence[Cell]:
    graph = demo("semantix_two_references")
    a = but(graph, _21={"energy": ["18", 0]}, _25={"sampler": ["23", 0]})
    # Alone it has to hold the context itself.
    held = {"spatial_weight": graph["18"]["inputs"]["spatial_weight"], "semantic_weight": 2.0}
    b = but(graph, _19=held, _21={"energy": ["19", 0]}, _24={"sampler": ["22", 1]})
    return [
        ("context", bench.image(graph, "2")),
        ("the sky's reference", bench.image(graph, "3")),
        ("the land's reference", bench.image(graph, "4")),
        ("a alone: the sky", bench.image(a, "26")),
        ("b alone: the land", bench.image(b, "26")),
        ("both", bench.image(graph, "26")),
    ]


@recipe("ReplayAdaIN")
def replay_adain(bench: Bench) -> Sequence[Cell]:
    graph = demo("semantix_two_references")
    graph = {**but(graph, _25={"sampler": ["23", 0]}), "21": PLAIN_GUIDER}
    whole = but(graph, _23={"content_mask": None, "style_mask": None})
    (_, context), (_, reference) = sides(bench, graph)
    return [
        ("replayed picture", context),
        ("reference", reference),
        ("strength 0.5", bench.image(but(whole, _23={"strength": 0.5}), "26")),
        ("strength 1", bench.image(whole, "26")),
        ("a content_mask", bench.image(graph, "13", kind="mask")),
        ("strength 1 in it", bench.image(graph, "26")),
    ]


@recipe("EnergyGuider", 2)
def energy_guider(bench: Bench) -> Sequence[Cell]:
    graph = but(one_energy(), _18={"style_weight": 9.0})
    plain = {**graph, "21": PLAIN_GUIDER}
    return [
        ("picture", bench.image(graph, "2")),
        ("reference", bench.image(graph, "3")),
        ("replay, CFG Guider", bench.image(plain, "26")),
        ("replay, this guider", bench.image(graph, "26")),
    ]


# Video


@recipe("Flicker")
def flicker(bench: Bench) -> Sequence[Cell]:
    graph = but(demo("semantix_video"), _2={"frames": 4})
    graph["flicker"] = new(
        "SemanticStyleFlicker", video=["11", 0], context=["2", 0], labels=["2", 1], still=0.016, margin=3
    )
    cells = []
    for same in (True, False):
        graph = but(graph, _8={"same_noise": same})
        frames = bench.images(graph, "11")
        excess = float(bench.text(graph, "flicker", 0))
        cells += [
            (f"frame 2, {'one noise' if same else 'a noise for each'}", frames[1]),
            ("frame 3", frames[2]),
            (f"their difference, x {MAGNIFIED}: excess {excess:.4f}", difference(frames[1], frames[2])),
        ]
    return cells


# Spin


@recipe("Saliency", 2)
def saliency(bench: Bench) -> Sequence[Cell]:
    graph = demo("spin_insert")
    graph = but(graph, _8={"pixels": ["3", 0]}, _10={"image": ["3", 0]}, _3={"layout_seed": 148, "style_seed": 648})
    cells = [("picture", bench.image(graph, "3"))]
    for word in ("sun", "house, roof", "tree"):
        cells.append((word, bench.image(but(graph, _10={"class_word": word}), "10", 1)))
    return cells


@recipe("SpinEmbedding", 4)
def spin_embedding(bench: Bench) -> Sequence[Cell]:
    graph = demo("spin_insert")
    return [
        ("reference", bench.image(graph, "2")),
        ("its subject", bench.image(graph, "10", 1)),
        ("painted: class word", bench.image(graph, "18")),
        ("painted: learnt word", bench.image(graph, "22")),
        ("report: the loss while learning", narrowed(bench.image(graph, "11", 2))),
    ]


def painted_into(bench: Bench, graph: Graph) -> list[Cell]:
    return [
        ("reference", bench.image(graph, "2")),
        ("background", bench.image(graph, "3")),
        ("mask", bench.image(graph, "4", 4, "mask")),
    ]


@recipe("ApplySpin")
def apply_spin(bench: Bench) -> Sequence[Cell]:
    graph = demo("spin_insert")
    return [*painted_into(bench, graph), *sweep(bench, graph, "19", "strength", (0.0, 0.5, 1.0), "22")]


@recipe("SpinStyleEnergy")
def spin_style_energy(bench: Bench) -> Sequence[Cell]:
    graph = demo("spin_insert")
    return [*painted_into(bench, graph), *sweep(bench, graph, "24", "weight", (0.0, 0.5, 3.0), "31")]


@recipe("KeepBackground")
def keep_background(bench: Bench) -> Sequence[Cell]:
    graph = but(demo("spin_insert"), _20={"latent_image": ["9", 0], "denoise": 0.7})
    return [
        ("made", bench.image(graph, "21")),
        ("original", bench.image(graph, "3")),
        ("mask", bench.image(graph, "4", 4, "mask")),
        ("feather 0", bench.image(graph, "22")),
        ("feather 12", bench.image(but(graph, _22={"feather": 12}), "22")),
        (f"change, x {MAGNIFIED}", difference(bench.image(graph, "22"), bench.image(graph, "3"))),
    ]


@recipe("SpinPaint")
def spin_paint(bench: Bench) -> Sequence[Cell]:
    graph = demo("spin_simple")
    cells = painted_into(bench, graph)
    for subject, blend in ((0.5, 0.0), (1.0, 0.0), (1.0, 0.4)):
        changed = but(graph, _8={"subject": subject, "blend": blend})
        cells.append((f"subject {subject:g}, blend {blend:g}", bench.image(changed, "8")))
    return cells
