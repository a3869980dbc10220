"""What lies between convolutions, on GPUs in Triton: each a single pass over a channels_last map.

    finish        bias, ReLU, pooling or upsampling, and the mirrored border that the next convolution reads
    of_image      an image's normalisation, first convolution, ReLU and border
    statistics    mean and variance of each channel, without the rounding of E[x²] - E[x]²
    affine        a slope and a constant for each channel: the gradient of statistics

torch has an operator for each of these steps: several passes over maps that are read and written faster than a
convolution computes, and its padding by reflection gives up channels_last, so that maps are also copied forth and back.

Letters: B batch, C channels, H W height and width.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

NONE, POOL, UPSAMPLE, AVERAGE = 0, 1, 2, 3  # what happens to a map's size
RESAMPLE = {"relu": NONE, "pool": POOL, "upsample": UPSAMPLE}

_WIDE = 16  # channels that a program takes at least
_SMALLEST = 4  # a side of a map whose pixels have one mirror image at most
_LARGEST = 2**30  # values of an image, whose places are numbers of 32 bits, with a border too


def suits(x: Tensor) -> bool:
    """Whether these kernels take maps like x (B, C, H, W)."""
    return takes(x.device, x.dtype, [x.shape[1]], x.shape[2:], largest=x.shape[1:].numel())


def takes(
    device: torch.device, dtype: torch.dtype, channels: Iterable[int], sides: Sequence[int], *, largest: int
) -> bool:
    """The same of all maps with these numbers of channels, sides no smaller than these and no more values an image."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16, torch.float32)
        and all(count % _WIDE == 0 for count in channels)
        and min(sides) >= _SMALLEST
        and largest <= _LARGEST
        and not torch.compiler.is_compiling()  # a compiler joins such passes by itself
    )


def finish(
    y: Tensor, bias: Tensor | None = None, *, negative: float, resample: int = NONE, border: bool = False
) -> Tensor:
    """(B, C, H, W) -> (B, C, H', W'): y + bias, resampled by 2, activated, with one line of mirrored pixels around.

    Args:
        y: a convolution's output without its bias; with even sides for AVERAGE.
        bias: (C,).
        negative: what negative values are multiplied with: 0 is ReLU, 1 leaves them.
        resample: NONE; POOL, the largest of each 2x2 pixels; AVERAGE, their mean; UPSAMPLE, each pixel four times.
        border: whether to add it.
    """
    out: Tensor = _Finish.apply(y, bias, negative, resample, border)  # type: ignore[no-untyped-call]
    return out


def finish_and_tap(y: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """With ReLU and a border, and the map inside it: a view, whose gradient is added on the way."""
    out, inside = _Finish.apply(y, bias, 0.0, NONE, True, True)  # type: ignore[no-untyped-call]
    return out, inside


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, bias: Tensor | None, negative: float, resample: int, border: bool, tap: bool = False
    ) -> Any:
        y = y.contiguous(memory_format=torch.channels_last)
        batch, channels, height, width = y.shape
        rows, columns = ((side, side // 2, 2 * side, side // 2)[resample] for side in (height, width))
        shape = (batch, channels, rows + 2 * border, columns + 2 * border)
        out = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=torch.channels_last)
        pixels, wide = _block(channels)
        _finish[triton.cdiv(shape[2] * shape[3], pixels), channels // wide, batch](
            y,
            y if bias is None else bias,
            out,
            height,
            width,
            CHANNELS=channels,
            BIAS=bias is not None,
            NEGATIVE=negative,
            RESAMPLE=resample,
            BORDER=int(border),
            PIXELS=pixels,
            WIDE=wide,
        )
        ctx.set_materialize_grads(False)
        ctx.how = negative, resample, border
        ctx.shape = y.shape
        # A pooled pixel does not say where it came from.
        ctx.save_for_backward(*((y, bias) if resample == POOL else (out if negative != 1 else None, bias)))
        return (out, out[..., 1:-1, 1:-1]) if tap else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, of_inside: Tensor | None = None) -> Any:
        if grad is None and of_inside is None:
            return (None,) * 6
        known, bias = ctx.saved_tensors
        result, of_bias = _gradient(
            grad, of_inside, known, bias, ctx.shape, *ctx.how, wanted=bias is not None and ctx.needs_input_grad[1]
        )
        return result, of_bias, None, None, None, None


