"""What a diffusers folder holds: the class of each component, whose code that is, and which of its weight files are read.

A component's class is a class of transformers, of diffusers, or of a module of diffusers' own pipelines (``stable_diffusion`` has
the safety checker). Everything else is code that comes with the folder and is refused: nothing here loads what diffusers would
want ``trust_remote_code`` for. The names come from ``model_index.json``, so they are looked up, never imported as they are.

Weights are read from safetensors alone. A component may have several sets of them: the plain one, and *variants* that are
named in the files (``diffusion_pytorch_model.fp16.safetensors``). The plain set is taken where it is there, else the most exact
variant.

diffusers fills what a file lacks with whatever the memory held, and says so in a log line. So components are loaded one by one,
with the libraries' own account of missing and unused weights (they know of tied weights and of renamed ones, which a comparison
of names would not), and a component is whole and finite or it is refused.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qdiff.errors import InputError, IntegrityError, option
from qdiff.events import log
from qdiff.files import read_json
from qdiff.formats.scales import require_finite

if TYPE_CHECKING:
    from torch import nn

LIBRARIES = ("diffusers", "transformers")
# What a folder may have and no picture needs: their classes are diffusers' own, and they are not loaded.
LEFT_OUT = {"safety_checker": "pictures are not checked for what they show"}
_WEIGHTS = re.compile(r"^(?:diffusion_pytorch_model|model)(?:\.([\w-]+?))?(?:-\d+-of-\d+)?(?:\.(\w+))?\.safetensors$")
_OTHER_FORMATS = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5")
_MOST_EXACT = ("fp32", "fp16", "bf16")  # of variants, the first that is there


class Loadable(Protocol):
    """A class of diffusers or transformers that reads a folder."""

    @classmethod
    def from_pretrained(cls, folder: str, /, **options: object) -> Any: ...


@dataclass(frozen=True)
class Component:
    """One entry of ``model_index.json``: its name, the class that it is loaded as, and whether that is a network."""

    name: str
    cls: type[Loadable]
    is_network: bool


def read_index(folder: Path) -> dict[str, object]:
    """Return the contents of ``model_index.json`` of a folder.

    Raises:
        InputError: there is none, or it holds no pipeline.
        IntegrityError: it is not JSON, or it names a pipeline that comes with the folder as code.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise InputError(
            f"{folder} is not a diffusers folder (no model_index.json)", "name the folder that holds model_index.json"
        )
    index = read_json(path, "model_index.json")
    if not isinstance(index, dict):
        raise InputError(f"{folder} holds a None: its model_index.json names no pipeline", "copy the folder again")
    if isinstance(index.get("_class_name"), list):
        raise IntegrityError(
            f"the pipeline of {folder} brings its own code ({index['_class_name']})",
            "use a folder whose pipeline is one of diffusers' own",
        )
    return index


def components(folder: Path, index: Mapping[str, object]) -> list[Component]:
    """Return the components that an index names and that are loaded; those of :data:`LEFT_OUT` are checked and left
    away.

    Raises:
        IntegrityError: code of its own.
        InputError: a class that the installed library does not have.
    """
    found = []
    for name, value in index.items():
        if not isinstance(value, list) or not value or value[0] is None:
            continue
        if len(value) != 2 or not all(isinstance(part, str) for part in value):
            raise InputError(f"component {name!r} of {folder} is {value}", "it has to be [library, class]")
        unused = name == "feature_extractor" and not _is_there(index, "image_encoder")
        if unused and value[0] in LIBRARIES:
            continue  # it prepares pictures for the safety checker alone; its class may be one of long ago
        cls = _class_of(folder, name, *value)
        if name not in LEFT_OUT and not unused:
            found.append(Component(name, cls, _is_network(cls)))
    return found


def absent(index: Mapping[str, object]) -> dict[str, None | bool]:
    """Return the arguments of ``from_pretrained`` for what is left out of an index, and log a line for what somebody
    might miss.
    """
    arguments: dict[str, None | bool] = {}
    for name, effect in LEFT_OUT.items():
        if _is_there(index, name):
            log.info("%s is left out: %s", name.replace("_", " "), effect)
            arguments |= {name: None, f"requires_{name}": False}
    if _is_there(index, "feature_extractor") and not _is_there(index, "image_encoder"):
        arguments["feature_extractor"] = None
    return arguments


def _is_there(index: Mapping[str, object], name: str) -> bool:
    value = index.get(name)
    return isinstance(value, list) and bool(value) and value[0] is not None


def _class_of(folder: Path, name: str, library: str, class_name: str) -> type[Loadable]:
    if library in LIBRARIES:
        cls = getattr(importlib.import_module(library), class_name, None)
        if not isinstance(cls, type) or not hasattr(cls, "from_pretrained"):
            version = importlib.import_module(library).__version__
            raise InputError(
                f"component {name!r} of {folder} is a {class_name}, which {library} {version} cannot load",
                f"install the version of {library} that the folder was saved with, load and save it with a class of today",
            )
        if class_name.startswith("Auto"):
            _refuse_own_code(folder, name)
        return cls
    cls = _pipeline_class(library, class_name)
    if cls is None:
        raise IntegrityError(
            f"component {name!r} of {folder} brings its own code ({library})",
            "use a folder whose components are classes of diffusers or transformers",
        )
    return cls


