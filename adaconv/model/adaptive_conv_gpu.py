"""The adaptive convolution on GPUs, in Triton: `adaptive_conv` of channels_last maps in 16 bits.

cuDNN runs convolutions of so many small groups at a hundredth of the memory's speed. Here groups are joined to blocks
of 16 channels, with zeros between them, which is what tensor cores take; a block of an image is one program's:

    statistics        read x                       mean and scale of each channel
    convolution       read x, write out            mirrored borders are read where they lie; nothing is padded
    weight gradient   read x and the gradient      sums over parts of a map, added up in a fixed order
    input gradient    read both, write             with the gradient of instance norm

Normalisation costs nothing: the scale moves into the kernel and the mean into the bias, with the kernel as it was
rounded, so that what is subtracted is what the mean has added.

Letters: B batch, C channels, G groups, k kernel size, H W height and width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaconv.model.kernels import EPS, per_input
from adaconv.model.maps_gpu import mirrored, statistics

_BLOCK = tl.constexpr(16)
_SIZE = tl.constexpr(3)  # of the kernels
_SHIFTS = tl.constexpr(4)  # as many as the kernel has rows or columns, and one of zeros
_STAGES = 1  # loads of several rows under way would go past the L1 cache, which serves two of three
_PROGRAMS = 4096  # that fill a large GPU several times


def suits(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether x (B, C, H, W) and weight (B, C, C/G, k, k) are what these kernels are written for."""
    channels, per_group, size = weight.shape[1:4]
    height, width = x.shape[2:]
    return (
        x.is_cuda
        and dtype in (torch.bfloat16, torch.float16)
        and channels % _BLOCK.value == 0
        and _BLOCK.value % per_group == 0
        and size == _SIZE.value
        and min(height, width) > size  # a pixel has one mirror image along each axis
        and channels * height * width <= 2**30  # places in an image are numbers of 32 bits
    )


def adaptive_conv(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Instance norm and a grouped convolution with kernels of each image's own.

    Args:
        x: (B, C, H, W) features.
        weight: (B, C, C/G, k, k) float32.
        bias: (B, C) float32.
        dtype: of products and of the result; sums are float32.

    Returns:
        (B, C, H, W), channels_last.
    """
    out: Tensor = _adaptive_conv(x, weight, bias, dtype)[0]
    return out


@torch.library.custom_op("adaconv::adaptive_conv", mutates_args=())
def _adaptive_conv(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The same, with mean and scale (B, C) of the channels, float32."""
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = weight.contiguous(), bias.contiguous()
    mean, variance = statistics(x)
    scale = (variance + EPS).rsqrt()
    blocks, constant = _joined(weight, scale, dtype, mean, bias)
    out = torch.empty_like(x, dtype=dtype)
    _convolve(x, blocks, constant, out)
    return out, mean, scale


@_adaptive_conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x, dtype), torch.empty_like(bias, dtype=torch.float32), torch.empty_like(bias, dtype=torch.float32)


@torch.library.custom_op("adaconv::adaptive_conv_weight_gradient", mutates_args=())
def _weight_gradient_of(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of products of the output's gradient with x as it is, shaped as the weight; and of the gradient alone."""
    grad, x = (t.contiguous(memory_format=torch.channels_last) for t in (grad, x))
    batch, channels, height, width = x.shape
    count = channels // _BLOCK.value
    columns, strips, part, parts = _cut(batch * count, height, width)
    of_weight = x.new_empty(strips * parts, *weight.shape, dtype=torch.float32)
    of_bias = x.new_empty(strips * parts, batch, channels, dtype=torch.float32)
    _weight_gradient[count, strips * parts, batch](
        grad,
        x,
        of_weight,
        of_bias,
        height,
        width,
        part,
        BATCH=batch,
        CHANNELS=channels,
        PER_GROUP=weight.shape[2],
        COLUMNS=columns,
        STAGES=_STAGES,
        num_warps=4,
    )
    return of_weight.sum(0), of_bias.sum(0)


@_weight_gradient_of.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight, dtype=torch.float32), weight.new_empty(weight.shape[:2], dtype=torch.float32)