def _gradient(
    grad: Tensor | None,
    of_inside: Tensor | None,
    known: Tensor | None,
    bias: Tensor | None,
    shape: Sequence[int],
    negative: float,
    resample: int,
    border: bool,
    *,
    wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """Of y, in this shape, and of the bias where it is wanted. `known`: y where it was pooled, else the result."""
    batch, channels, height, width = shape
    grad, of_inside = (g if g is None else g.contiguous(memory_format=torch.channels_last) for g in (grad, of_inside))
    some = grad if grad is not None else of_inside
    assert some is not None
    pixels, wide = _block(channels)
    places = height * width
    result = torch.empty(shape, dtype=some.dtype, device=some.device, memory_format=torch.channels_last)
    if resample in (POOL, AVERAGE):
        places, pixels = (height // 2) * (width // 2), pixels // 4
        if height % 2 or width % 2:  # what no pooled pixel covers
            result.zero_()
    tiles = triton.cdiv(places, pixels)
    of_bias = some.new_empty(batch * tiles, channels, dtype=torch.float32) if wanted else some
    _finish_backward[tiles, channels // wide, batch](
        some if grad is None else grad,
        some if of_inside is None else of_inside,
        some if known is None else known,
        some if bias is None else bias,
        result,
        of_bias,
        height,
        width,
        CHANNELS=channels,
        GRAD=grad is not None,
        INSIDE=of_inside is not None,
        BIAS=bias is not None,
        OF_BIAS=wanted,
        NEGATIVE=negative,
        RESAMPLE=resample,
        BORDER=int(border),
        PIXELS=pixels,
        WIDE=wide,
    )
    return result, of_bias.sum(0).to(bias.dtype) if wanted and bias is not None else None


def _block(channels: int) -> tuple[int, int]:
    """Pixels and channels of a program."""
    wide = min(64, channels & -channels)
    return 4096 // wide, wide


@triton.jit
def mirrored(index, side):
    index = tl.maximum(index, -index)
    return tl.minimum(index, 2 * (side - 1) - index)


@triton.jit
def _finish(
    y,
    bias,
    out,
    height,
    width,
    CHANNELS: tl.constexpr,
    BIAS: tl.constexpr,
    NEGATIVE: tl.constexpr,
    RESAMPLE: tl.constexpr,
    BORDER: tl.constexpr,
    PIXELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    tile, block, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if (RESAMPLE == 1) | (RESAMPLE == 3):
        rows, columns = height // 2, width // 2
    elif RESAMPLE == 2:
        rows, columns = height * 2, width * 2
    else:
        rows, columns = height, width
    across, pixels = columns + 2 * BORDER, (rows + 2 * BORDER) * (columns + 2 * BORDER)
    pixel = tile * PIXELS + tl.arange(0, PIXELS)
    there = (pixel < pixels)[:, None]
    channel = (block * WIDE + tl.arange(0, WIDE))[None, :]
    y += image.to(tl.int64) * height * width * CHANNELS
    out += image.to(tl.int64) * pixels * CHANNELS
    row = mirrored(pixel // across - BORDER, rows)
    column = mirrored(pixel % across - BORDER, columns)
    if (RESAMPLE == 1) | (RESAMPLE == 3):
        source = y + (2 * row * width + 2 * column)[:, None] * CHANNELS + channel
        first = tl.load(source, mask=there, other=0.0).to(tl.float32)
        second = tl.load(source + CHANNELS, mask=there, other=0.0).to(tl.float32)
        third = tl.load(source + width * CHANNELS, mask=there, other=0.0).to(tl.float32)
        fourth = tl.load(source + (width + 1) * CHANNELS, mask=there, other=0.0).to(tl.float32)
        if RESAMPLE == 1:
            value = _largest(_largest(first, second), _largest(third, fourth))
        else:
            value = ((first + second) + (third + fourth)) * 0.25
    else:
        if RESAMPLE == 2:
            row, column = row // 2, column // 2
        value = tl.load(y + (row * width + column)[:, None] * CHANNELS + channel, mask=there, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + channel).to(tl.float32)
    value = _activated(value, NEGATIVE)
    tl.store(out + pixel[:, None] * CHANNELS + channel, value.to(out.dtype.element_ty), mask=there)


@triton.jit
def _activated(value, NEGATIVE: tl.constexpr):
    """What is not a number stays."""
    if NEGATIVE == 0.0:
        value = tl.where(value < 0.0, 0.0, value)
    elif NEGATIVE != 1.0:
        value = tl.where(value < 0.0, value * NEGATIVE, value)
    return value


@triton.jit
def _largest(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _finish_backward(
    grad,
    of_inside,
    known,
    bias,
    result,
    of_bias,
    height,
    width,
    CHANNELS: tl.constexpr,
    GRAD: tl.constexpr,
    INSIDE: tl.constexpr,
    BIAS: tl.constexpr,
    OF_BIAS: tl.constexpr,
    NEGATIVE: tl.constexpr,
    RESAMPLE: tl.constexpr,
    BORDER: tl.constexpr,
    PIXELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    tile, block, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel = (block * WIDE + tl.arange(0, WIDE))[None, :]
    pixel = tile * PIXELS + tl.arange(0, PIXELS)
    if (RESAMPLE == 1) | (RESAMPLE == 3):
        rows, columns = height // 2, width // 2
        there = pixel < rows * columns
        row, column = pixel // columns, pixel % columns
        out_rows, out_columns = rows, columns
    else:
        there = pixel < height * width
        row, column = pixel // width, pixel % width
        if RESAMPLE == 2:
            out_rows, out_columns = height * 2, width * 2
        else:
            out_rows, out_columns = height, width
    across = out_columns + 2 * BORDER
    pixels = (out_rows + 2 * BORDER) * across
    grad += image.to(tl.int64) * pixels * CHANNELS
    slope = tl.zeros([PIXELS, WIDE], tl.float32)
    if GRAD:
        times: tl.constexpr = 2 if RESAMPLE == 2 else 1
        for down in tl.static_range(times):
            for right in tl.static_range(times):
                slope += _gathered(
                    grad,
                    row * times + down,
                    column * times + right,
                    out_rows,
                    out_columns,
                    there,
                    channel,
                    CHANNELS,
                    BORDER,
                )
    if INSIDE:
        of_inside += image.to(tl.int64) * height * width * CHANNELS
        slope += tl.load(of_inside + pixel[:, None] * CHANNELS + channel, mask=there[:, None], other=0.0).to(tl.float32)
    result += image.to(tl.int64) * height * width * CHANNELS
    there = there[:, None]
    if RESAMPLE == 1:
        # To the first of the largest, if ReLU let it pass.
        offset = (2 * row * width + 2 * column)[:, None] * CHANNELS + channel
        known += image.to(tl.int64) * height * width * CHANNELS
        a = tl.load(known + offset, mask=there, other=0.0).to(tl.float32)
        b = tl.load(known + offset + CHANNELS, mask=there, other=0.0).to(tl.float32)
        c = tl.load(known + offset + width * CHANNELS, mask=there, other=0.0).to(tl.float32)
        d = tl.load(known + offset + (width + 1) * CHANNELS, mask=there, other=0.0).to(tl.float32)
        largest = _largest(_largest(a, b), _largest(c, d))
        total = largest
        if BIAS:
            total += tl.load(bias + channel).to(tl.float32)
        if NEGATIVE != 1.0:
            slope = tl.where(total > 0.0, slope, slope * NEGATIVE)
        first = a == largest
        second = (b == largest) & ~first
        third = (c == largest) & ~first & ~second
        fourth = ~first & ~second & ~third
        kind = result.dtype.element_ty
        tl.store(result + offset, tl.where(first, slope, 0.0).to(kind), mask=there)
        tl.store(result + offset + CHANNELS, tl.where(second, slope, 0.0).to(kind), mask=there)
        tl.store(result + offset + width * CHANNELS, tl.where(third, slope, 0.0).to(kind), mask=there)
        tl.store(result + offset + (width + 1) * CHANNELS, tl.where(fourth, slope, 0.0).to(kind), mask=there)
    else:
        if NEGATIVE != 1.0:
            known += image.to(tl.int64) * pixels * CHANNELS
            if RESAMPLE == 2:
                place = (2 * row + BORDER) * across + 2 * column + BORDER
            else:
                place = (row + BORDER) * across + column + BORDER
            value = tl.load(known + place[:, None] * CHANNELS + channel, mask=there, other=0.0)
            slope = tl.where(value > 0.0, slope, slope * NEGATIVE)
        part = slope.to(result.dtype.element_ty)
        if RESAMPLE == 3:
            part = (slope * 0.25).to(result.dtype.element_ty)
            place = result + (2 * row * width + 2 * column)[:, None] * CHANNELS + channel
            tl.store(place, part, mask=there)
            tl.store(place + CHANNELS, part, mask=there)
            tl.store(place + width * CHANNELS, part, mask=there)
            tl.store(place + (width + 1) * CHANNELS, part, mask=there)
        else:
            tl.store(result + pixel[:, None] * CHANNELS + channel, part, mask=there)
    if OF_BIAS:
        line = of_bias + (image * tl.num_programs(0) + tile) * CHANNELS
        tl.store(line + block * WIDE + tl.arange(0, WIDE), tl.sum(tl.where(there, slope, 0.0), 0))


@triton.jit
def _gathered(grad, row, column, rows, columns, there, channel, CHANNELS: tl.constexpr, BORDER: tl.constexpr):
    """Gradient of a pixel: of its own place, and of the places of the border that it was copied to."""
    across = columns + 2 * BORDER
    place = ((row + BORDER) * across + column + BORDER)[:, None] * CHANNELS + channel
    total = tl.load(grad + place, mask=there[:, None], other=0.0).to(tl.float32)
    if BORDER:
        # Line 1 of the map is copied to line 0 of the padded one, the last but one to its last.
        above, below = row == 1, row == rows - 2
        left, right = column == 1, column == columns - 2
        other_row = tl.where(above, 0, rows + 1)
        other_column = tl.where(left, 0, columns + 1)
        vertical, horizontal = there & (above | below), there & (left | right)
        at = (other_row * across + column + BORDER)[:, None] * CHANNELS + channel
        total += tl.load(grad + at, mask=vertical[:, None], other=0.0).to(tl.float32)
        at = ((row + BORDER) * across + other_column)[:, None] * CHANNELS + channel
        total += tl.load(grad + at, mask=horizontal[:, None], other=0.0).to(tl.float32)
        at = (other_row * across + other_column)[:, None] * CHANNELS + channel
        total += tl.load(grad + at, mask=(vertical & horizontal)[:, None], other=0.0).to(tl.float32)
    return total


def of_image(
    image: Tensor, mean: Tensor, std: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """An image's first convolution, ReLU and border: (B, D, H + 2, W + 2) channels_last; and the map inside, a view.

    Its gradient is that of the image alone.

    Args:
        image: (B, 3, H, W) of any layout.
        mean: of 3 values, that the image is normalised with.
        std: likewise.
        weight: (D, 3, 3, 3).
        bias: (D,).
        dtype: of the map, and of what is multiplied.
    """
    out, inside = _OfImage.apply(image, mean, std, weight, bias, dtype)  # type: ignore[no-untyped-call]
    return out, inside


class _OfImage(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image: Tensor, mean: Tensor, std: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        batch, _, height, width = image.shape
        outputs = len(weight)
        shape = (batch, outputs, height + 2, width + 2)
        out = torch.empty(shape, dtype=dtype, device=image.device, memory_format=torch.channels_last)
        pixels = 64
        _of_image[triton.cdiv(shape[2] * shape[3], pixels), triton.cdiv(outputs, 64), batch](
            image,
            mean,
            std,
            weight,
            bias,
            out,
            height,
            width,
            *image.stride(),
            *weight.stride(),
            OUTPUTS=outputs,
            PIXELS=pixels,
            WIDE=min(64, triton.next_power_of_2(outputs)),
        )
        ctx.set_materialize_grads(False)
        ctx.dtype = image.dtype
        ctx.save_for_backward(out, std, weight)
        return out, out[..., 1:-1, 1:-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, of_inside: Tensor | None) -> Any:
        out, std, weight = ctx.saved_tensors
        inside = out.shape[0], out.shape[1], out.shape[2] - 2, out.shape[3] - 2
        of_map, _ = _gradient(grad, of_inside, out, None, inside, 0.0, NONE, True, wanted=False)
        padded = out.new_empty(len(out), 3, *out.shape[2:]).to(memory_format=torch.channels_last)  # of which the shape
        none = [1, 1], [0, 0], [1, 1], False, [0, 0], 1
        of_padded, _, _ = torch.ops.aten.convolution_backward(
            of_map, padded, weight.to(out.dtype), None, *none, [True, False, False]
        )
        for axis in (2, 3):  # a border's gradient goes to the pixels that it was copied from
            last = of_padded.shape[axis] - 1
            for line, source in ((0, 2), (last, last - 2)):
                of_padded.select(axis, source).add_(of_padded.select(axis, line))
        return (of_padded[..., 1:-1, 1:-1].to(ctx.dtype) / std, *[None] * 5)


@triton.jit
def _of_image(
    image,
    mean,
    std,
    weight,
    bias,
    out,
    height,
    width,
    image_stride,
    colour_stride,
    row_stride,
    column_stride,
    output_stride,
    input_stride,
    down_stride,
    right_stride,
    OUTPUTS: tl.constexpr,
    PIXELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    tile, block, index = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    across, pixels = width + 2, (height + 2) * (width + 2)
    pixel = tile * PIXELS + tl.arange(0, PIXELS)
    there = pixel < pixels
    # Three colours of nine pixels, as one sum of 27.
    term = tl.arange(0, 32)
    colour, tap = term % 3, term // 3
    row = mirrored(mirrored(pixel // across - 1, height)[:, None] + (tap // 3 - 1)[None, :], height)
    column = mirrored(mirrored(pixel % across - 1, width)[:, None] + (tap % 3 - 1)[None, :], width)
    image += index.to(tl.int64) * image_stride
    place = (colour * colour_stride)[None, :] + row * row_stride + column * column_stride
    value = tl.load(image + place, mask=there[:, None] & (term < 27)[None, :], other=0.0).to(tl.float32)
    value = (value - tl.load(mean + colour)[None, :]) / tl.load(std + colour)[None, :]
    output = block * WIDE + tl.arange(0, WIDE)
    kernel = (colour * input_stride + tap // 3 * down_stride + tap % 3 * right_stride)[:, None]
    kernel += (output * output_stride)[None, :]
    kernel = tl.load(weight + kernel, mask=(term < 27)[:, None] & (output < OUTPUTS)[None, :], other=0.0)
    kind = out.dtype.element_ty
    result = tl.dot(value.to(kind), kernel.to(kind)) + tl.load(bias + output, mask=output < OUTPUTS, other=0.0)[None, :]
    result = _activated(result, 0.0).to(kind)
    out += index.to(tl.int64) * pixels * OUTPUTS
    tl.store(
        out + pixel[:, None] * OUTPUTS + output[None, :], result, mask=there[:, None] & (output < OUTPUTS)[None, :]
    )


def _by_rows(x: Tensor) -> Tensor:
    """As `statistics` takes it: channels innermost and rows without gaps, which a map inside its border has too."""
    lies = x.stride(1) == 1 and x.stride(3) == x.shape[1]
    return x if lies else x.contiguous(memory_format=torch.channels_last)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, H, W), a channels_last map or one without its border -> mean and variance, (B, C) float32."""
    x = _by_rows(x)
    batch, channels, height, width = x.shape
    pixels, wide = _block(channels)
    pixels //= 2
    parts = max(1, min(2048 * wide // (batch * channels), height * width // pixels, 512))
    part = triton.cdiv(height * width, parts)
    parts = triton.cdiv(height * width, part)
    partial = x.new_empty(batch, parts, 2, channels, dtype=torch.float32)
    mean, variance = (x.new_empty(batch, channels, dtype=torch.float32) for _ in range(2))
    _statistics[channels // wide, parts, batch](
        x, partial, height * width, width, x.stride(0), x.stride(2), part, CHANNELS=channels, PIXELS=pixels, WIDE=wide
    )
    _whole_statistics[channels // _WIDE, batch](
        partial,
        mean,
        variance,
        height * width,
        part,
        parts,
        CHANNELS=channels,
        PARTS=triton.next_power_of_2(parts),
        WIDE=_WIDE,
    )
    return mean, variance


@triton.jit
def _statistics(
    x,
    partial,
    pixels,
    width,
    image_stride,
    row_stride,
    part,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Mean, and sum of squared deviations from it, of a part of a map."""
    block, index, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel = block * WIDE + tl.arange(0, WIDE)
    x += image.to(tl.int64) * image_stride
    first, last = index * part, tl.minimum((index + 1) * part, pixels)
    # Sums of differences from one of the values: squares of values far from zero would lose their digits.
    origin = tl.load(x + first // width * row_stride + first % width * CHANNELS + channel).to(tl.float32)
    total = tl.zeros([PIXELS, WIDE], tl.float32)
    squares = tl.zeros([PIXELS, WIDE], tl.float32)
    for start in range(first, last, PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        there = (pixel < last)[:, None]
        place = pixel // width * row_stride + pixel % width * CHANNELS
        value = tl.load(x + place[:, None] + channel[None, :], mask=there, other=0.0).to(tl.float32)
        difference = tl.where(there, value - origin[None, :], 0.0)
        total += difference
        squares += difference * difference
    count = tl.maximum(last - first, 1).to(tl.float32)
    shift = tl.sum(total, 0) / count
    partial += ((image * tl.num_programs(1) + index) * 2) * CHANNELS
    tl.store(partial + channel, origin + shift)
    tl.store(partial + CHANNELS + channel, tl.maximum(tl.sum(squares, 0) - count * shift * shift, 0.0))


@triton.jit
def _whole_statistics(
    partial, mean, variance, pixels, part, parts, CHANNELS: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr
):
    """Those of the parts as one."""
    block, image = tl.program_id(0), tl.program_id(1)
    channel = block * WIDE + tl.arange(0, WIDE)
    index = tl.arange(0, PARTS)[:, None]
    partial += image * parts * 2 * CHANNELS
    count = tl.maximum(tl.minimum(part, pixels - index * part), 0).to(tl.float32)
    line = partial + 2 * index * CHANNELS + channel[None, :]
    means = tl.load(line, mask=index < parts, other=0.0)
    squares = tl.load(line + CHANNELS, mask=index < parts, other=0.0)
    count = tl.where(index < parts, count, 0.0)
    middle = tl.sum(count * means, 0) / pixels
    away = means - middle[None, :]
    tl.store(mean + image * CHANNELS + channel, middle)
    tl.store(variance + image * CHANNELS + channel, tl.sum(squares + count * away * away, 0) / pixels)


def affine(x: Tensor, slope: Tensor, constant: Tensor) -> Tensor:
    """X (B, C, H, W) as `statistics` takes it, slope and constant (B, C) float32 -> slope x + constant, as x."""
    x = _by_rows(x)
    batch, channels, height, width = x.shape
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    pixels, wide = _block(channels)
    _affine[triton.cdiv(height * width, pixels), channels // wide, batch](
        x,
        slope.contiguous(),
        constant.contiguous(),
        result,
        height * width,
        width,
        x.stride(0),
        x.stride(2),
        CHANNELS=channels,
        PIXELS=pixels,
        WIDE=wide,
    )
    return result


@triton.jit
def _affine(
    x,
    slope,
    constant,
    result,
    pixels,
    width,
    image_stride,
    row_stride,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    tile, block, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel = block * WIDE + tl.arange(0, WIDE)
    pixel = tile * PIXELS + tl.arange(0, PIXELS)
    there = (pixel < pixels)[:, None]
    place = pixel // width * row_stride + pixel % width * CHANNELS
    value = tl.load(x + image.to(tl.int64) * image_stride + place[:, None] + channel[None, :], mask=there, other=0.0)
    line = value.to(tl.float32) * tl.load(slope + image * CHANNELS + channel)[None, :]
    line += tl.load(constant + image * CHANNELS + channel)[None, :]
    result += image.to(tl.int64) * pixels * CHANNELS
    tl.store(result + pixel[:, None] * CHANNELS + channel[None, :], line.to(result.dtype.element_ty), mask=there)
