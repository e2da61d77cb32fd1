"""What a running node needs from ComfyUI: folders, devices, progress, cancel, and messages to the
page.
"""

from __future__ import annotations

import os
import sys
import time
from itertools import chain
from pathlib import Path, PurePosixPath

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch

from ...quant_ops.errors import CheckpointError, RecipeError
from ...quant_ops.part import write_whole
from ...quant_ops.spec import ModelPlan

MODEL_FOLDERS = ("diffusion_models", "text_encoders", "checkpoints")
CALIBRATIONS = "calibrations"  # a folder of ours among the model folders, and in the output folder
KNOWN_FOLDERS = (*MODEL_FOLDERS, CALIBRATIONS)
SUFFIXES = (".safetensors", ".sft")
TYPED_LOADERS = ("CLIPLoader", "DualCLIPLoader")
# ComfyUI's loader of each folder, by the name that a person looks for
LOADERS = {
    "diffusion_models": "Load Diffusion Model",
    "text_encoders": "Load CLIP",
    "checkpoints": "Load Checkpoint",
    CALIBRATIONS: "Load Calibration",
}
MESSAGE_SECONDS = 0.1  # at most ten progress messages a second
# The time left is said when it can be known: a 42 s job began with "1 h 47 min left" after its
# first layer, whose share was small and whose seconds held the start of everything.
ETA_SECONDS, ETA_SHARE = 2.0, 0.02
# Names that Windows gives to devices in every folder, whatever the extension.
DEVICE_NAMES = {
    "con",
    "prn",
    "aux",
    "nul",
    *map("com{}".format, range(1, 10)),
    *map("lpt{}".format, range(1, 10)),
}
FORBIDDEN = {*'<>:"|?*', *map(chr, range(32))}


def calibration_files() -> list[str]:
    """Names of the files in ComfyUI's folders for calibrations, which are made known here."""
    for root in (folder_paths.models_dir, folder_paths.get_output_directory()):
        folder_paths.add_model_folder_path(CALIBRATIONS, str(Path(root) / CALIBRATIONS))
    return model_files(CALIBRATIONS)


def model_files(folder: str) -> list[str]:
    """Names of the safetensors files in one of ComfyUI's model folders, output folder included."""
    return [
        name for name in folder_paths.get_filename_list(folder) if name.lower().endswith(SUFFIXES)
    ]


def all_model_files() -> list[str]:
    """`folder/name` of every file that can be quantized or inspected."""
    found = []
    for folder in MODEL_FOLDERS:
        found += [f"{folder}/{name}" for name in model_files(folder)]
    return found


def model_path(folder: str, name: str) -> Path:
    """The file behind a name of `model_files`.

    Raises:
        CheckpointError: ComfyUI knows no such file.
    """
    path = folder_paths.get_full_path(folder, name) if folder in KNOWN_FOLDERS and name else None
    if path is None or not is_within_any(folder_paths.get_folder_paths(folder), path):
        raise CheckpointError(
            f"{folder}/{name}: no such file in ComfyUI's model folders; choose one from the list"
        )
    return Path(path)


def written_file(path: str) -> Path:
    """The file that a node wrote, by its path.

    Raises:
        CheckpointError: no such file in ComfyUI's output or model folders.
    """
    if not is_within_any(_writable_roots(), path) or not os.path.isfile(path):
        raise CheckpointError(
            f"{os.path.basename(path)}: no such file in ComfyUI's output or model folders; connect "
            "the path of Quantize File"
        )
    return Path(path)


def text_encoder_types() -> list[str]:
    """Every type of text encoder that this ComfyUI knows: what its own loaders offer, else its list
    of types.
    """
    # ComfyUI's module; not there as a library
    nodes = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})
    offered = [
        nodes[name].INPUT_TYPES()["required"]["type"] for name in TYPED_LOADERS if name in nodes
    ]
    found = dict.fromkeys(chain(*map(_options, offered)))
    return list(found) or [member.name.lower() for member in comfy.sd.CLIPType]


def _options(widget: tuple) -> list[str]:
    """The choices of an input, as old and new nodes state them."""
    if isinstance(widget[0], (list, tuple)):
        return widget[0]
    return widget[1]["options"]


def split_choice(choice: str) -> tuple[str, str]:
    """`folder/name` as offered by `all_model_files` -> (folder, name)."""
    folder, _, name = choice.partition("/")
    return folder, name


