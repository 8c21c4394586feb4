"""Nodes that keep inversions in ComfyUI's folders."""

import logging
import os
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..files.inversion_file import load_inversion, save_inversion
from ..files.listing import Listing
from ..samplers.inversion import Inversion
from .schema import schema
from .types import Inversion as InversionSocket

CATEGORY = "semantic_style/inversion"
SUFFIX = ".safetensors"
FOLDER = "inversions"
# Asked for at every look at the nodes and every queueing, in folders that may hold anything.
_LISTING = Listing(lambda name: name.lower().endswith(SUFFIX))


class SaveInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStyleSaveInversion",
            display_name="Save Inversion (Semantic Style)",
            category=CATEGORY,
            description="Writes an inversion into ComfyUI's output folder, as one safetensors file. Control networks "
            "and hooks in its conditioning are left out.",
            inputs=[
                InversionSocket.Input("inversion", tooltip="What to save."),
                io.String.Input(
                    "filename_prefix",
                    default=f"{FOLDER}/inversion",
                    tooltip="Folder and beginning of the name, below the output folder; a number is added. Load "
                    f"Inversion lists what is in {FOLDER}.",
                ),
            ],
            outputs=[io.String.Output(display_name="file", tooltip="The file's name for Load Inversion.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, inversion: Inversion, filename_prefix: str) -> io.NodeOutput:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        file = f"{name}_{counter:05}_{SUFFIX}"
        path = Path(folder) / file
        save_inversion(path, inversion)
        logging.info("Saved the inversion to %s.", path)
        return io.NodeOutput(f"{Path(subfolder, file).as_posix()} [output]")


class LoadInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SemanticStyleLoadInversion",
            display_name="Load Inversion (Semantic Style)",
            category=CATEGORY,
            description="Reads an inversion that Save Inversion wrote.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=_files(),
                    tooltip=f"Inversions in the input folder and in output/{FOLDER}. Press R to refresh the list.",
                )
            ],
            outputs=[InversionSocket.Output(display_name="inversion", tooltip="The inversion as it was saved.")],
        )

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(load_inversion(_path(file)))

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        """A message for a file that is not there, when the graph is queued. Taking `file` over also lets a file be
        named that was saved after the list was made."""
        if file is None:
            return True
        try:
            _path(file)
        except (ValueError, FileNotFoundError) as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None) -> Any:
        """Changes when the file does, so that the host reads it again."""
        if file is None:
            return None
        status = os.stat(_path(file))
        return [status.st_mtime_ns, status.st_size]


def _files() -> list[str]:
    """Names for the list: those in the input folder, and those saved below output/inversions, marked as the host
    does.
    """
    found = []
    folders = ((folder_paths.get_input_directory(), "", ""), (folder_paths.get_output_directory(), FOLDER, " [output]"))
    for base, sub, mark in folders:
        found += sorted(f"{Path(sub, file).as_posix()}{mark}" for file in _LISTING.below(Path(base, sub)))
    return found


def _path(file: str) -> Path:
    """The path of a name from the list; ValueError for one that leads out of its folder, FileNotFoundError for no
    file.
    """
    name, base = folder_paths.annotated_filepath(file)
    # Not resolved: a link that the user put into the folder may lead anywhere, a name may not.
    root = Path(os.path.abspath(base or folder_paths.get_input_directory()))
    path = Path(os.path.abspath(root / name))
    if not path.is_relative_to(root) or path.suffix.lower() != SUFFIX:
        raise ValueError(f"{file!r} is not a {SUFFIX} file below ComfyUI's input or output folder")
    if not path.is_file():
        raise FileNotFoundError(f"there is no inversion {file!r}; save one, or press R to refresh the list")
    return path
