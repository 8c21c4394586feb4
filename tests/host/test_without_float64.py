"""The nodes on a device that refuses float64 (Apple's), with everything kept there: the same as on the CPU."""

import comfy.model_management
import folder_paths
import pytest
import torch
from comfy_extras.nodes_custom_sampler import CFGGuider, SamplerCustomAdvanced
from semantic_style.benchmarks.random_models import conditioning, small_sd15
from semantic_style.benchmarks.text_models import small_clip
from semantic_style.nodes.nodes_adain import AdaIN
from semantic_style.nodes.nodes_auto_map import AutoMap
from semantic_style.nodes.nodes_embedding import SpinEmbedding
from semantic_style.nodes.nodes_files import LoadInversion, SaveInversion
from semantic_style.nodes.nodes_inversion import DDIMInversion, DDPMInversion, InversionLatent, Replay
from semantic_style.nodes.nodes_maps import MapFromColors, MapFromMasks, PreviewMap
from semantic_style.nodes.nodes_saliency import FindSubject
from semantic_style.nodes.nodes_scsa import ApplySCSA
from semantic_style.nodes.nodes_semantix import AS_SET, CombineEnergies, Guider, KSampler
from semantic_style.nodes.nodes_spin import ApplySpin, KeepBackground, SpinStyleEnergy
from semantic_style.nodes.nodes_video import MeasureFlicker
from semantic_style.regions.semantic_map import SemanticMap

pytestmark = pytest.mark.usefixtures("one_thread", "as_the_host_runs_nodes")

PROMPT, EMPTY = conditioning(1), conditioning(2)
STEPS = 2


def latent(seed=0):
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) / 0.18215


def picture(seed=0, frames=1):
    """A subject before a plain ground, moving a little."""
    noise = torch.rand(frames, 64, 64, 3, generator=torch.Generator().manual_seed(seed))
    image = 0.02 * noise + 0.2
    image[:, 16:40, 20:44] += 0.6
    return image


def mask():
    inside = torch.zeros(1, 64, 64)
    inside[:, 32:] = 1
    return inside


def halves(device):
    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    labels[:, 4:] = 1
    return SemanticMap(labels.to(device), labels.flip(1).to(device))


class Graph:
    """Nodes with their values on one device."""

    def __init__(self, device):
        self.device, self.model = device, small_sd15()
        self.prompt, self.empty = ([[c[0][0].to(device), {}]] for c in (PROMPT, EMPTY))

    def on(self, tensor):
        return tensor.to(self.device)

    def invert(self, node=DDPMInversion, seed=0, cfg=3.5, scheduler="normal"):
        image = {"samples": self.on(latent(seed))}
        return node.execute(self.model, self.prompt, self.empty, image, STEPS, scheduler, cfg, seed).args[0]

    def sample(self, inversion, guider=None, **settings):
        noise, sampler, sigmas, image = Replay.execute(inversion, **{"skip": 0, "exact": True, **settings}).args
        guider = guider or CFGGuider().get_guider(self.model, self.prompt, self.empty, 3.5)[0]
        return SamplerCustomAdvanced().sample(noise, guider, sampler, self.on(sigmas), image)[0]["samples"]


def replayed(graph):
    context, reference = graph.invert(), graph.invert(seed=1)
    parts = [graph.sample(context), graph.sample(graph.invert(DDIMInversion, scheduler="ddim_uniform"))]
    regions = halves(graph.device)
    parts.append(graph.sample(context, adain_reference=reference, adain_start=0.0, semantic_map=regions))
    start = [InversionLatent.execute(i, 1).args[0] for i in (context, reference)]
    start = AdaIN.execute(*start, 0.5, regions).args[0]
    return torch.cat([*parts, graph.sample(context, skip=1, start=start)])


def saved(graph):
    (name,) = SaveInversion.execute(graph.invert(), "inversions/float64").result
    return LoadInversion.execute(name).args[0].trajectory


