"""The kernels for GPUs against torch's operators: on a GPU as they run there, elsewhere in Triton's interpreter.

The interpreter knows no bfloat16 products, so float32 shows there that they compute the right thing; and the compiler,
which needs no GPU, that they compile.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from adaconv.model import adaptive_conv_gpu, maps_gpu
from adaconv.model.adaptive_conv import adaptive_conv
from adaconv.model.encoder import ReflectConv2d, VGGEncoder, convolve
from adaconv.model.kernels import EPS, AdaConvKernels

REPO = Path(__file__).resolve().parents[2]
ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE, TOLERANCE = ("cuda", torch.bfloat16, 4e-3) if ON_GPU else ("cpu", torch.float32, 1e-5)
RESAMPLE = [maps_gpu.NONE, maps_gpu.POOL, maps_gpu.UPSAMPLE, maps_gpu.AVERAGE]
gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def a_map(*shape):
    drawn = torch.randn(*shape, device=DEVICE).mul_(2).add_(1).to(DTYPE)
    return drawn.to(memory_format=torch.channels_last).requires_grad_()


def relative(ours, wanted):
    return ((ours.double() - wanted.double()).norm() / wanted.double().norm()).item()


def double(*tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("border", [False, True])
@pytest.mark.parametrize("resample", RESAMPLE)
@pytest.mark.parametrize("negative", [0.0, 0.01, 1.0])
@pytest.mark.parametrize(("height", "width"), [(9, 12)])
def test_finish_is_what_torch_does_in_several_passes(height, width, negative, resample, border):
    if resample == maps_gpu.AVERAGE:
        height += height % 2
    y, bias = a_map(2, 32, height, width), torch.randn(32, device=DEVICE, requires_grad=True)
    ours = maps_gpu.finish(y, bias, negative=negative, resample=resample, border=border)
    slope = torch.randn_like(ours)
    ours.backward(slope)
    plain_y, plain_bias = double(y, bias)
    wanted = finish_of_torch(plain_y, plain_bias, negative, resample, border)
    wanted.backward(slope.double())
    assert ours.shape == wanted.shape
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert relative(ours, wanted) < TOLERANCE
    assert relative(y.grad, plain_y.grad) < TOLERANCE
    assert relative(bias.grad, plain_bias.grad) < TOLERANCE


def finish_of_torch(y, bias, negative, resample, border):
    x = y + bias[:, None, None]
    if resample == maps_gpu.AVERAGE:
        x = F.avg_pool2d(x, 2)
    x = F.leaky_relu(x, negative)
    if resample == maps_gpu.POOL:
        x = F.max_pool2d(x, 2)
    elif resample == maps_gpu.UPSAMPLE:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    return F.pad(x, (1,) * 4, mode="reflect") if border else x


def test_the_map_inside_a_border_has_a_gradient_of_its_own():
    y, bias = a_map(2, 16, 7, 9), torch.randn(16, device=DEVICE, requires_grad=True)
    padded, inside = maps_gpu.finish_and_tap(y, bias)
    slopes = torch.randn_like(padded), torch.randn_like(inside)
    torch.autograd.backward([padded, inside], slopes)
    plain_y, plain_bias = double(y, bias)
    wanted = F.relu(plain_y + plain_bias[:, None, None])
    torch.autograd.backward([F.pad(wanted, (1,) * 4, mode="reflect"), wanted], [slope.double() for slope in slopes])
    assert relative(inside, wanted) < TOLERANCE
    assert relative(y.grad, plain_y.grad) < TOLERANCE
    assert relative(bias.grad, plain_bias.grad) < TOLERANCE


def test_what_is_not_a_number_stays_so():
    y = a_map(1, 16, 6, 6).detach()
    y[0, 3, 2, 2] = torch.nan
    for resample in RESAMPLE:
        assert maps_gpu.finish(y, negative=0.0, resample=resample)[0, 3].isnan().any()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_an_image_s_first_convolution(layout):
    image = torch.rand(2, 3, 9, 13, device=DEVICE).contiguous(memory_format=layout).requires_grad_()
    mean, std = torch.rand(1, 3, 1, 1, device=DEVICE), torch.rand(1, 3, 1, 1, device=DEVICE) + 0.5
    # Far from zero, where rounding would let a pixel pass ReLU or not.
    weight, bias = torch.randn(32, 3, 3, 3, device=DEVICE), torch.full((32,), 60.0, device=DEVICE)
    bias[::2] = -60
    padded, inside = maps_gpu.of_image(image, mean, std, weight, bias, DTYPE)
    slopes = torch.randn_like(padded), torch.randn_like(inside)
    torch.autograd.backward([padded, inside], slopes)
    (plain,) = double(image)
    seen = F.pad((plain - mean) / std, (1,) * 4, mode="reflect")
    wanted = F.relu(F.conv2d(seen, weight.double(), bias.double()))
    torch.autograd.backward([F.pad(wanted, (1,) * 4, mode="reflect"), wanted], [slope.double() for slope in slopes])
    assert relative(inside, wanted) < 2 * TOLERANCE  # images and weights are rounded too
    assert relative(image.grad, plain.grad) < 2 * TOLERANCE


@pytest.mark.parametrize("inside", [False, True])
def test_statistics_keep_their_digits_far_from_zero(inside):
    x = a_map(2, 32, 14, 15).detach() + 100
    x = x[..., 1:-1, 1:-1] if inside else x
    mean, variance = maps_gpu.statistics(x)
    torch.testing.assert_close(mean, x.double().mean((2, 3)).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance, x.double().var((2, 3), correction=0).float(), rtol=1e-4, atol=0)
    slope, constant = torch.randn(2, 2, 32, device=DEVICE)
    wanted = x.double() * slope[..., None, None] + constant[..., None, None]
    assert relative(maps_gpu.affine(x, slope, constant), wanted) < TOLERANCE


# One to sixteen channels a group; sides of a few pixels, of less and of more than a strip, odd ones.
@pytest.mark.parametrize(
    ("channels", "groups", "height", "width"),
    [(32, 32, 9, 11), (16, 8, 20, 70), (32, 8, 5, 37), (64, 8, 4, 5), (16, 1, 5, 4)],
)
def test_the_adaptive_convolution_and_its_gradients(channels, groups, height, width):
    x, per_group = a_map(2, channels, height, width), channels // groups
    weight = torch.randn(2, channels, per_group, 3, 3, device=DEVICE, requires_grad=True)
    bias = torch.randn(2, channels, device=DEVICE, requires_grad=True)
    ours = adaptive_conv_gpu.adaptive_conv(x, weight, bias, DTYPE)
    slope = torch.randn_like(ours)
    ours.backward(slope)
    plain = double(x, weight, bias)
    wanted = torch.cat([of_one_image(*one, groups) for one in zip(*plain, strict=True)])
    wanted.backward(slope.double())
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert relative(ours, wanted) < TOLERANCE
    for leaf, other in zip((x, weight, bias), plain, strict=True):
        assert relative(leaf.grad, other.grad) < TOLERANCE


def of_one_image(x, weight, bias, groups):
    normal = (x - x.mean((1, 2), keepdim=True)) / (x.var((1, 2), keepdim=True, correction=0) + EPS).sqrt()
    return F.conv2d(F.pad(normal[None], (1,) * 4, mode="reflect"), weight, bias, groups=groups)


def test_constant_channels_give_the_bias():
    x = torch.full((1, 16, 8, 8), 3.7, device=DEVICE).to(DTYPE)
    bias = torch.randn(1, 16, device=DEVICE)
    out = adaptive_conv_gpu.adaptive_conv(x, torch.randn(1, 16, 1, 3, 3, device=DEVICE), bias, DTYPE)
    torch.testing.assert_close(out.float(), bias[..., None, None].expand_as(out), rtol=1e-2, atol=1e-2)


def test_maps_that_32_bits_cannot_number_are_left_to_torch():
    cuda = torch.device("cuda")
    assert maps_gpu.takes(cuda, torch.bfloat16, [64], (4096, 4096), largest=64 * 4096**2)
    assert not maps_gpu.takes(cuda, torch.bfloat16, [64], (4097, 4096), largest=64 * 4097 * 4096)
    assert not maps_gpu.takes(cuda, torch.bfloat16, [64, 24], (8, 8), largest=64 * 64)
    assert not maps_gpu.takes(cuda, torch.bfloat16, [64], (8, 3), largest=64 * 24)
    assert not maps_gpu.takes(torch.device("cpu"), torch.bfloat16, [64], (8, 8), largest=64 * 64)


COMPILE = """
import itertools, torch, triton
from triton.compiler import ASTSource
from triton.backends.compiler import GPUTarget
from adaconv.model import adaptive_conv_gpu, maps_gpu

