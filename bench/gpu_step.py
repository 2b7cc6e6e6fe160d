"""One forward of full-size transformers on a GPU: dense attention in BF16 beside block-sparse attention.

    python -m bench.gpu_step [--config wan2.1-1.3b-480p …] [--density 1 0.5 0.3 0.2] [--rounds 3] [--json]

Weights, inputs and block lists are random (all rows of a head equally long, in all layers the same), sizes are the published
ones, a batch is one sample. All layers but the self-attentions are BF16 as diffusers runs them, without compilation, in every
row. The reference has dense attention in all, by cuDNN. In the others the first and the last self-attention stay dense, as qdiff
leaves them, and the rest follow lists of that density; ordering and quantizing are in the time. Rows take turns; times are
medians of the GPU's. A step with guidance is two such forwards.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qdiff.models import wan

BLOCK = 128
TOKENS_OF_TEXT = 512


@dataclass(frozen=True)
class Configuration:
    """A backbone of published size.

    Args:
        family: qdiff's.
        model: name of diffusers' class.
        config: its arguments.
        latent: shape of one sample.
    """

    family: str
    model: str
    config: dict[str, Any]
    latent: tuple[int, ...]


SMALL = wan.CONFIGURATIONS["wan2.1-1.3b"]
LARGE = {**SMALL, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
CONFIGURATIONS = {
    "wan2.1-1.3b-480p": Configuration("wan", "WanTransformer3DModel", SMALL, (16, 21, 60, 104)),
    "wan2.1-1.3b-720p": Configuration("wan", "WanTransformer3DModel", SMALL, (16, 21, 90, 160)),
    "wan2.1-14b-480p": Configuration("wan", "WanTransformer3DModel", LARGE, (16, 21, 60, 104)),
    "wan2.1-14b-720p": Configuration("wan", "WanTransformer3DModel", LARGE, (16, 21, 90, 160)),
}


def made(configuration: Configuration) -> torch.nn.Module:
    """Return the model on the GPU, in BF16."""
    import diffusers

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = getattr(diffusers, configuration.model)(**configuration.config)
    finally:
        torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


def call_of(configuration: Configuration, model: torch.nn.Module) -> Callable[[], Tensor]:
    """Return one forward of the backbone."""
    from qdiff.models import FAMILIES

    family = FAMILIES[configuration.family]
    generator = torch.Generator("cuda").manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").bfloat16()

    inputs = {
        "hidden_states": noise(1, *configuration.latent),
        "encoder_hidden_states": noise(1, TOKENS_OF_TEXT, configuration.config["text_dim"]),
        "timestep": torch.tensor([500.0], device="cuda"),
    }
    return lambda: family.call(model, inputs)


def random_lists(heads: int, tiling: Any, density: float) -> Any:
    """Return lists of all heads, every row as long as the others."""
    from qdiff.attention.lists import BlockLists

    generator = torch.Generator().manual_seed(2)
    kept = max(1, round(density * tiling.columns))
    blocks = torch.rand(tiling.rows, heads, tiling.columns, generator=generator).argsort(dim=2)[..., :kept]
    return BlockLists(blocks.flatten(1).int(), torch.arange(heads + 1) * kept)


class Variants:
    """Ways in which the self-attentions of one model run."""

    def __init__(self, configuration: Configuration, model: torch.nn.Module) -> None:
        from qdiff.attention.lists import Tiling
        from qdiff.models import FAMILIES

        self.family, self.model = FAMILIES[configuration.family], model
        self.names = self.family.self_attentions(model)[1:-1]
        grid = self.family.grid(configuration.config | {"patch_size": model.config.patch_size}, configuration.latent)
        self.tiling = Tiling(grid[0] * grid[1] * grid[2], 0, BLOCK, BLOCK)
        self.heads = configuration.config["num_attention_heads"]

    def dense(self) -> Any:
        """Return the processor that diffusers gave them."""
        return self.model.get_submodule(self.names[0]).processor

    def sparse(self, density: float, numerics: str) -> Any:
        """Return one that follows lists, in the reversed order of tokens."""
        from qdiff.attention.schedule import Schedule, ScheduleState
        from qdiff.attention.sparse import SparseSelfAttention

        schedule_state = ScheduleState(Schedule([], [random_lists(self.heads, self.tiling, density)]))
        orders = torch.arange(self.tiling.tokens).flip(0).expand(self.heads, -1)
        attend = SparseSelfAttention(orders, 0, self.tiling, numerics, schedule_state).to("cuda")
        return self.family.attention_processor(attend)

    def put(self, processor: Any) -> None:
        """Give it to all self-attentions but the first and the last."""
        for name in self.names:
            self.model.get_submodule(name).set_processor(processor)


def timed(call: Callable[[], Tensor]) -> float:
    """Return seconds of the GPU."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.no_grad(), sdpa_kernel(backends, set_priority=True):
        start.record()
        call()
        end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def benchmark(name: str, densities: list[float], numerics: list[str], rounds: int) -> dict[str, Any]:
    """Return all rows of one configuration."""
    configuration = CONFIGURATIONS[name]
    model = made(configuration)
    call, variants = call_of(configuration, model), Variants(configuration, model)
    processors = {("dense bf16, cuDNN", 1.0): variants.dense()}
    processors |= {
        (f"qdiff {kind}", density): variants.sparse(density, kind) for kind in numerics for density in densities
    }
    seconds: dict[tuple[str, float], list[float]] = {key: [] for key in processors}
    for turn in range(rounds + 1):  # in the first, kernels are compiled and lists brought to the GPU
        for key, processor in processors.items():
            variants.put(processor)
            spent = timed(call)
            seconds[key] += [spent] if turn > 0 else []
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    base = next(iter(medians.values()))
    rows = [
        {"name": label, "density": density, "seconds": median, "speedup": base / median}
        for (label, density), median in medians.items()
    ]
    parameters = sum(p.numel() for p in model.parameters())
    return {"config": name, "parameters": parameters, "tokens": variants.tiling.tokens, "rounds": rounds, "rows": rows}


def show(results: list[dict[str, Any]]) -> str:
    """Return the results as tables."""
    from qdiff.cli.text import table

    parts = [f"{torch.cuda.get_device_name()}, torch {torch.__version__}"]
    for result in results:
        lines = [
            (row["name"], f"{row['density']:g}", f"{1000 * row['seconds']:.0f} ms", f"{row['speedup']:.2f}x")
            for row in result["rows"]
        ]
        title = f"{result['config']}: {result['parameters'] / 1e9:.2f} G parameters, {result['tokens']:,} tokens"
        parts.append(title + "\n" + table(lines, ("SELF-ATTENTION", "DENSITY", "STEP", "SPEED")))
    return "\n\n".join(parts)


def main() -> None:
    """Parse the command line and run the benchmark; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS)[:2])
    parser.add_argument("--density", type=float, nargs="+", default=[1.0, 0.5, 0.3, 0.2])
    parser.add_argument("--numerics", nargs="+", default=["int8_fp8"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this measures a GPU, and there is none; python -m bench.step measures a CPU")
    results = []
    for name in arguments.config:
        results.append(benchmark(name, arguments.density, arguments.numerics, arguments.rounds))
        print(show(results[-1:]), file=sys.stderr, flush=True)
        torch.cuda.empty_cache()
    print(json.dumps(results, indent=2) if arguments.json else show(results))


if __name__ == "__main__":
    main()
