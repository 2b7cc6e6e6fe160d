"""From a name to a pipeline: bundled folder, local folder, Hub id, or random weights at full size.

Only diffusers folders with safetensors are read (:mod:`qdiff.models.folders`); a folder that names code of its own is refused
(no ``trust_remote_code``, no ``custom_pipeline``). A Hub id is resolved to a commit once and that commit is loaded, recorded and
shown (:mod:`qdiff.models.hub`).
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdiff.errors import InputError, IntegrityError, UsageError, option, unknown_name
from qdiff.events import log
from qdiff.files import path_of, read_json, sha256_json
from qdiff.models.folders import absent, cannot_load, components, files_that_count, load_component, read_index
from qdiff.models.hub import download, is_id
from qdiff.models.quiet import quiet

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from qdiff.models.base import Family
    from qdiff.models.model import Model

HUB = "hub:"


def bundled_folder(family: str) -> Path:
    """Return the folder of the small trained weights that come with qdiff."""
    return Path(str(resources.files("qdiff.models") / "bundled" / family))


def bundled_tokenizer(family: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the bundled weights, which pipelines with random weights share."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(bundled_folder(family) / "tokenizer"), local_files_only=True)


def stand_in_text_encoder(
    configuration: Callable[..., PreTrainedConfig],
    encoder: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    width: int,
) -> PreTrainedModel:
    """Return a small T5 of the right interface, with random weights.

    Args:
        configuration: transformers' class of the encoder's configuration.
        encoder: transformers' class of the encoder.
        tokenizer: whose vocabulary the encoder gets.
        width: of the states that it gives.
    """
    return encoder(
        configuration(vocab_size=len(tokenizer), d_model=width, d_kv=32, d_ff=256, num_layers=1, num_heads=2)
    )


def stand_in_vae() -> nn.Module:
    """Return a small random autoencoder with the interface of the published ones: 8 pixels a cell, 4 channels."""
    from diffusers.models import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=8, latent_channels=4,
    )  # fmt: skip


def random_networks(seed: int, **networks: Callable[[], nn.Module]) -> dict[str, Any]:
    """Return networks of random weights by name, ready for inference.

    Args:
        seed: of all of them together: they draw from one stream of random numbers, in the order given.
        networks: what makes each.
    """
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return {name: make().eval().requires_grad_(False) for name, make in networks.items()}


def random_t5_parts(
    seed: int,
    configuration: Callable[..., PreTrainedConfig],
    encoder: Callable[..., PreTrainedModel],
    width: int,
    *,
    transformer: Callable[[], nn.Module],
    vae: Callable[[], nn.Module],
) -> dict[str, Any]:
    """Return the parts of a pipeline with a T5, all but its scheduler.

    Only the backbone has its full size; what runs before and after it is a stand-in of the right interface.

    Args:
        seed: of torch's generator.
        configuration: transformers' class of the text encoder's configuration.
        encoder: transformers' class of the text encoder.
        width: of the states that it gives.
        transformer: makes the backbone.
        vae: makes the autoencoder.
    """
    tokenizer = bundled_tokenizer("pixart")
    networks = random_networks(
        seed,
        transformer=transformer,
        vae=vae,
        text_encoder=lambda: stand_in_text_encoder(configuration, encoder, tokenizer, width),
    )
    return {"tokenizer": tokenizer, **networks}


def load(family: Family, weights: str, *, revision: str | None, seed: int) -> Model:
    """Load a model as :meth:`qdiff.models.base.Family.load` does. ``hub:owner/name`` is of the Hub whatever folders
    there are.
    """
    if weights.startswith(HUB):
        return _from_hub(family, weights.removeprefix(HUB), revision)
    local = path_of(weights)
    if revision is not None and (weights == "bundled" or weights.startswith("random:") or local.is_dir()):
        raise UsageError(
            f"{option('revision', revision)}: {weights} weights have no revisions",
            f"leave {option('revision')} out, or name a Hub id",
        )
    if weights.startswith("random:"):
        return _random(family, weights.removeprefix("random:"), seed)
    if weights == "bundled":
        folder, note = bundled_folder(family.name), f"the small {family.name} model that comes with qdiff"
        if not folder.is_dir():
            raise InputError(
                f"no bundled weights for {family.name}", f"name a folder or a Hub id with {option('weights')}"
            )
        return _from_folder(family, folder, weights, note)
    if local.is_dir():
        # Later stages may be started in another folder, where the same relative path is something else.
        absolute = str(local.absolute())
        return _from_folder(family, Path(absolute), absolute, f"the folder {absolute}")
    if is_id(weights):
        return _from_hub(family, weights, revision)
    if local.is_absolute():
        raise InputError(
            f"no weights {weights!r}: there is no such folder (any more)",
            f"put it back, or name another with {option('weights')}",
        )
    raise InputError(
        f"no weights {weights!r}",
        "use bundled, a diffusers folder, a Hub id (owner/name)"
        + (f", or random:{'|'.join(family.configurations)}" if family.configurations else ""),
    )


def _from_hub(family: Family, hub_id: str, revision: str | None) -> Model:
    folder, commit = download(hub_id, revision)
    model = _from_folder(family, folder, hub_id, f"{hub_id} at commit {commit}")
    model.revision = commit
    return model


def _from_folder(family: Family, folder: Path, weights: str, note: str) -> Model:
    import diffusers
    import torch

    from qdiff.models.model import Model

    index = read_index(folder)
    class_name = str(index.get("_class_name"))
    if class_name not in family.pipelines:
        raise _another_family(family, folder, class_name)
    networks: dict[str, nn.Module] = {}
    variants: dict[str, str] = {}
    with quiet():
        pipeline_class: type[diffusers.DiffusionPipeline] = getattr(diffusers, class_name)
        taken = inspect.signature(pipeline_class.__init__).parameters
        for part in components(folder, index):
            if part.is_network and part.name in taken:
                networks[part.name], variant = load_component(folder, part, weights)
                variants |= {part.name: variant} if variant else {}
        try:
            pipeline = pipeline_class.from_pretrained(
                str(folder), dtype=torch.float32, local_files_only=True, **networks, **absent(index)
            )
        except Exception as error:
            raise cannot_load(folder, error) from None
    if variants:
        log.info(
            "%s: there is no plain set of weights; read are %s", weights, ", ".join(sorted(set(variants.values())))
        )
    defaults = (
        read_json(folder / "generation.json", "generation.json") if (folder / "generation.json").is_file() else {}
    )
    if not isinstance(defaults, dict):
        raise IntegrityError(f"{folder / 'generation.json'} is not a group of settings", "put the old file back")
    return Model(family, pipeline, weights, _fingerprint(folder), note, defaults, variants=variants)


def _another_family(family: Family, folder: Path, class_name: str) -> InputError:
    """Return a folder of another pipeline than the family's: which family loads it, if one does."""
    from qdiff.models.base import FAMILIES

    takers = [name for name in FAMILIES if class_name in FAMILIES[name].pipelines]
    fix = f"{family.name} loads {', '.join(family.pipelines)}"
    if takers:
        fix = f"use {option('source', takers[0])}, which loads a {class_name}"
    return InputError(f"{folder} holds a {class_name}, not one of {family.name}", fix)


def _fingerprint(folder: Path) -> str:
    """Return sha256 over the names and bytes of everything that decides the numbers."""
    digest = hashlib.sha256()
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    for name in files_that_count(name.as_posix() for name in names):
        digest.update(name.encode())
        with open(folder / name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _random(family: Family, configuration: str, seed: int) -> Model:
    from qdiff.models.model import Model

    if configuration not in family.configurations:
        raise unknown_name("configuration", configuration, family.configurations, InputError)
    with quiet():
        pipeline = family.random_pipeline(configuration, seed)
    fingerprint = sha256_json({"random": configuration, "seed": seed, "family": family.name})
    note = f"random weights of the size of {configuration}: timings and memory are real, pictures are noise"
    defaults = family.random_defaults(configuration)
    return Model(family, pipeline, f"random:{configuration}", fingerprint, note, defaults)