def _pipeline_class(module: str, class_name: str) -> type | None:
    """Return a class that lives in ``diffusers.pipelines.<module>``; ``None`` where it does not."""
    if not module.isidentifier():
        return None
    home = f"diffusers.pipelines.{module}"
    try:
        cls = getattr(importlib.import_module(home), class_name, None)
    except ModuleNotFoundError:
        return None
    own = isinstance(cls, type) and f"{cls.__module__}.".startswith(f"{home}.")
    return cls if own and hasattr(cls, "from_pretrained") else None


def _refuse_own_code(folder: Path, name: str) -> None:
    """Refuse a component whose configuration names a file of code: an ``Auto`` class takes its class from that
    configuration, which may name a file beside it.
    """
    path = folder / name / "config.json"
    config = read_json(path, "the configuration") if path.is_file() else {}
    if isinstance(config, dict) and config.get("auto_map"):
        raise IntegrityError(
            f"component {name!r} of {folder} brings its own code ({config['auto_map']})",
            "use a folder whose components are classes of diffusers or transformers",
        )


def _is_network(cls: type) -> bool:
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

    return issubclass(cls, (ModelMixin, PreTrainedModel))


def weight_files(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the weight files among the names of a component's files, by variant; the plain ones are those of the
    variant ``""``.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        match = _WEIGHTS.match(name)
        if match:
            found.setdefault(match[1] or match[2] or "", []).append(name)
    return found


def choose_variant(variants: Iterable[str]) -> str:
    """Return the set of weights that is read: the plain one, else the most exact variant, else the first by name."""
    known = sorted(variants)
    return next((name for name in ("", *_MOST_EXACT) if name in known), known[0])


def files_that_count(names: Iterable[str]) -> list[str]:
    """Return, sorted, the paths inside a diffusers folder that decide what is loaded: configurations, tokenizers, and
    of every component the weights of the variant that is read. What is left out counts nowhere.
    """
    by_folder: dict[str, list[str]] = {}
    kept = []
    for name in names:
        folder, _, file = name.rpartition("/")
        if folder.partition("/")[0] in LEFT_OUT:
            continue
        if file.endswith(".safetensors"):
            by_folder.setdefault(folder, []).append(file)
        elif file.endswith((".json", ".txt", ".model")):
            kept.append(name)
    for folder, files in by_folder.items():
        variants = weight_files(files)
        if folder and variants:  # a single file beside model_index.json is the same model once more
            kept += [f"{folder}/{file}" for file in variants[choose_variant(variants)]]
    return sorted(kept)


def load_component(folder: Path, component: Component, weights: str) -> tuple[nn.Module, str]:
    """Return a network of a folder in float32, whole and finite, and the variant that was read.

    Raises:
        InputError: no safetensors, a damaged file, a missing weight, NaN or infinity.
    """
    import torch

    inside = folder / component.name
    if not inside.is_dir():
        raise InputError(
            f"cannot load {folder}: it has no folder {component.name}",
            "it is incomplete; copy it again from its source",
        )
    names = [path.name for path in inside.iterdir()]
    variants = weight_files(names)
    if not variants:
        raise _no_safetensors(folder, component.name, names)
    variant = choose_variant(variants)
    arguments = {"variant": variant} if variant else {}
    try:
        module, account = component.cls.from_pretrained(
            str(inside),
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **arguments,
        )
    except Exception as error:
        raise cannot_load(folder, error, component.name) from None
    require_whole(module, account, component.name, weights)
    return module, variant


def require_whole(module: nn.Module, account: Mapping[str, Iterable[str]], name: str, weights: str) -> None:
    """Refuse a network with weights that no file gave or that are not finite; warn of those that it does not use.

    Args:
        module: the network, loaded.
        account: ``missing_keys`` and ``unexpected_keys``, as the libraries give them.
        name: of the component.
        weights: of which it is a part, for the message.
    """
    # An index may name a weight that its shard does not hold: that one stays without memory.
    empty = {key for key, tensor in module.state_dict().items() if tensor.is_meta}
    missing = sorted({*account["missing_keys"], *empty})
    if missing:
        further = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"the {name} of {weights} lacks the weight {missing[0]}{further}",
            f"its file is incomplete, or {name}/config.json is another model's; copy both again from their source",
        )
    unused = sorted(account["unexpected_keys"])
    if unused:
        first = ", ".join(unused[:3]) + (", …" if len(unused) > 3 else "")
        log.warning("the %s of %s does not use %d weights of its file: %s", name, weights, len(unused), first)
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            require_finite(tensor, f"the weight {key} in the {name} of {weights}")


def cannot_load(folder: Path, error: Exception, part: str = "") -> InputError:
    """Return what a library said about a folder, in a line."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return InputError(
        f"cannot load {folder}: {part + ': ' if part else ''}{reason[:300]}",
        "the folder is incomplete or damaged; copy it again from its source",
    )


def _no_safetensors(folder: Path, name: str, names: list[str]) -> InputError:
    others = sorted(file for file in names if file.endswith(_OTHER_FORMATS))
    if not others:
        return InputError(
            f"cannot load {folder}: its {name} has no weights",
            "the folder is incomplete; copy it again from its source",
        )
    return InputError(
        f"cannot load {folder}: its {name} has no safetensors but {others[0]}, which can hold code",
        "if you trust its author, save it anew in Python: import torch, diffusers; "
        f"diffusers.DiffusionPipeline.from_pretrained({str(folder)!r})"
        f".save_pretrained('NEW', safe_serialization=True); then use {option('weights', 'NEW')}",
    )