def compiled(kernel, architecture, **constants):
    floats = ("mean", "std", "scale", "weight", "constant", "slope", "partial", "variance", "of_weight", "of_bias")
    maps = ("x", "y", "out", "grad", "of_inside", "known", "result", "other", "blocks", "image")
    kinds = {name: "*fp32" if name in (*floats, "bias") else "*bf16" if name in maps else "i32"
             for name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else kind for name, kind in kinds.items()}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    triton.compile(source, target=GPUTarget("cuda", architecture, 32))

for architecture in (80, 90):
    sizes = {"CHANNELS": 64, "PIXELS": 64, "WIDE": 64}
    for resample, border, some in itertools.product((0, 1, 2, 3), (0, 1), (False, True)):
        steps = {"RESAMPLE": resample, "BORDER": border, "NEGATIVE": 0.01, **sizes}
        compiled(maps_gpu._finish, architecture, BIAS=some, **steps)
        compiled(maps_gpu._finish_backward, architecture, GRAD=True, INSIDE=some, BIAS=some, OF_BIAS=some, **steps)
    compiled(maps_gpu._of_image, architecture, OUTPUTS=64, PIXELS=64, WIDE=64)
    compiled(maps_gpu._statistics, architecture, **sizes)
    compiled(maps_gpu._affine, architecture, **sizes)
    compiled(maps_gpu._whole_statistics, architecture, CHANNELS=64, PARTS=64, WIDE=16)
    for columns, adjoint in ((32, False), (64, False), (64, True)):
        compiled(adaptive_conv_gpu._join, architecture, CHANNELS=64, PER_GROUP=8, ADJOINT=adjoint)
        steps = {"CHANNELS": 64, "COLUMNS": columns, "STAGES": 1}
        compiled(adaptive_conv_gpu._convolution, architecture, ADJOINT=adjoint, **steps)
        compiled(adaptive_conv_gpu._weight_gradient, architecture, BATCH=8, PER_GROUP=8, **steps)
    compiled(adaptive_conv_gpu._mirrored_gradient, architecture, CHANNELS=64, PIXELS=64)
