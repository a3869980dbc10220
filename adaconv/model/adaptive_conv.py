"""The adaptive convolution: each image is filtered with kernels predicted from its own style (paper, section 3.1).

Letters: B batch, C channels, G groups, k kernel size, H W height and width, h = k // 2.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from adaconv.model import gpu
from adaconv.model.kernels import EPS, AdaConvKernels, compose, instance_scale, narrow, per_input, widen


def adaptive_conv_reference(x: Tensor, kernels: AdaConvKernels, *, groups: int) -> Tensor:
    """What the block is, image by image: instance norm, depthwise convolution, pointwise convolution, bias.

    Args:
        x: (B, C, H, W) content features, any floating dtype; H and W above k // 2.
        kernels: of the same batch.
        groups: G, a divisor of C.

    Returns:
        (B, C, H, W).
    """
    outputs = []
    half = kernels.depthwise.shape[-1] // 2
    for image, depthwise, pointwise, bias in zip(x, *kernels, strict=True):
        mean, variance = image.mean(dim=(1, 2)), image.var(dim=(1, 2), correction=0)
        normal = ((image - mean[:, None, None]) * instance_scale(mean, variance)[:, None, None])[None]
        filtered = F.conv2d(F.pad(normal, (half,) * 4, mode="reflect"), depthwise, groups=groups)
        outputs.append(F.conv2d(filtered, pointwise, bias, groups=groups))
    return torch.cat(outputs)


def adaptive_conv(x: Tensor, kernels: AdaConvKernels, *, groups: int) -> Tensor:
    """The same for the whole batch at once, in one convolution.

    - A grouped pointwise after a grouped depthwise convolution of the same groups is one grouped convolution: the
      predicted kernels are composed. The batch becomes groups of that one convolution.
    - Instance norm is a shift and a scale of each channel. Padding by reflection keeps constants, so the scale moves
      into the kernel; the shift is made while the map is copied to its padded place, where it costs nothing. (Moved
      into the bias it would cancel against sums many times its size.)
    - Both sums that the gradient of instance norm needs over the map are sums over kernels: see `backward`.

    So a map is read for its mean, copied once, and convolved; training keeps that one copy.

    Args:
        x: (B, C, H, W) content features; H and W above k // 2. Under autocast on a CPU it is computed in float32: there
            bfloat16 grouped convolutions have slow gradients. Statistics are float32 at least.
        kernels: of the same batch, or of one style for all of it.
        groups: G, a divisor of C.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: the map is too small for its edges to be mirrored.
    """
    if not torch.compiler.is_compiling() and min(x.shape[-2:]) <= kernels.depthwise.shape[-1] // 2:
        size = kernels.depthwise.shape[-1]
        raise ValueError(f"kernels of {size}x{size} need a map above {size // 2} a side, found {tuple(x.shape[-2:])}")
    device = x.device.type
    dtype = x.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.float32 if device == "cpu" else torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        exact = torch.promote_types(x.dtype, torch.float32)
        kernels = AdaConvKernels(*(k.to(exact).expand(x.shape[0], *k.shape[1:]) for k in kernels))
        weight = compose(kernels, groups=groups)
        out: Tensor
        if gpu.adaptive_conv is not None and gpu.adaptive_conv.suits(x, weight, dtype):
            out = gpu.adaptive_conv.adaptive_conv(x, weight, kernels.bias, dtype)
            return out
        if device == "cuda" and dtype.itemsize == 2:
            dtype = torch.float32  # cuDNN's convolutions of small groups take 50 times as long in 16 bits
        if torch.compiler.is_exporting():
            return _image_by_image(x.to(exact), weight, kernels.bias)
        if torch.compiler.is_compiling():
            return _of_plain_operators(x.to(exact), weight, kernels.bias, dtype=dtype)
        out = _AdaptiveConv.apply(x, weight, kernels.bias, dtype)  # type: ignore[no-untyped-call]
    return out


def _of_plain_operators(x: Tensor, weight: Tensor, bias: Tensor, *, dtype: torch.dtype) -> Tensor:
    """The same of operators that graphs have: a compiler joins normalisation and padding by itself."""
    half, groups = weight.shape[-1] // 2, weight.shape[1] // weight.shape[2]
    normal = F.instance_norm(x, eps=EPS).to(dtype)
    padded = F.pad(normal, (half,) * 4, mode="reflect").flatten(0, 1)[None]
    kernels, biases = weight.flatten(0, 1).to(dtype), bias.flatten().to(dtype)
    return F.conv2d(padded, kernels, biases, groups=len(x) * groups).view(x.shape)


def _image_by_image(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same for a batch of any size: a graph's convolution has its number of groups written into it, so the batch
    cannot become groups. A loop inside the graph, whose body is as large as one image's work.
    """
    from torch._higher_order_ops.scan import scan

    half, groups = weight.shape[-1] // 2, weight.shape[1] // weight.shape[2]

    def one(nothing: Tensor, given: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        image, kernel, shift = given
        padded = F.pad(F.instance_norm(image[None], eps=EPS), (half,) * 4, mode="reflect")
        return nothing.clone(), F.conv2d(padded, kernel, shift, groups=groups)[0]

    out: Tensor = scan(one, torch.zeros(1), (x, weight, bias))[1]
    return out


class _AdaptiveConv(torch.autograd.Function):
    """x (B, C, H, W), weight (B, C, C/G, k, k), bias (B, C), dtype of the convolution -> (B, C, H, W)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        batch, channels, height, width = x.shape
        half = weight.shape[-1] // 2
        mean = x.mean(dim=(2, 3), keepdim=True, dtype=weight.dtype)
        padded = x.new_empty(batch, channels, height + 2 * half, width + 2 * half, dtype=dtype)
        centred = _inside(padded, half)
        torch.sub(x, mean, out=centred)
        _reflect_(padded, half)
        # By rows first: 5 times as fast on a CPU as over a strided map at once, and with shorter sums.
        norm = torch.linalg.vector_norm(torch.linalg.vector_norm(centred, dim=3, dtype=weight.dtype), dim=2)
        scale = instance_scale(mean.flatten(1), norm.square() / (height * width))  # (B, C)

        wide = widen(weight * per_input(scale, weight), x.device)  # (B*C, C/G or 8, k, k)
        groups = batch * channels // wide.shape[1]
        out = F.conv2d(padded.flatten(0, 1)[None], wide.to(dtype), bias.flatten().to(dtype), groups=groups)
        ctx.save_for_backward(padded, weight, scale)
        ctx.x_dtype = x.dtype
        return out.view(batch, channels, height, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        # z = scale * (x - mean) is the normalised map and z' its gradient. A kernel's gradient is a sum of products of
        # gradient and z, so over the map  sum(z' z) = sum over kernels(weight * weight's gradient)  and
        # sum(z') = sum over kernels(weight * bias's gradient): padding and its adjoint change neither.
        padded, weight, scale = ctx.saved_tensors
        batch, channels, height, width = grad.shape
        half, pixels = weight.shape[-1] // 2, height * width
        grad_bias = grad.sum(dim=(2, 3), dtype=weight.dtype)
        scales = per_input(scale, weight)
        wide = widen(weight * scales, grad.device)
        grad_padded, grad_wide, _ = torch.ops.aten.convolution_backward(
            grad.to(padded.dtype).contiguous().flatten(0, 1)[None],
            padded.flatten(0, 1)[None],
            wide.to(padded.dtype),
            None,
            [1, 1],
            [0, 0],
            [1, 1],
            False,
            [0, 0],
            batch * channels // wide.shape[1],
            [True, True, False],
        )
        grad_weight = narrow(grad_wide, weight.shape).to(weight.dtype) * scales

        of_group = (batch, -1, weight.shape[2], *weight.shape[2:])  # (B, G, out of a group, in of a group, k, k)
        with_z = (weight * grad_weight).view(of_group).sum(dim=(2, 4, 5)).view(batch, channels, 1, 1)
        alone = (weight * grad_bias[:, :, None, None, None]).view(of_group).sum(dim=(2, 4, 5)).view(with_z.shape)
        scale = scale[:, :, None, None]
        grad_padded = grad_padded.view(padded.shape)
        _reflect_adjoint_(grad_padded, half)
        slope, shift = scale.square() * with_z / pixels, scale * alone / pixels
        grad_x = torch.addcmul(_inside(grad_padded, half), _inside(padded, half), slope.to(padded.dtype), value=-1)
        return grad_x.sub_(shift).to(ctx.x_dtype), grad_weight, grad_bias, None


def _inside(padded: Tensor, half: int) -> Tensor:
    return padded[..., half : padded.shape[-2] - half, half : padded.shape[-1] - half]


def _reflect_(padded: Tensor, half: int) -> None:
    """Fill the border of a padded map from its inside."""
    for to, source in _mirrors(padded, half):
        to.copy_(source)


def _reflect_adjoint_(padded: Tensor, half: int) -> None:
    """Add the border's gradient to the pixels that it was copied from."""
    for to, source in reversed(_mirrors(padded, half)):
        source.add_(to)


def _mirrors(padded: Tensor, half: int) -> list[tuple[Tensor, Tensor]]:
    """Lines of the border and the lines they are copied from: columns between the border's rows, then whole rows."""
    height, width = padded.shape[-2] - 1, padded.shape[-1] - 1
    middle = padded[..., half : height + 1 - half, :]
    pairs = []
    for near in range(half):
        pairs.append((middle[..., near], middle[..., 2 * half - near]))
        pairs.append((middle[..., width - near], middle[..., width - 2 * half + near]))
    for near in range(half):
        pairs.append((padded[..., near, :], padded[..., 2 * half - near, :]))
        pairs.append((padded[..., height - near, :], padded[..., height - 2 * half + near, :]))
    return pairs