@torch.library.custom_op("adaconv::adaptive_conv_input_gradient", mutates_args=())
def _input_gradient_of(
    grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor, slope: Tensor, constant: Tensor
) -> Tensor:
    """The convolution's adjoint of the gradient, and for each channel a slope times x and a constant: (B, C, H, W)."""
    grad, x = (t.contiguous(memory_format=torch.channels_last) for t in (grad, x))
    batch, channels, height, width = x.shape
    blocks, _ = _joined(weight, scale, grad.dtype)
    result = torch.empty_like(x)
    _convolve(grad, blocks, constant.contiguous(), result, adjoint_of=(x, slope.contiguous()))
    tiles = triton.cdiv(2 * (width + height - 2), 64)
    _mirrored_gradient[channels // _BLOCK.value, tiles, batch](
        grad, blocks, result, height, width, CHANNELS=channels, PIXELS=64
    )
    return result


@_input_gradient_of.register_fake
def _(grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor, slope: Tensor, constant: Tensor) -> Tensor:
    return _like(x, x.dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _, _ = inputs
    _, mean, scale = output
    ctx.mark_non_differentiable(mean, scale)
    ctx.save_for_backward(x, weight, mean, scale)


def _backward(ctx: Any, grad: Tensor, _mean: Any, _scale: Any) -> tuple[Tensor, Tensor, Tensor, None]:
    # As `_AdaptiveConv.backward` of adaptive_conv.py, which says why: the sums over the map are sums over kernels.
    x, weight, mean, scale = ctx.saved_tensors
    batch, channels, height, width = x.shape
    products, grad_bias = torch.ops.adaconv.adaptive_conv_weight_gradient(grad, x, weight)
    of_output = grad_bias[:, :, None, None, None]
    grad_weight = (products - per_input(mean, weight) * of_output) * per_input(scale, weight)
    of_group = (batch, -1, weight.shape[2], *weight.shape[2:])  # (B, G, out of a group, in of a group, k, k)
    with_z = (weight * grad_weight).view(of_group).sum(dim=(2, 4, 5)).view(batch, channels)
    alone = (weight * of_output).view(of_group).sum(dim=(2, 4, 5)).view(batch, channels)
    slope = -scale.square() * with_z / (height * width)
    constant = -scale * alone / (height * width) - slope * mean
    grad_x = torch.ops.adaconv.adaptive_conv_input_gradient(grad, x, scale, weight, slope, constant)
    return grad_x, grad_weight, grad_bias, None


_adaptive_conv.register_autograd(_backward, setup_context=_keep)


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)


