"""Style codes mixed and faded: linear in what the adaptive blocks do, so that halfway looks halfway.

A block convolves with K = P D, the product of its pointwise and depthwise kernels. Mixing D and P each by itself would
add products of one style with another; what is mixed here is K, written as a depthwise kernel with P = 1.
"""

import math
from collections.abc import Sequence

import torch

from adaconv.errors import UsageError
from adaconv.model.kernels import AdaConvKernels, compose
from adaconv.model.network import StyleCode, kernels_at


def mix(codes: Sequence[StyleCode], weights: Sequence[float]) -> StyleCode:
    """A code whose blocks do the weighted mean of what the blocks of `codes` do.

    Args:
        codes: of one model, each with a batch of one.
        weights: one a code, finite and none negative; they are divided by their sum.

    Raises:
        UsageError: the weights do not fit.
    """
    if len(weights) != len(codes) or min(weights, default=-1) < 0 or not 0 < sum(weights) < math.inf:
        raise UsageError(
            f"expected {len(codes)} weights, finite, none below 0 and one above it; found "
            f"{', '.join(map(str, weights))}"
        )
    shares = [(code, weight / sum(weights)) for code, weight in zip(codes, weights, strict=True) if weight > 0]
    if len(shares) == 1:
        return shares[0][0]
    composed = [(_composed(code), share) for code, share in shares]
    return {name: sum_of([(code[name], share) for code, share in composed]) for name in composed[0][0]}


def sum_of(terms: Sequence[tuple[torch.Tensor, float]]) -> torch.Tensor:
    """Σ share × tensor, added up in float64: equal terms give what each of them is."""
    total = sum(tensor.double() * share for tensor, share in terms)
    assert isinstance(total, torch.Tensor)
    return total.to(terms[0][0].dtype)


def kernels_of(code: StyleCode) -> list[AdaConvKernels]:
    """The kernels of each scale, coarsest first; none for a code that holds statistics alone (AdaIN)."""
    scales = {int(name.split(".")[1]) for name in code if name.startswith("kernels.")}
    return [kernels_at(code, index) for index in sorted(scales)]


def _composed(code: StyleCode) -> StyleCode:
    """The same code with P = 1 at every scale."""
    code = dict(code)
    for index, kernels in enumerate(kernels_of(code)):
        batch, channels, per_group = kernels.depthwise.shape[:3]
        one = torch.zeros(batch, channels, per_group, 1, 1, device=kernels.bias.device)
        order = torch.arange(channels, device=one.device)
        one[:, order, order % per_group] = 1
        code[f"kernels.{index}.depthwise"] = compose(kernels, groups=channels // per_group)
        code[f"kernels.{index}.pointwise"] = one
    return code
