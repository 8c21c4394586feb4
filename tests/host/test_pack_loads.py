"""The pack in ComfyUI: every node loads, says what it does, and a broken one is noticed."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import semantic_style

# Public: these names are in users' files. Add, never change or remove.
NODE_IDS = {
    "SemanticStyleAdaIN",
    "SemanticStyleAutoMap",
    "SemanticStyleApplySCSA",
    "SemanticStyleCombineEnergies",
    "SemanticStyleDDIMInversion",
    "SemanticStyleDDPMInversion",
    "SemanticStyleEnergyGuider",
    "SemanticStyleInversionLatent",
    "SemanticStyleInversionFromBatch",
    "SemanticStyleFlicker",
    "SemanticStyleKSampler",
    "SemanticStyleLoadInversion",
    *("SemanticStyleMapFromColors", "SemanticStyleMapFromMasks", "SemanticStylePreviewMap"),
    "SemanticStyleMapFromLabels",
    "SemanticStylePaperlandClip",
    "SemanticStylePaperlandEncode",
    "SemanticStylePaperlandLatent",
    "SemanticStylePaperlandModel",
    "SemanticStylePaperlandScene",
    "SemanticStyleReplay",
    "SemanticStyleReplayAdaIN",
    "SemanticStyleSaliency",
    "SemanticStyleSaveInversion",
    "SemanticStyleSemantixEnergy",
    "SemanticStyleSpinEmbedding",
    *("SemanticStyleApplySpin", "SemanticStyleKeepBackground", "SemanticStyleSpinStyleEnergy"),
    *("SemanticStyleSemantixRestyle", "SemanticStyleSCSARestyle", "SemanticStyleSpinPaint"),
    *("SemanticStyleFitPicture", "SemanticStyleOriginalSize", "SemanticStyleListItem", "SemanticStyleKeepResult"),
}


def load_nodes(pack: ModuleType) -> list:
    async def load() -> list:
        return await (await pack.comfy_entrypoint()).get_node_list()

    return asyncio.run(load())


@pytest.fixture(scope="module")
def schemas() -> dict:
    """Every node's schema as ComfyUI completes and validates it, by node id."""
    found = [node.GET_SCHEMA() for node in load_nodes(semantic_style)]
    by_id = {schema.node_id: schema for schema in found}
    assert len(by_id) == len(found), "two nodes have the same id"
    return by_id


# For every output that a bypassed node hands on something for, the input: all others hand on nothing.
PASSED = {
    ("SemanticStyleAdaIN", "latent"): "content",
    ("SemanticStyleApplySCSA", "model"): "model",
    ("SemanticStyleApplySpin", "model"): "model",
    ("SemanticStyleApplySpin", "positive"): "background",
    ("SemanticStyleCombineEnergies", "energy"): "a",
    ("SemanticStyleInversionFromBatch", "inversion"): "inversion",
    ("SemanticStyleKeepBackground", "image"): "image",
    ("SemanticStylePreviewMap", "preview"): "content",
    ("SemanticStyleReplay", "latent"): "start",
    ("SemanticStyleReplayAdaIN", "sampler"): "sampler",
    ("SemanticStyleSaliency", "preview"): "image",
    ("SemanticStyleSpinEmbedding", "report"): "image",
    ("SemanticStyleFitPicture", "image"): "image",
    ("SemanticStyleFitPicture", "mask"): "mask",
    ("SemanticStyleFitPicture", "original"): "image",
    ("SemanticStyleOriginalSize", "image"): "image",
    ("SemanticStyleListItem", "item"): "items",
    **{("SemanticStyleKeepResult", out): given for out, given in zip("abc", "aab", strict=True)},
    ("SemanticStyleSemantixRestyle", "image"): "content",
    ("SemanticStyleSemantixRestyle", "plot"): "content",
    ("SemanticStyleSCSARestyle", "image"): "content",
    ("SemanticStyleSCSARestyle", "map_preview"): "content",
    ("SemanticStyleSpinPaint", "image"): "background",
    ("SemanticStyleSpinPaint", "plot"): "background",
    # Values of widgets: the frontend takes those, too. Some mean nothing, and no order would keep them back.
    ("SemanticStyleSpinEmbedding", "embedding"): "class_word",
    ("SemanticStyleFlicker", "excess"): "still",
    ("SemanticStylePaperlandEncode", "unknown"): "caption",
    ("SemanticStyleSaliency", "report"): "class_word",
    ("SemanticStyleSaveInversion", "file"): "filename_prefix",
    ("SemanticStyleSemantixRestyle", "report"): "prompt",
    ("SemanticStyleSpinPaint", "word"): "class_word",
    ("SemanticStyleSpinPaint", "report"): "class_word",
}