def _cut(images: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Columns of a strip and number of strips; rows of a part and number of parts. By shapes alone: results repeat."""
    columns = 64 if width > 32 else 32
    strips = triton.cdiv(width, columns)
    part = triton.cdiv(height, min(max(1, height // 8), triton.cdiv(_PROGRAMS, images * strips)))
    return columns, strips, part, triton.cdiv(height, part)


def _joined(
    weight: Tensor, scale: Tensor, dtype: torch.dtype, mean: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What `_join` makes: forward where mean and bias are given, of the adjoint otherwise."""
    batch, channels, per_group = weight.shape[:3]
    weight, scale = weight.contiguous(), scale.contiguous()
    count = channels // _BLOCK.value
    blocks = weight.new_empty(batch, count, _SIZE.value, _SHIFTS.value, _BLOCK.value, _BLOCK.value, dtype=dtype)
    constant = torch.empty_like(scale)
    _join[count, batch](
        weight,
        scale,
        scale if mean is None else mean,
        scale if bias is None else bias.contiguous(),
        blocks,
        constant,
        CHANNELS=channels,
        PER_GROUP=per_group,
        ADJOINT=bias is None,
    )
    return blocks, constant


def _convolve(
    x: Tensor, blocks: Tensor, constant: Tensor, out: Tensor, adjoint_of: tuple[Tensor, Tensor] | None = None
) -> None:
    batch, channels, height, width = x.shape
    count = channels // _BLOCK.value
    columns, strips, part, parts = _cut(batch * count, height, width)
    _convolution[count, strips * parts, batch](
        x,
        blocks,
        constant,
        out,
        *(adjoint_of or (x, constant)),
        height,
        width,
        part,
        CHANNELS=channels,
        ADJOINT=adjoint_of is not None,
        COLUMNS=columns,
        STAGES=_STAGES,
        num_warps=columns // 16,
    )


@triton.jit
def _join(
    weight,
    scale,
    mean,
    bias,
    blocks,
    constant,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    ADJOINT: tl.constexpr,
):
    """Kernels as tensor cores take them: (B, C/16, rows, 4 columns, 16 inputs, 16 outputs); the last column is zeros.

    Forward, the constant is the bias without what the mean will have added. The adjoint's kernels are turned round.
    """
    block, image = tl.program_id(0), tl.program_id(1)
    of_block = tl.arange(0, _BLOCK)
    line = image * CHANNELS + block * _BLOCK + of_block
    joined = (of_block // PER_GROUP)[:, None] == (of_block // PER_GROUP)[None, :]
    if ADJOINT:
        source = (line[:, None] * PER_GROUP + (of_block % PER_GROUP)[None, :]) * _SIZE * _SIZE
        factor = tl.load(scale + line)[None, :]
    else:
        source = (line[None, :] * PER_GROUP + (of_block % PER_GROUP)[:, None]) * _SIZE * _SIZE
        factor = tl.load(scale + line)[:, None]
    place = (image * tl.num_programs(0) + block) * _SIZE * _SHIFTS * _BLOCK * _BLOCK
    place += of_block[:, None] * _BLOCK + of_block[None, :]
    total = tl.zeros([_BLOCK, _BLOCK], tl.float32)
    for down in tl.static_range(_SIZE):
        for right in tl.static_range(_SHIFTS):
            tap = down * _SIZE + right
            tap = _SIZE * _SIZE - 1 - tap if ADJOINT else tap
            kernel = tl.load(weight + source + tap, mask=joined & (right < _SIZE), other=0.0) * factor
            kernel = kernel.to(blocks.dtype.element_ty)
            tl.store(blocks + place + (down * _SHIFTS + right) * _BLOCK * _BLOCK, kernel)
            total += kernel.to(tl.float32)
    if not ADJOINT:
        added = tl.sum(total * tl.load(mean + line)[:, None], 0)
        tl.store(constant + line, tl.load(bias + line) - added)


@triton.jit
def _convolution(
    x,
    blocks,
    constant,
    out,
    other,
    slope,
    height,
    width,
    part,
    CHANNELS: tl.constexpr,
    ADJOINT: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Some rows of a strip of a block of an image: a convolution, and a constant for each channel.

    Rows are read one after the other, each once, and add to the three rows of the result around them. The adjoint sees
    nothing beyond the border, which is `_mirrored_gradient`'s; it adds `slope` times another map.
    """
    block, index, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    strips = tl.cdiv(width, COLUMNS)
    first = index // strips * part
    last = tl.minimum(first + part, height)
    column = index % strips * COLUMNS + tl.arange(0, COLUMNS)
    of_block = tl.arange(0, _BLOCK)
    channel = block * _BLOCK + of_block
    line = image * CHANNELS + channel
    x += image.to(tl.int64) * height * width * CHANNELS
    out += image.to(tl.int64) * height * width * CHANNELS
    other += image.to(tl.int64) * height * width * CHANNELS
    DEPTH: tl.constexpr = _SHIFTS * _BLOCK
    kernels = blocks + (image * tl.num_programs(0) + block) * _SIZE * DEPTH * _BLOCK
    kernels += tl.arange(0, DEPTH)[:, None] * _BLOCK + of_block[None, :]
    upper = tl.load(kernels)
    middle = tl.load(kernels + DEPTH * _BLOCK)
    lower = tl.load(kernels + 2 * DEPTH * _BLOCK)
    offset = tl.load(constant + line)[None, :]
    if ADJOINT:
        steep = tl.load(slope + line)[None, :]
    shift = tl.arange(0, _SHIFTS)
    from_column = column[:, None] + shift[None, :] - 1
    seen = (column < width)[:, None] & (shift < _SIZE)[None, :]
    if ADJOINT:
        seen &= (from_column >= 0) & (from_column < width)
    else:
        from_column = mirrored(from_column, width)
    source = from_column[:, :, None] * CHANNELS + channel[None, None, :]
    place = column[:, None] * CHANNELS + channel[None, :]
    before = tl.zeros([COLUMNS, _BLOCK], tl.float32)
    here = tl.zeros([COLUMNS, _BLOCK], tl.float32)
    for row in tl.range(first - 1, last + 1, num_stages=STAGES):
        if ADJOINT:
            start, there = row * width * CHANNELS, seen & (row >= 0) & (row < height)
        else:
            start, there = mirrored(row, height) * width * CHANNELS, seen
        values = tl.load(x + start + source, mask=there[:, :, None], other=0.0)
        values = tl.reshape(values, [COLUMNS, DEPTH]).to(upper.dtype)
        result = tl.dot(values, lower, before)
        before = tl.dot(values, middle, here)
        here = tl.dot(values, upper)
        done = (row - 1) * width * CHANNELS + place
        finished = (column < width)[:, None] & (row > first)
        result += offset
        if ADJOINT:
            result += tl.load(other + done, mask=finished, other=0.0).to(tl.float32) * steep
        tl.store(out + done, result.to(out.dtype.element_ty), mask=finished)


@triton.jit
def _mirrored_gradient(
    grad,
    blocks,
    result,
    height,
    width,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Add to the pixels that were copied beyond the border what their copies received."""
    block, tile, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    of_block = tl.arange(0, _BLOCK)
    channel = block * _BLOCK + of_block
    grad += image.to(tl.int64) * height * width * CHANNELS
    result += image.to(tl.int64) * height * width * CHANNELS
    kernels = blocks + (image * tl.num_programs(0) + block) * _SIZE * _SHIFTS * _BLOCK * _BLOCK
    kernels += of_block[:, None] * _BLOCK + of_block[None, :]
    # The second row and the last but one; then the columns alike, without those two rows.
    pixel = tile * PIXELS + tl.arange(0, PIXELS)
    rest = pixel - 2 * width
    of_rows = rest < 0
    near = tl.where(of_rows, pixel // width, rest % 2)
    along = tl.where(of_rows, pixel % width, rest // 2)
    along = tl.where(~of_rows & (along > 0), along + 1, along)
    along = tl.where(~of_rows & (along >= height - 2), height - 1, along)
    near = tl.where(near == 0, 1, tl.where(of_rows, height, width) - 2)
    row, column = tl.where(of_rows, near, along), tl.where(of_rows, along, near)
    there = rest < 2 * (height - 2)
    other_row, other_column = _copy(row, height), _copy(column, width)
    sums = tl.zeros([PIXELS, _BLOCK], tl.float32)
    for down in tl.static_range(_SIZE):
        for right in tl.static_range(_SIZE):
            above, left = down - 1, right - 1
            values = _value(grad, other_row + above, column + left, height, width, there, channel, CHANNELS)
            values += _value(grad, row + above, other_column + left, height, width, there, channel, CHANNELS)
            values += _value(grad, other_row + above, other_column + left, height, width, there, channel, CHANNELS)
            kernel = tl.load(kernels + (down * _SHIFTS + right) * _BLOCK * _BLOCK)
            sums = tl.dot(values.to(kernel.dtype), kernel, sums)
    place = result + (row * width + column)[:, None] * CHANNELS + channel[None, :]
    sums += tl.load(place, mask=there[:, None], other=0.0).to(tl.float32)
    tl.store(place, sums.to(result.dtype.element_ty), mask=there[:, None])


@triton.jit
def _copy(index, side):
    """The place beyond the border that a place is copied to, or one that is nowhere."""
    return tl.where(index == 1, -1, tl.where(index == side - 2, side, -4))


@triton.jit
def _value(grad, row, column, height, width, there, channel, CHANNELS: tl.constexpr):
    """The gradient at these places in float32; nothing beyond the map."""
    inside = there & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    place = (row * width + column)[:, None] * CHANNELS + channel[None, :]
    return tl.load(grad + place, mask=inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def _weight_gradient(
    grad,
    x,
    of_weight,
    of_bias,
    height,
    width,
    part,
    BATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Of some rows of a strip, all products of a block's gradients with what the taps see of its inputs.

    A row of x in three places, and the three rows of the gradient that have read it, are one product.
    """
    block, index, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    strips = tl.cdiv(width, COLUMNS)
    first = index // strips * part
    last = tl.minimum(first + part, height)
    column = index % strips * COLUMNS + tl.arange(0, COLUMNS)
    of_block = tl.arange(0, _BLOCK)
    channel = block * _BLOCK + of_block
    x += image.to(tl.int64) * height * width * CHANNELS
    grad += image.to(tl.int64) * height * width * CHANNELS
    DEPTH: tl.constexpr = _SHIFTS * _BLOCK
    shift = tl.arange(0, _SHIFTS)
    from_column = mirrored(column[:, None] + shift[None, :] - 1, width)
    source = from_column[:, :, None] * CHANNELS + channel[None, None, :]
    seen = (column < width)[:, None] & (shift < _SIZE)[None, :]
    place = column[:, None] * CHANNELS + channel[None, :]
    products = tl.zeros([DEPTH, DEPTH], tl.float32)
    alone = tl.zeros([COLUMNS, _BLOCK], tl.float32)
    for row in tl.range(first - 1, last + 1, num_stages=STAGES):
        start = mirrored(row, height) * width * CHANNELS
        values = tl.reshape(tl.load(x + start + source, mask=seen[:, :, None], other=0.0), [COLUMNS, DEPTH])
        reader = row + 1 - shift  # the row of the gradient whose tap in row `shift` of the kernel was here
        there = seen & ((reader >= first) & (reader < last))[None, :]
        slopes = tl.load(
            grad + (reader * width * CHANNELS)[None, :, None] + place[:, None, :], mask=there[:, :, None], other=0.0
        )
        slopes = tl.reshape(slopes, [COLUMNS, DEPTH]).to(values.dtype)
        products = tl.dot(tl.trans(slopes), values, products)
        whole = (column < width)[:, None] & (row >= first) & (row < last)
        alone += tl.load(grad + row * width * CHANNELS + place, mask=whole, other=0.0).to(tl.float32)
    line = (index * BATCH + image) * CHANNELS + block * _BLOCK
    tl.store(of_bias + line + of_block, tl.sum(alone, 0))
    lane = tl.arange(0, DEPTH)
    down, output = (lane // _BLOCK)[:, None], (lane % _BLOCK)[:, None]
    right, input_channel = (lane // _BLOCK)[None, :], (lane % _BLOCK)[None, :]
    wanted = (output // PER_GROUP == input_channel // PER_GROUP) & (down < _SIZE) & (right < _SIZE)
    kernel = (line + output) * PER_GROUP + input_channel % PER_GROUP
    tl.store(of_weight + (kernel * _SIZE + down) * _SIZE + right, products, mask=wanted)
