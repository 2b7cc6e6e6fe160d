"""From a name to a pipeline: bundled folder, local folder, Hub id, or random weights at full size.

Only diffusers folders with safetensors are read; a folder that names code of its own is refused (no ``trust_remote_code``,
no ``custom_pipeline``). A Hub id is resolved to a commit once and that commit is loaded, recorded and shown.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdiff.errors import InputError, IntegrityError, unknown_name
from qdiff.files import path_of, read_json, sha256_json
from qdiff.numerics import require_finite

if TYPE_CHECKING:
    from qdiff.models.base import Family, Model

_TRUSTED_LIBRARIES = {"diffusers", "transformers"}
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


def bundled_folder(family: str) -> Path:
    """The folder of the small trained weights that come with qdiff."""
    return Path(str(resources.files("qdiff.models") / "bundled" / family))


def bundled_tokenizer(family: str) -> Any:
    """The tokenizer of the bundled weights, which pipelines with random weights share."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(bundled_folder(family) / "tokenizer"), local_files_only=True)


def stand_in_text_encoder(configuration: Any, encoder: Any, tokenizer: Any, width: int) -> Any:
    """A small T5 of the right interface, with random weights.

    Args:
        configuration, encoder: transformers' classes.
        width: of the states that it gives.
    """
    return encoder(
        configuration(vocab_size=len(tokenizer), d_model=width, d_kv=32, d_ff=256, num_layers=1, num_heads=2)
    )


def stand_in_vae() -> Any:
    """A small random autoencoder with the interface of the published ones: 8 pixels a cell, 4 channels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=8, latent_channels=4,
    )  # fmt: skip


def load(family: Family, weights: str, *, revision: str | None, seed: int) -> Model:
    """See :meth:`qdiff.models.base.Family.load`."""
    if weights.startswith("random:"):
        return _random(family, weights.removeprefix("random:"), seed)
    if weights == "bundled":
        folder, note = bundled_folder(family.name), f"the small {family.name} model that comes with qdiff"
        if not folder.is_dir():
            raise InputError(f"no bundled weights for {family.name}", "name a folder or a Hub id with --weights")
        return _from_folder(family, folder, weights, note)
    if path_of(weights).is_dir():
        return _from_folder(family, Path(weights), weights, f"the folder {weights}")
    if _HUB_ID.match(weights):
        folder, commit = _download(weights, revision)
        return _from_folder(family, folder, weights, f"{weights} at commit {commit}")
    raise InputError(
        f"no weights {weights!r}",
        "use bundled, a diffusers folder, a Hub id (owner/name), or random:" + "|".join(family.configurations),
    )


def _download(hub_id: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import HfApi, snapshot_download

    try:
        commit = HfApi().model_info(hub_id, revision=revision).sha
        if commit is None:
            raise InputError(f"the Hub names no commit for {hub_id}", "give one with --revision")
        return Path(snapshot_download(hub_id, revision=commit, allow_patterns=_HUB_FILES)), commit
    except InputError:
        raise
    except Exception as error:
        try:  # without network, a copy that is complete in the local cache will do
            folder = Path(
                snapshot_download(hub_id, revision=revision, allow_patterns=_HUB_FILES, local_files_only=True)
            )
            return folder, folder.name
        except Exception:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(
                f"cannot load {hub_id} from the Hub: {reason[:200]}",
                "check the id and the network, or copy the folder here and name it with --weights FOLDER",
            ) from None


def _from_folder(family: Family, folder: Path, weights: str, note: str) -> Model:
    import diffusers
    import torch

    from qdiff.models.base import Model

    if not (folder / "model_index.json").is_file():
        raise InputError(
            f"{folder} is not a diffusers folder (no model_index.json)", "name the folder that holds model_index.json"
        )
    index = read_json(folder / "model_index.json", "model_index.json")
    class_name = index.get("_class_name") if isinstance(index, dict) else None
    if class_name not in family.pipelines:
        raise InputError(
            f"{folder} holds a {class_name}, not one of {family.name}",
            f"{family.name} loads {', '.join(family.pipelines)}",
        )
    for component, value in index.items():
        if isinstance(value, list) and value and value[0] is not None and value[0] not in _TRUSTED_LIBRARIES:
            raise IntegrityError(
                f"component {component!r} of {folder} brings its own code ({value[0]})",
                "qdiff runs diffusers' own classes only",
            )
    try:
        with _quiet():
            pipeline = getattr(diffusers, class_name).from_pretrained(
                str(folder), dtype=torch.float32, use_safetensors=True, local_files_only=True
            )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"cannot load {folder}: {reason[:300]}", "the folder is incomplete or damaged; copy it again"
        ) from None
    defaults = (
        read_json(folder / "generation.json", "generation.json") if (folder / "generation.json").is_file() else {}
    )
    if not isinstance(defaults, dict):
        raise IntegrityError(f"{folder / 'generation.json'} is not a group of settings", "put the old file back")
    model = Model(family, pipeline, weights, _fingerprint(folder, family.backbone_attribute), note, defaults)
    _check(model)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The libraries' own progress bars and hints: one bar for each component is not news."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    levels = [(module, module.get_verbosity()) for module in (diffusers_logging, transformers_logging)]
    for module, _ in levels:
        module.disable_progress_bar()
        module.set_verbosity_error()
    try:
        yield
    finally:
        for module, level in levels:
            module.enable_progress_bar()
            module.set_verbosity(level)


def _fingerprint(folder: Path, backbone: str) -> str:
    """sha256 over the names and bytes of everything that decides the numbers."""
    digest = hashlib.sha256()
    names = sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json") and path.is_file())
    for path in names:
        digest.update(str(path.relative_to(folder)).encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _random(family: Family, configuration: str, seed: int) -> Model:
    from qdiff.models.base import Model

    if configuration not in family.configurations:
        raise unknown_name("configuration", configuration, family.configurations, InputError)
    with _quiet():
        pipeline = family.random_pipeline(configuration, seed)
    fingerprint = sha256_json({"random": configuration, "seed": seed, "family": family.name})
    note = f"random weights of the size of {configuration}: timings and memory are real, pictures are noise"
    defaults = family.random_defaults(configuration)
    return Model(family, pipeline, f"random:{configuration}", fingerprint, note, defaults)


def _check(model: Model) -> None:
    for name, parameter in model.backbone.named_parameters():
        if parameter.is_meta:
            raise InputError(f"{model.weights} lacks the weight {name}", "its config.json is another model's")
        require_finite(parameter.detach(), f"weight {name} of {model.weights}")


def load_backbone_config(model: Model) -> dict[str, Any]:
    """The backbone's diffusers config as plain JSON."""
    return json.loads(model.backbone.to_json_string())  # type: ignore[operator]