def file_state(choice: str) -> tuple[int, int]:
    """(mtime in ns, bytes) of a `folder/name` choice: changes whenever the file does, without
    reading it.
    """
    state = model_path(*split_choice(choice)).stat()
    return state.st_mtime_ns, state.st_size


def wish_state(choice: str, inputs: dict) -> tuple:
    """`file_state` and the other inputs of a node that works on a file; a calibration may still be
    collecting, and is told by what made it.
    """
    stated = {name: value for name, value in inputs.items() if name != "calibration"}
    return (*file_state(choice), *sorted(stated.items()))


def output_path(name: str, suffix: str = ".safetensors", *, overwrite: bool = False) -> Path:
    """Where a file named by the user goes: below ComfyUI's output folder, the suffix added,
    subfolders made.

    Raises:
        RecipeError: empty, absolute, with `..`, a drive or a device name, or leading elsewhere
            through a link; one that the disk does not take; or an existing file and no wish to
            overwrite it.
    """
    root = Path(folder_paths.get_output_directory())
    target = _target(name, suffix)
    if _exists(target) and not overwrite:
        shown = target.relative_to(root).as_posix()
        raise RecipeError(
            f"{shown} exists already in the output folder; choose another filename or turn "
            "overwrite on"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(target, error) from None
    return target


def planned(name: str) -> dict:
    """Where a file would go, without making anything: its path from ComfyUI's folder on, and
    whether there is one already.

    Raises:
        RecipeError: a name that `output_path` refuses.
    """
    target = _target(name, SUFFIXES[0])
    root = Path(folder_paths.get_output_directory())
    return {"path": _shown(target, root), "exists": _exists(target)}


def _exists(target: Path) -> bool:
    try:
        target.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:  # a name of over 255 bytes
        raise _unusable(target, error) from None
    return True


def _unusable(target: Path, error: OSError) -> RecipeError:
    shown = target.name if len(target.name) < 80 else f"{target.name[:80]}..."
    return RecipeError(
        f"no file of the name {shown!r} can be made in ComfyUI's output folder: {error.strerror}; "
        "choose another"
    )


def _target(name: str, suffix: str) -> Path:
    parts = PurePosixPath(name.strip().replace("\\", "/")).parts
    root = Path(folder_paths.get_output_directory())
    target = root.joinpath(*parts)
    if parts and not target.name.lower().endswith(suffix):
        target = target.with_name(target.name + suffix)
    if (
        not parts
        or any(_unsafe(part) for part in parts)
        or not is_within_any(_writable_roots(), target)
    ):
        raise RecipeError(
            f"file name {name[:200]!r} is not allowed: write a name inside ComfyUI's output "
            "folder, such as diffusion_models/my_model; absolute paths, '..' and device names are "
            "refused"
        )
    return target


def save_text(name: str, suffix: str, text: str, *, overwrite: bool) -> Path:
    """Write a small text file at `output_path`, whole or not at all.

    Raises:
        RecipeError: a name that is not allowed, an existing file and no wish to overwrite it, a
            text that no UTF-8 holds, or a disk that does not take it.
    """
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecipeError(
            f"{name}: the text holds half a character ({error}); nothing was written"
        ) from None
    target = output_path(name, suffix, overwrite=overwrite)
    try:
        write_whole(target, data)
    except OSError as error:
        raise RecipeError(f"{target.name}: cannot be written: {error.strerror}") from None
    return target


def whereabouts(path: Path) -> dict:
    """A written file for the page and for scripts: `output`, its full path; `saved`, its path from
    ComfyUI's folder on, with the loader that lists it and the name it has there, where one does.
    """
    root = Path(folder_paths.get_output_directory())
    saved = {"path": _shown(path, root), "loader": None, "name": None}
    for folder, loader in LOADERS.items():
        for base in _folders_of(folder):
            if path.suffix.lower() in SUFFIXES and is_within(base, path):
                name = os.path.relpath(os.path.realpath(path), os.path.realpath(base))
                saved |= {"loader": loader, "name": name}
    return {"output": str(path), "saved": saved}


def _shown(path: Path, root: Path) -> str:
    """A path below the output folder as people write it: `output/a/b.safetensors`."""
    return Path(root.name, path.relative_to(root)).as_posix()


def _folders_of(folder: str) -> list[str]:
    try:
        return folder_paths.get_folder_paths(folder)
    except KeyError:  # the folder for calibrations, before the first one was listed
        return []


def output_folder(folder: str) -> str:
    """The folder inside ComfyUI's output folder whose files appear in the loaders of `folder`,
    relative to it.
    """
    root = folder_paths.get_output_directory()
    for path in folder_paths.get_folder_paths(folder):
        if is_within(root, path):
            return Path(os.path.relpath(path, root)).as_posix()
    return folder


def automatic_name(choice: str, mark: str) -> str:
    """`diffusion_models/a/flux.safetensors`, `int8` -> `diffusion_models/flux_int8`, where the
    loaders find it.
    """
    folder, name = split_choice(choice)
    return f"{output_folder(folder)}/{PurePosixPath(name.replace(chr(92), '/')).stem}_{mark}"


def is_within(directory: str | os.PathLike, target: str | os.PathLike) -> bool:
    """Whether `target` really lies in `directory`, links followed. (ComfyUI has its own only since
    0.25.)
    """
    try:
        directory, target = os.path.realpath(directory), os.path.realpath(target)
        return os.path.commonpath((directory, target)) == directory
    except ValueError:  # another Windows drive, or a null byte
        return False


def is_within_any(directories: list[str], target: str | os.PathLike) -> bool:
    return any(is_within(directory, target) for directory in directories)


def _writable_roots() -> list[str]:
    """The output folder; and the model folders, because people link those into it."""
    models = map(folder_paths.get_folder_paths, MODEL_FOLDERS)
    return [folder_paths.get_output_directory(), *chain(*models)]


def _unsafe(part: str) -> bool:
    reserved = part.split(".")[0].strip().lower() in DEVICE_NAMES
    return part in ("/", "//", "..") or part[-1] in ". " or reserved or bool(FORBIDDEN & set(part))


def pick_device(choice: str) -> torch.device:
    """`auto` is the CUDA device ComfyUI uses, else the CPU.

    Raises:
        RecipeError: `cuda` where ComfyUI runs on something else.
    """
    device = comfy.model_management.get_torch_device()
    if choice == "cpu" or (choice == "auto" and device.type != "cuda"):
        return torch.device("cpu")
    if device.type != "cuda":
        raise RecipeError(
            f"device {choice!r} was chosen, but ComfyUI runs on {device.type}; choose auto or cpu"
        )
    return device


# node id -> plan of the run that is at work: a page that was reloaded asks for it
PLANS: dict[str | None, dict] = {}


class Run:
    """One execution of a node, as the user sees it: plan, progress bar, layer names. Its callbacks
    also cancel.
    """

    def __init__(self, node_id: str | None):
        self.node_id = node_id
        self.started = time.perf_counter()
        self._bar = comfy.utils.ProgressBar(1, node_id=node_id)
        self._sent = float("-inf")
        self._first: tuple[float, int] | None = None

    def on_plan(self, plan: ModelPlan) -> None:
        data = plan.to_json()
        PLANS.clear()
        PLANS[self.node_id] = data
        self._send("fewbits.plan", {"plan": data})

    def on_progress(self, done: int, total: int, layer: str) -> None:
        """Show progress.

        Raises:
            InterruptProcessingException: the user cancelled.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._bar.update_absolute(done, total)
        now = time.perf_counter()
        if done < total and now - self._sent < MESSAGE_SECONDS:
            return
        self._sent = now
        seconds = now - self.started
        eta = self._eta(now, done, total)
        progress = {
            "layer": layer,
            "done": done,
            "total": total,
            "seconds": seconds,
            "eta_seconds": eta,
        }
        self._send("fewbits.progress", progress)

    def _eta(self, now: float, done: int, total: int) -> float | None:
        """Seconds left at the speed since the first message; None while that is no measure."""
        if self._first is None:
            self._first = now, done
        if done >= total:
            return 0.0
        since, before = self._first
        gained = done - before
        if now - since < ETA_SECONDS or gained < ETA_SHARE * total:
            return None
        return (now - since) * (total - done) / gained

    def _send(self, event: str, data: dict) -> None:
        server = _listening_server()
        if server is not None:
            server.send_sync(event, {"node_id": self.node_id, **data}, server.client_id)


def _listening_server() -> object | None:
    """ComfyUI's server while it runs a prompt that somebody watches, and only that client is told.

    There is none in tests, nor where ComfyUI is used as a library.
    """
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if getattr(server, "client_id", None) is not None:
        return server
    return None