def bypassed(schema) -> dict[str, str]:
    """By output the input that the frontend passes in its place when the node is bypassed: the one of the same slot if
    its type fits, else the first of that type. Sockets come before widgets.
    """
    widgets = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
    inputs = sorted(schema.inputs, key=lambda i: i.get_io_type() in widgets)
    passed = {}
    for slot, output in enumerate(schema.outputs):
        kind = output.get_io_type()
        fitting = [i.id for i in (*inputs[slot : slot + 1], *inputs) if i.get_io_type() == kind]
        if fitting:
            passed[output.display_name] = fitting[0]
    return passed


def test_a_bypassed_node_hands_on_what_one_expects(schemas: dict) -> None:
    found = {(node, out): given for node, schema in schemas.items() for out, given in bypassed(schema).items()}
    assert found == PASSED


def test_the_node_ids_are_the_public_ones(schemas: dict) -> None:
    assert set(schemas) == NODE_IDS


@pytest.mark.parametrize("node_id", sorted(NODE_IDS))
def test_a_node_explains_itself(schemas: dict, node_id: str, root: Path) -> None:
    schema = schemas[node_id]
    assert schema.description
    assert schema.display_name
    assert schema.category.startswith("semantic_style/")
    silent = [socket.id for socket in [*(schema.inputs or []), *(schema.outputs or [])] if not socket.tooltip]
    assert not silent, f"no tooltip: {silent}"
    # ComfyUI shows an output without a display name by its type; its id is not shown anywhere.
    unnamed = [out.id for out in schema.outputs or [] if not out.display_name and out.id not in (None, out.io_type)]
    assert not unnamed, f"no display_name: {unnamed}"
    page = root / "web" / "docs" / f"{node_id}.md"
    assert page.is_file(), f"no help page {page}"
    text = page.read_text(encoding="utf-8")
    undescribed = [
        socket.id
        for socket in schema.inputs or []
        if not re.search(rf"\b({socket.id}|{socket.id.replace('_', ' ')})\b", text)
    ]
    assert not undescribed, f"not on the help page: {undescribed}"


def test_there_is_no_help_page_without_a_node(root: Path) -> None:
    assert {page.stem for page in (root / "web" / "docs").glob("*.md")} <= NODE_IDS


@pytest.mark.parametrize("code", ["raise ImportError('broken on purpose')", "NODES = [no_such_name]", "", "def ("])
def test_a_broken_family_is_noticed(tmp_path: Path, root: Path, code: str) -> None:
    copy = tmp_path / "broken_pack"
    shutil.copytree(root / "nodes", copy / "nodes", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "attention", "demo", "host", "samplers"):
        (copy / name).symlink_to(root / name)
    (copy / "nodes" / "adain.py").write_text(code)
    spec = importlib.util.spec_from_file_location(
        "broken_pack", copy / "__init__.py", submodule_search_locations=[str(copy)]
    )
    assert spec is not None
    assert spec.loader is not None
    pack = sys.modules["broken_pack"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(pack)
        with pytest.raises((ImportError, NameError, SyntaxError, AttributeError)):
            load_nodes(pack)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "broken_pack"]:
            del sys.modules[name]


def test_the_server_has_every_node_from_this_pack(comfy_client, schemas: dict) -> None:
    info = comfy_client.object_info()
    ours = {name: node for name, node in info.items() if node["python_module"] == "custom_nodes.semantic-style"}
    assert set(ours) == set(schemas)
    for name, node in ours.items():
        assert node["description"], name
        assert all(node["output_tooltips"]), name


def test_inputs_that_few_need_can_be_folded_away(comfy_client, schemas: dict) -> None:
    info = comfy_client.object_info()
    given = [spec for name in schemas for group in info[name]["input"].values() for spec in group.items()]
    folded = {name for name, (_, *told) in given if told and told[0].get("advanced")}
    names = "allow_other_model checkpointing guide_every batch_steps refine smallest gaps cfg learning_rate side skip"
    assert folded == set(names.split())


def test_the_server_s_log_has_no_complaint_about_the_pack(comfy_server) -> None:
    log = comfy_server.log.read_text(encoding="utf-8", errors="replace")
    complaints = ("IMPORT FAILED", "comfy_entrypoint", "Cannot import", "Skip ")
    assert "semantic-style" in log
    assert not [line for line in log.splitlines() if "semantic-style" in line and any(c in line for c in complaints)]
