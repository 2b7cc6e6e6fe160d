"""What each timestep counts while a block is learned, so that the gradients of all timesteps agree.

One set of codes serves all timesteps, and they pull at it differently: one with a large gradient decides alone, two that oppose
each other undo what the other did. Gradient-aligned calibration (Hoang et al., arXiv 2602.01289) therefore weighs the
calibration samples. In the paper there is a weight for every sample, meta-learned in two levels along with the quantized model:
below, a step on the weighted loss; above, weights for which that step lowers the losses of all timesteps on validation samples.

Here it is one shot, for every block anew. With g_t the mean gradient of timestep t where learning begins, the direction d whose
smallest cosine with any of them is largest solves

    max_d min_t <d, g_t> / (|d| |g_t|),   d = sum_t a_t g_t / |g_t|,   a = argmin |sum_t a_t g_t / |g_t||^2 on the simplex

(the second is the dual of the first: the point of the hull of unit gradients that is nearest to zero; MGDA, arXiv 1810.04650,
takes that point without the normalisation). So w_t = a_t / |g_t|, scaled to a mean of 1: the gradient of the weighted loss lies
along d, and a small step against it raises no timestep's own loss. A weight may be 0: that timestep's gradient agrees with d
more than the others' do, without being a part of it. This objective and its decisions are ours; from the paper comes what is to
be reached. Weights of the paper follow the model as it is learned, these do not.

Inner products are estimated from a fixed sample of the variables' elements: all of them would be T copies of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

ELEMENTS = 1 << 14  # of each variable, in whose gradients timesteps are compared
NEGLIGIBLE = 1e-6  # share of the largest gradient below which one has no direction


def mean_gradient(losses: Sequence[Callable[[], Tensor]], variables: list[nn.Parameter]) -> Tensor:
    """Return the mean gradient of some losses in a sample of the variables' elements ``[n]``, of which one is computed
    at a time.
    """
    places = [_sample(variable) for variable in variables]
    total = torch.zeros(sum(len(place) for place in places), device=variables[0].device)
    for loss in losses:
        gradients = torch.autograd.grad(loss(), variables, materialize_grads=True)
        total += torch.cat([_part(gradient, place) for gradient, place in zip(gradients, places, strict=True)])
    return total / len(losses)


def agreeing(gradients: Tensor) -> Tensor:
    """Return weights ``[T]``, at least 0 and with a mean of 1, for gradients ``[T, n]`` of timesteps; see the module's
    docstring.

    A timestep without a gradient has no say and keeps the weight 1.
    """
    from scipy.optimize import nnls

    gradients = gradients.double().cpu()
    lengths = gradients.norm(dim=1)
    weights = torch.ones(len(gradients))
    live = lengths > NEGLIGIBLE * lengths.max()
    if not live.any():
        return weights
    units = gradients[live] / lengths[live, None]
    # min |U'a|^2 + (1 - sum a)^2 over a >= 0 has the simplex's decisions but for its length, which is scaled away.
    root = torch.linalg.qr(units.T, mode="r").R
    found, _ = nnls(torch.cat([root, torch.ones(1, len(units))]).numpy(), [0.0] * len(root) + [1.0])
    share = torch.from_numpy(found) / lengths[live]
    weights[live] = (share * len(units) / share.sum()).float()
    return weights


def _part(gradient: Tensor, places: Tensor) -> Tensor:
    """Return a gradient at some places ``[n]``, as long as the whole one in the mean."""
    return gradient.flatten()[places] * (gradient.numel() / len(places)) ** 0.5


def _sample(variable: Tensor) -> Tensor:
    """Return places of the elements that stand for a variable, the same at every call."""
    return torch.randperm(variable.numel(), generator=torch.Generator().manual_seed(0))[:ELEMENTS].to(variable.device)
