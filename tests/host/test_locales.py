"""The nodes in Chinese, Japanese and German: all of each node, nothing but what is there, served by ComfyUI."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import semantic_style

# Texts that are the same in another language: symbols, names, and words that German took over.
SAME = {
    *("a", "b", "c", "a1", "a2", "t1", "t2"),
    *("cfg", "clip", "vae", "latent", "sigma", "sigmas"),
    *("paperland", "scsa", "semantic_style", "semantix", "spin", "AdaIN (Semantic Style)"),
    *("batch", "checkpointing", "embedding", "frames", "guider", "inversion", "labels", "name", "original"),
    *("prompt", "sampler", "scheduler", "seed", "start", "video"),
}
KANA, HAN = re.compile(r"[\u3041-\u30ff]"), re.compile(r"[\u4e00-\u9fff]")
NUMBER = re.compile(r"\d+(?:[.,]\d+)?")


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("locales")


@pytest.fixture(scope="module")
def schemas() -> list:
    async def load() -> list:
        return await (await semantic_style.comfy_entrypoint()).get_node_list()

    return [node.GET_SCHEMA() for node in asyncio.run(load())]


@pytest.fixture(scope="module")
def texts(tool: ModuleType) -> dict[str, dict[str, str]]:
    return tool.read_texts()


def test_every_text_has_each_language_and_no_other_has(tool: ModuleType, schemas: list, texts: dict) -> None:
    lacking, stale = tool.faults(schemas, texts)
    assert not lacking, f"tools/translations.json lacks\n{json.dumps(lacking, ensure_ascii=False, indent=2)}"
    assert not stale, f"no node has these texts of tools/translations.json any more: {stale}"
    assert {language for said in texts.values() for language in said} == set(tool.LANGUAGES)


def test_a_changed_tooltip_and_a_new_input_are_noticed(tool: ModuleType, schemas: list, texts: dict) -> None:
    """So that the test above can fail."""
    text = schemas[0].inputs[0].tooltip
    renamed = {("Reworded." if english == text else english): said for english, said in texts.items()}
    lacking, stale = tool.faults(schemas, renamed)
    assert list(lacking) == [text]
    assert stale == ["Reworded."]
    partial = {**texts, text: {"de": "Da."}}
    assert tool.faults(schemas, partial) == ({text: {"zh": "", "ja": "", "de": "Da."}}, [])


def test_the_files_are_what_the_tool_writes(tool: ModuleType, schemas: list, texts: dict, root: Path) -> None:
    found = {
        file.relative_to(root / "locales").as_posix(): file.read_text(encoding="utf-8")
        for file in (root / "locales").rglob("*")
        if file.is_file()
    }
    assert found == tool.files(schemas, texts), "run `python tools/locales.py`"


def test_every_socket_of_every_node_is_in_each_file(tool: ModuleType, schemas: list, root: Path) -> None:
    """Asked of the files by the keys that the frontend looks up, not by what the tool makes."""
    for language in tool.LANGUAGES:
        defs = json.loads((root / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
        assert set(defs) == {schema.node_id for schema in schemas}
        for schema in schemas:
            said = defs[schema.node_id]
            assert said["display_name"]
            assert said["description"]
            assert list(said["inputs"]) == [socket.id for socket in schema.inputs]
            assert list(said["outputs"]) == [str(number) for number in range(len(schema.outputs))]
            assert all(one["name"] and one["tooltip"] for part in ("inputs", "outputs") for one in said[part].values())


def plain(text: str) -> str:
    return text.replace("_", " ").casefold()


def test_nothing_is_left_in_english(texts: dict) -> None:
    same = {english for english, said in texts.items() if plain(english) in map(plain, said.values())}
    assert same == SAME
    sentences = {english: said for english, said in texts.items() if english.endswith((".", ".)"))}
    assert len(sentences) > 200
    assert [said["ja"] for said in sentences.values() if not KANA.search(said["ja"])] == []
    assert [said["zh"] for said in sentences.values() if not HAN.search(said["zh"]) or KANA.search(said["zh"])] == []
    assert [said["de"] for said in sentences.values() if KANA.search(said["de"]) or HAN.search(said["de"])] == []


def test_every_number_is_in_each_language(texts: dict) -> None:
    for english, said in texts.items():
        wanted = set(NUMBER.findall(english))
        for language, text in said.items():
            # A decimal comma in German; "3, 0.9" is two numbers.
            numbers = {number.replace(",", ".") for number in NUMBER.findall(text)}
            assert wanted <= numbers, f"{language}: {text}"


def test_no_character_means_something_to_the_frontend(texts: dict) -> None:
    """Messages of vue-i18n: {placeholder}, @:link and plural | forms."""
    assert [text for said in texts.values() for text in said.values() if set(text) & set("{}@|")] == []


def test_what_is_typed_or_chosen_stays_as_it_is(texts: dict, schemas: list) -> None:
    """Prompts' words are English for every model, and ComfyUI translates no choices of a menu."""
    kept = [
        (english, word)
        for english in texts
        for word in ("charcoal", "wavy", "red vase", "<it>", "embedding:", "models/embeddings", "output/inversions")
        if word in english
    ]
    chosen = [
        (socket.tooltip, option)
        for schema in schemas
        for socket in schema.inputs
        for option in getattr(socket, "options", None) or ()
        if option in socket.tooltip
    ]
    assert {"everything", "region by region", "published for video"} <= {option for _, option in chosen}
    lost = [(text, word) for english, word in kept + chosen for text in texts[english].values() if word not in text]
    assert lost == []


def test_comfyui_serves_them(tool: ModuleType, comfy_server, root: Path) -> None:
    with urllib.request.urlopen(f"http://{comfy_server.address}/i18n", timeout=30) as answer:
        served = json.load(answer)
    assert set(tool.LANGUAGES) <= set(served)
    for language in tool.LANGUAGES:
        folder = root / "locales" / language
        defs = json.loads((folder / "nodeDefs.json").read_text(encoding="utf-8"))
        assert served[language]["nodeDefs"] == defs
        categories = json.loads((folder / "main.json").read_text(encoding="utf-8"))["nodeCategories"]
        assert categories.items() <= served[language]["nodeCategories"].items()