print("compiled")
"""


def test_the_kernels_compile():
    """For Ampere and Hopper, without either: the interpreter accepts much that the compiler does not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.stdout == "compiled\n", done.stderr[-3000:]


@gpu
@pytest.mark.gpu
def test_the_encoder_and_a_chain_of_convolutions_use_them_and_change_nothing_but_rounding():
    encoder = VGGEncoder(widths=(16, 32, 32, 64)).cuda().to(memory_format=torch.channels_last)
    image = torch.rand(2, 3, 72, 80, device="cuda")
    wanted = encoder.double()(image.double())
    with torch.autocast("cuda", torch.bfloat16):
        ours = encoder.float()(image)
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == torch.bfloat16
        assert relative(a, b) < 2e-2
    convs = [ReflectConv2d(64, 32).cuda(), ReflectConv2d(32, 3).cuda()]
    x = a_map(2, 64, 9, 10)
    with torch.autocast("cuda", torch.bfloat16):
        *_, up = convolve(x, convs[:1], ["upsample"])
        *_, last = convolve(up, convs[1:], ["last"])
    plain = F.interpolate(F.relu(convs[0].double()(x.double())), scale_factor=2.0, mode="nearest")
    assert relative(up, plain) < 2e-2
    assert relative(last, convs[1].double()(plain)) < 2e-2


@gpu
@pytest.mark.gpu
def test_the_network_s_convolution_takes_them_where_they_suit():
    x = a_map(2, 64, 16, 16)
    kernels = AdaConvKernels(*(torch.randn(2, 64, *shape, device="cuda") for shape in ((8, 3, 3), (8, 1, 1), ())))
    with torch.autocast("cuda", torch.bfloat16):
        assert adaptive_conv(x, kernels, groups=8).dtype == torch.bfloat16
        odd = adaptive_conv(x[:, :24], AdaConvKernels(*(k[:, :24] for k in kernels)), groups=3)
    assert odd.dtype == torch.float32  # 24 channels do not suit; in 16 bits cuDNN would be far slower