def restyled(graph):
    run = (3.5, AS_SET, 3.0, 0.9, 1.0, 3.0)
    given = {"semantic_map": halves(graph.device), "mask": graph.on(mask())}
    return KSampler.execute(
        graph.model, graph.prompt, graph.empty, graph.invert(), graph.invert(seed=1), *run, **given
    ).args[0]["samples"]


def spun(graph):
    model = ApplySpin.execute(graph.model, graph.empty, graph.prompt, graph.on(mask()), 1.0, 0.0, 1.0, 3).args[0]
    background = graph.invert()
    energy = SpinStyleEnergy.execute(background, graph.on(mask()), 1.0, 0.0, 1.0).args[0]
    energy = CombineEnergies.execute(energy, energy).args[0]
    return graph.sample(background, Guider.execute(model, graph.prompt, graph.empty, 3.5, energy).args[0])


def by_scsa(graph):
    content, style = (graph.invert(DDIMInversion, seed, 1.0, "ddim_uniform") for seed in (0, 1))
    settings = {**{i.id: i.default for i in ApplySCSA.define_schema().inputs if hasattr(i, "default")}, "a1": 0.0}
    given = {"model": graph.model, "content": content, "style": style, "semantic_map": halves(graph.device)}
    model = ApplySCSA.execute(**{k: v for k, v in (settings | given).items() if v is not None}).args[0]
    return graph.sample(content, CFGGuider().get_guider(model, graph.prompt, graph.empty, 1.0)[0])


def subject(graph):
    found = FindSubject.execute(
        graph.model, 0.3, 0.1, "soft", 0, 2, 0, {"samples": graph.on(latent())}, None, graph.empty, graph.on(picture())
    )
    return found.args[1]


def mapped(graph):
    automatic = AutoMap.execute(graph.model, graph.invert(), graph.invert(seed=1), 3, 1, 0).args[0]
    colors = MapFromColors.execute(graph.on(picture()), graph.on(picture(1)), 0, 0.5).args[0]
    masks = [graph.on(mask()), graph.on(1 - mask())]
    masked = MapFromMasks.execute(masks, masks, ["auto"]).args[0]
    pictures = {"content": graph.on(picture()), "style": graph.on(picture(1))}
    return torch.cat([PreviewMap.execute(m, 0.5, **pictures).args[0] for m in (automatic, colors, masked)], dim=1)


def judged(graph):
    clip = picture(frames=3)
    clip[1, 10:12] += 0.1
    pasted = KeepBackground.execute(graph.on(clip), graph.on(picture(frames=3)), graph.on(mask()), 3).args[0]
    return torch.tensor(MeasureFlicker.execute(graph.on(pasted), graph.on(picture(frames=3)), None, 0.05, 3).args[0])


def learnt(graph):
    given = {"latent": {"samples": graph.on(latent())}, "saliency": graph.on(mask())}
    return SpinEmbedding.execute(graph.model, small_clip("sd1"), "house", 1, 2, 1e-2, 1, 0, "it", **given).args[0][0][0]


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "embeddings", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))


@pytest.mark.parametrize(
    "use", [replayed, saved, restyled, spun, by_scsa, subject, mapped, judged, learnt], ids=lambda use: use.__name__
)
def test_the_same_as_on_the_cpu(use, monkeypatch, request):
    expected = use(Graph("cpu"))
    device = request.getfixturevalue("without_float64")
    for name in ("get_torch_device", "intermediate_device"):
        monkeypatch.setattr(comfy.model_management, name, lambda: device)
    for name in ("get_free_memory", "get_total_memory"):
        monkeypatch.setattr(
            comfy.model_management, name, lambda _=None, both=False, **k: (2**33,) * 2 if both or k else 2**33
        )
    out = use(Graph(device))
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-4, atol=1e-3)


def test_the_device_refuses_float64(without_float64):
    x = torch.ones(3).to(without_float64)
    assert x.device == without_float64
    assert x.cpu().double().tolist() == (x + 0).tolist() == [1.0] * 3
    for refused in (lambda: x.double(), lambda: torch.zeros(1, dtype=torch.float64, device=x.device)):
        with pytest.raises(TypeError, match="float64"):
            refused()
