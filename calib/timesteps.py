"""Which of the sampler's steps calibration keeps. A strategy is a function; the names are the field's.

Each gets the sampler's timestep values in sampling order, how many steps to keep, and a generator that is seeded by the
run's seed and the shard, and returns positions into the timesteps, sorted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from qdiff.registry import Registry

Strategy = Callable[[list[float], int, torch.Generator], list[int]]
STRATEGIES: Registry[Strategy] = Registry("timestep strategy")


@STRATEGIES.register("all")
def every(timesteps: list[float], count: int, generator: torch.Generator) -> list[int]:
    """Return every step of the sampler, whatever ``count`` says."""
    return list(range(len(timesteps)))


@STRATEGIES.register("uniform")
def uniform(timesteps: list[float], count: int, generator: torch.Generator) -> list[int]:
    """Return evenly spaced steps, first and last included (Q-Diffusion, arXiv 2302.04304, section 3.2)."""
    count = min(count, len(timesteps))
    if count == 1:
        return [len(timesteps) // 2]
    return sorted({round(i * (len(timesteps) - 1) / (count - 1)) for i in range(count)})


@STRATEGIES.register("normal")
def normal(timesteps: list[float], count: int, generator: torch.Generator) -> list[int]:
    """Return steps drawn without repetition with the density of a normal distribution over t, skewed to the clean end:
    mean 0.4 T, deviation T / 2 (PTQ4DM's NDTC, arXiv 2211.15736, eq. 9, with mean <= T / 2). Each shard draws anew.
    """
    count = min(count, len(timesteps))
    t = torch.tensor(timesteps, dtype=torch.float64)
    largest = max(float(t.max()), 1e-9)
    density = torch.exp(-0.5 * ((t - 0.4 * largest) / (0.5 * largest)) ** 2)
    return sorted(torch.multinomial(density, count, replacement=False, generator=generator).tolist())
