"""The nodes that make and show semantic maps, called directly and in a running ComfyUI."""

import pytest
import torch
from semantic_style.nodes.nodes_maps import MapFromColors, MapFromMasks, PreviewMap
from semantic_style.regions.semantic_map import SemanticMap

RED, BLUE, GREEN = (torch.tensor(color) for color in ((1.0, 0, 0), (0, 0, 1.0), (0, 1.0, 0)))


def picture(top, bottom, size=(32, 48)):
    image = torch.empty(1, *size, 3)
    image[:, : size[0] // 2], image[:, size[0] // 2 :] = top, bottom
    return image


@pytest.fixture
def temporary_folder(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    return tmp_path


def test_colours_become_a_map_with_a_report():
    with_alpha = torch.cat([picture(RED, BLUE), torch.ones(1, 32, 48, 1)], dim=-1)
    regions, report = MapFromColors.execute(with_alpha, picture(BLUE, GREEN, (60, 20)), 0, 0.5).result
    assert regions.content[0, ::31, 0].tolist() != regions.content[0, 0, :2].tolist()
    assert regions.content[0, -1, 0] == regions.style[0, 0, 0]
    assert report.splitlines() == [
        "3 regions",
        "1 #0000ff: 50.0% of the content, 50.0% of the style",
        "2 #ff0000: 50.0% of the content, 0.0% of the style",
        "3 #00ff00: 0.0% of the content, 50.0% of the style",
        "Region 2 (50.0% of the content) is not in the style: it takes from the whole style.",
        "Region 3 (50.0% of the style) is not in the content: nothing takes from it.",
    ]


def test_the_smallest_region_is_in_percent():
    spotted = picture(RED, BLUE, (100, 100))
    spotted[:, :10, :10] = GREEN  # 1%
    for smallest, number in ((0.9, 3), (1.1, 2)):
        assert len(MapFromColors.execute(spotted, spotted, 0, smallest).result[0].content.unique()) == number


def test_one_region_of_several_colours_is_doubted():
    ramp = torch.linspace(0.5, 0.52, 48).reshape(1, 1, 48, 1).expand(1, 32, 48, 3)
    regions, report = MapFromColors.execute(ramp, ramp, 0, 0.5).result
    assert len(regions.content.unique()) == 1
    assert "neither compressed nor resized" in report
    assert "compressed" not in MapFromColors.execute(picture(RED, RED), picture(RED, RED), 0, 0.5).result[1]


def test_many_colours_are_doubted():
    colors = torch.rand(6, 6, 3, generator=torch.Generator().manual_seed(0))
    many = colors.repeat_interleave(8, 0).repeat_interleave(8, 1)[None]
    assert "36 regions are many" in MapFromColors.execute(many, many, 0, 0.5).result[1]
    assert "many" not in MapFromColors.execute(many, many, 36, 0.5).result[1]


def masks(*rows):
    return torch.tensor(rows).float()[:, None, :].expand(-1, 40, -1)


HALVES = masks([1] * 20 + [0] * 20, [0] * 20 + [1] * 20)


def test_a_batch_a_list_and_flat_masks_are_the_same():
    for given in ([HALVES], list(HALVES.split(1)), list(HALVES)):
        regions, report = MapFromMasks.execute(given, [HALVES], ["auto"]).result
        assert regions.content[0, 0].tolist() == [1] * 20 + [2] * 20
        assert report.splitlines() == [
            "2 regions",
            "1: 50.0% of the content, 50.0% of the style",
            "2: 50.0% of the content, 50.0% of the style",
        ]


def test_tracked_masks_come_as_a_list_of_clips():
    clips = [HALVES[:1].expand(3, -1, -1), HALVES[1:].expand(3, -1, -1)]
    regions, report = MapFromMasks.execute(clips, [HALVES], ["auto"], [3], ["region by region"]).result
    assert regions.content.shape == (3, 40, 40)
    assert regions.content[2, 0].tolist() == [1] * 20 + [2] * 20
    assert report.startswith("2 regions")


def test_overlaps_and_gaps_are_reported():
    unclear = masks([1] * 30 + [0] * 10, [0] * 20 + [1] * 14 + [0] * 6)
    overlapped = (
        "In the content masks overlapped on 25.0% (1 and 2 on 25.0%): the higher value or the smaller mask won; "
        "15.0% had no mask and became "
    )
    report = MapFromMasks.execute([unclear], [HALVES], ["auto"]).result[1]
    assert "0 (no mask): 15.0% of the content, 0.0% of the style" in report
    assert overlapped + "region 0." in report
    report = MapFromMasks.execute([unclear], [HALVES], ["nearest region"]).result[1]
    assert overlapped + "part of the nearest region." in report
    assert "(no mask)" not in report


def test_refused_masks():
    with pytest.raises(ValueError, match=r"content masks have different sizes \(20x40, 40x40\)"):
        MapFromMasks.execute([HALVES, HALVES[:, :, :20]], [HALVES], ["auto"])
    with pytest.raises(ValueError, match=r"content has 2 masks \(2 regions in 1 frames\) and style 1"):
        MapFromMasks.execute([HALVES], [HALVES[:1]], ["auto"])
    with pytest.raises(ValueError, match="gaps is 'no'"):
        MapFromMasks.execute([HALVES], [HALVES], ["no"])


def test_the_preview_shows_images_regions_and_warnings(temporary_folder):
    content = torch.ones(1, 64, 64, dtype=torch.int64)
    content[:, 32:] = 2
    regions = SemanticMap(content, torch.full((1, 64, 96), 2))
    grey = torch.full((1, 64, 64, 3), 0.25)
    clear, warned = PreviewMap.execute(regions, 0.0, grey).result
    assert warned == "Region 1 (50.0% of the content) is not in the style: it takes from the whole style."
    assert (clear[0] == 64 / 255).all(dim=-1).float().mean() > 0.3  # most of the content's half
    covered = PreviewMap.execute(regions, 1.0, grey).result[0]
    assert covered.shape == clear.shape
    assert (covered[0] == 64 / 255).all(dim=-1).float().mean() < 0.001  # by chance, in letters' smooth edges
    assert len(list(temporary_folder.glob("*.png"))) == 2


def test_the_preview_has_a_picture_for_every_frame_and_doubts_shapes(temporary_folder):
    frames = torch.ones(3, 30, 40, dtype=torch.int64)
    frames[1, 15:] = 5
    preview, warned = PreviewMap.execute(SemanticMap(frames, frames[:1]), 0.5, torch.rand(3, 40, 30, 3)).result
    assert len(preview) == 3
    assert not torch.equal(preview[0], preview[1])
    assert "The content image is 30x40 but its map 40x30" in warned
    with pytest.raises(ValueError, match="opacity"):
        PreviewMap.execute(SemanticMap(frames, frames[:1]), 1.5)


def test_in_comfyui_with_a_list_of_masks(comfy_client):
    """Masks come as a list from nodes that are run once for every picture of a list."""
    graph = {
        "black": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}},
        "white": {
            "class_type": "EmptyImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0xFFFFFF},
        },
        "both": {"class_type": "ImageBatch", "inputs": {"image1": ["black", 0], "image2": ["white", 0]}},
        "list": {"class_type": "RebatchImages", "inputs": {"images": ["both", 0], "batch_size": 1}},
        "masks": {"class_type": "ImageToMask", "inputs": {"image": ["list", 0], "channel": "red"}},
        "map": {
            "class_type": "SemanticStyleMapFromMasks",
            "inputs": {"content": ["masks", 0], "style": ["masks", 0], "gaps": "auto"},
        },
        "colors": {
            "class_type": "SemanticStyleMapFromColors",
            "inputs": {"content": ["both", 0], "style": ["white", 0], "number": 0, "smallest": 0.5},
        },
        "show": {
            "class_type": "SemanticStylePreviewMap",
            "inputs": {"semantic_map": ["map", 0], "content": ["white", 0], "opacity": 0.5},
        },
        "show colors": {
            "class_type": "SemanticStylePreviewMap",
            "inputs": {"semantic_map": ["colors", 0], "opacity": 0.5},
        },
    }
    images = comfy_client.images(comfy_client.run(graph))
    assert len(images["show"]) == 1
    assert len(images["show colors"]) == 2
