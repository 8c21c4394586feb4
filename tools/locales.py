"""Write locales/ from translations.json: python tools/locales.py [--check]

The nodes' schemas hold the English; translations.json holds, for every English text, what it is in the other languages,
so a text that changes loses its translations and is asked for anew. ComfyUI serves locales/LANGUAGE/*.json at /i18n.
Prints the texts that lack a translation, as entries to fill in, and those that no node has any more, and writes nothing
while there are any. --check never writes, and fails where a file of locales/ is not what it would write.

Needs ComfyUI.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from run import ROOT, load_pack

LANGUAGES = ("zh", "ja", "de")
TRANSLATIONS = ROOT / "tools" / "translations.json"

Texts = dict[str, dict[str, str]]


def node_defs(schemas: Iterable[Any], say: Callable[[str], str]) -> dict[str, Any]:
    """nodeDefs.json of nodes with those completed schemas, where `say` translates a text."""

    def socket(name: str, tooltip: str | None) -> dict[str, str]:
        return {"name": say(name), **({"tooltip": say(tooltip)} if tooltip else {})}

    return {
        _key(schema.node_id): {
            "display_name": say(schema.display_name),
            "description": say(schema.description),
            "inputs": {_key(i.id): socket(i.display_name or i.id, i.tooltip) for i in schema.inputs},
            "outputs": {str(n): socket(o.display_name or o.io_type, o.tooltip) for n, o in enumerate(schema.outputs)},
        }
        for schema in sorted(schemas, key=lambda schema: schema.node_id)
    }


def main_texts(schemas: Iterable[Any], say: Callable[[str], str]) -> dict[str, Any]:
    """main.json: the parts of the nodes' categories."""
    parts = {part for schema in schemas for part in schema.category.split("/")}
    return {"nodeCategories": {part: say(part) for part in sorted(parts)}}


def files(schemas: list[Any], texts: Texts) -> dict[str, str]:
    """What locales/ holds, by path below it."""
    made = {}
    for language in LANGUAGES:
        for name, make in (("main", main_texts), ("nodeDefs", node_defs)):
            content = make(schemas, lambda text, language=language: texts[text][language])
            made[f"{language}/{name}.json"] = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    return made


def faults(schemas: list[Any], texts: Texts) -> tuple[Texts, list[str]]:
    """Texts that lack a translation, with those they have, and texts that no node has."""
    used: dict[str, None] = {}
    for make in (main_texts, node_defs):
        make(schemas, lambda text: used.setdefault(text) or text)
    known = {text: texts.get(text, {}) for text in used}
    lacking = {
        text: {language: said.get(language, "") for language in LANGUAGES}
        for text, said in known.items()
        if not all(said.get(language) for language in LANGUAGES)
    }
    return lacking, [text for text in texts if text not in used]


def _key(name: str) -> str:
    """The frontend looks a name up with its dots, which would part it, replaced."""
    return name.replace(".", "_")


def read_texts() -> Texts:
    return json.loads(TRANSLATIONS.read_text(encoding="utf-8"))


def read_schemas() -> list[Any]:
    """The pack's schemas, as the ComfyUI that the pack finds completes them."""
    load_pack()
    from semantic_style.runner import locate

    host = locate.find_host(ROOT)
    if host is None:
        sys.exit(f"{locate.NO_HOST}: set COMFYUI_PATH")
    sys.path[:] = [str(host), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]
    import comfy.cli_args
    import semantic_style

    comfy.cli_args.args.cpu = True

    async def load() -> list[Any]:
        return await (await semantic_style.comfy_entrypoint()).get_node_list()

    return [node.GET_SCHEMA() for node in asyncio.run(load())]


def main() -> int:
    parser = argparse.ArgumentParser(description="Write locales/ from translations.json.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    schemas, texts = read_schemas(), read_texts()
    lacking, stale = faults(schemas, texts)
    if lacking:
        print(f"{len(lacking)} texts to translate in {TRANSLATIONS.name}:")
        print(json.dumps(lacking, ensure_ascii=False, indent=2))
    if stale:
        print(f"{len(stale)} texts to remove from {TRANSLATIONS.name}:", *stale, sep="\n")
    if lacking or stale:
        return 1
    folder, failed = ROOT / "locales", 0
    for name, content in files(schemas, texts).items():
        file = folder / name
        if file.is_file() and file.read_text(encoding="utf-8") == content:
            continue
        if check:
            print(f"locales/{name} is not up to date")
            failed = 1
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content, encoding="utf-8", newline="\n")
            print(f"wrote locales/{name}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
