from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from adaconv.errors import WeightsError
from adaconv.model.encoder import THEN, ReflectConv2d, VGGEncoder
from adaconv.model.encoder_weights import (
    cached_file,
    fingerprint,
    load_encoder,
    normalisation_of,
    normalise_encoder,
    require_source,
)

WIDTHS = (8, 16, 24, 32)


def torchvision_trunk():
    """The layers as torchvision numbers them, up to relu4_1 and one further convolution."""
    layers, channels = [], 3
    for width, count in zip(WIDTHS, (2, 2, 4, 2), strict=True):
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1, padding_mode="reflect"), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers)


def normalised_trunk():
    """The layers as AdaIN's `vgg_normalised` numbers them: every padding is one, and a 1x1 convolution comes first."""
    layers, channels = [nn.Conv2d(3, 3, 1)], 3
    for group, (width, count) in enumerate(zip(WIDTHS, (2, 2, 4, 1), strict=True)):
        if group:
            layers.append(nn.MaxPool2d(2, 2, ceil_mode=True))
        for _ in range(count):
            layers += [nn.ReflectionPad2d(1), nn.Conv2d(channels, width, 3), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers)


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_torchvision_weights_give_torchvision_features(tmp_path, images, suffix):
    trunk = torchvision_trunk()
    saved = {f"features.{name}": value for name, value in trunk.state_dict().items()}
    saved["classifier.0.weight"] = torch.zeros(4, 4)
    path = tmp_path / f"vgg{suffix}"
    if suffix == ".pth":
        torch.save(saved, path)
    else:
        save_file(saved, path)
    encoder = load_encoder(str(path), widths=WIDTHS)
    x = (images - encoder.mean) / encoder.std
    wanted = []
    for index, layer in enumerate(trunk[:21]):
        x = layer(x)
        if index in (1, 6, 11, 20):  # relu1_1, relu2_1, relu3_1, relu4_1
            wanted.append(x)
    for ours, theirs in zip(encoder(images), wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_normalised_weights_give_the_features_of_their_own_network(tmp_path, images):
    trunk = normalised_trunk()
    torch.save(trunk.state_dict(), tmp_path / "vgg_normalised.pth")
    encoder = load_encoder(str(tmp_path / "vgg_normalised.pth"), widths=WIDTHS)
    torch.testing.assert_close(encoder(images)[-1], trunk[:31](images), rtol=1e-4, atol=1e-6)


def test_real_layer_numbers_end_at_relu4_1():
    """The names this project knows are those of convolutions, the last of them before the 512 channels' ReLU."""
    for trunk, names in ((torchvision_trunk(), "_TORCHVISION"), (normalised_trunk(), "_NORMALISED")):
        from adaconv.model import encoder_weights

        positions = [int(name.removeprefix("features.")) for name in getattr(encoder_weights, names)]
        assert all(isinstance(trunk[position], nn.Conv2d) for position in positions)
        assert trunk[positions[-1]].out_channels == WIDTHS[-1]
        assert [trunk[p].out_channels for p in positions] == [
            w for w, n in zip(WIDTHS, (2, 2, 4, 1), strict=True) for _ in range(n)
        ]


def test_other_names_and_shapes_are_refused_by_name(tmp_path):
    save_file({"stem.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"expected VGG-19 weights named .* found stem\.weight"):
        load_encoder(str(tmp_path / "other.safetensors"), widths=WIDTHS)
    saved = {f"features.{name}": value for name, value in torchvision_trunk().state_dict().items()}
    torch.save(saved, tmp_path / "narrow.pth")
    with pytest.raises(WeightsError, match=r"features\.0\.weight of shape \(64, 3, 3, 3\), found \(8, 3, 3, 3\)"):
        load_encoder(str(tmp_path / "narrow.pth"))
    del saved["features.19.bias"]
    torch.save(saved, tmp_path / "short.pth")
    with pytest.raises(WeightsError, match=r"expected a tensor features\.19\.bias, found none"):
        load_encoder(str(tmp_path / "short.pth"), widths=WIDTHS)


class _Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_pickle_is_not_executed(tmp_path, capsys):
    torch.save({"features.0.weight": _Evil()}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match=r"safe to read \(it holds other objects"):
        load_encoder(str(tmp_path / "evil.pth"), widths=WIDTHS)
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("data", [b"", b"hello world", b"<html>", b"PK\x03\x04", b"\x80\x02."])
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_what_is_no_file_of_weights_is_refused_by_name(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(WeightsError, match=rf"{name} is no file of weights that is safe to read \("):
        load_encoder(str(tmp_path / name), widths=WIDTHS)


def test_without_internet_it_says_where_to_put_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("adaconv.download._ATTEMPTS", 1)
    monkeypatch.setattr("adaconv.model.encoder_weights.IMAGENET_URL", "http://127.0.0.1:9/vgg19-dcbb9e9d.pth")
    with pytest.raises(WeightsError) as raised:
        load_encoder("imagenet")
    assert str(tmp_path / "adaconv" / "vgg19-dcbb9e9d.pth") in str(raised.value)
    assert "seeded:0" in str(raised.value)


def test_two_urls_of_one_file_name_have_two_places(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cached_file("https://a.org/model.pth") != cached_file("https://b.org/model.pth")
    assert cached_file("https://a.org/model.pth#sha256=abcd1234") == cached_file("https://a.org/model.pth")


def test_a_query_is_no_part_of_a_files_name(monkeypatch, tmp_path):
    """`.safetensors?download=true` would be read as a pickle, and a long one is no name at all."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for query in ("download=true", f"revision={'0' * 400}&path=a/b"):
        assert cached_file(f"https://a.org/vgg.safetensors?{query}#sha256=abcd1234").name == "vgg.safetensors"


@pytest.mark.parametrize("home", ["", "relative/cache"])
def test_a_cache_that_is_nowhere_is_that_of_the_home(monkeypatch, tmp_path, home):
    """As XDG has it; each process would have had one in its working directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    assert cached_file("imagenet").parent == tmp_path / ".cache" / "adaconv"


_URL = "http://127.0.0.1:9/vgg.pth#"


@pytest.mark.parametrize(
    "spec",
    [
        *("seeded:", "seeded:x", "seeded:-1", "seeded:²", "seeded:10000000000000000000", "no/such", ""),
        *(
            f"{_URL}{pin}"
            for pin in ("", "sha256=", "sha256:abcd1234", "sha-256=abcd1234", "sha256=abcd", "sha256=xbcd1234")
        ),
    ],
)
def test_a_wrong_spec_is_answered(spec):
    """A pin that is misspelt would check nothing."""
    for ask in (require_source, partial(load_encoder, widths=WIDTHS)):
        with pytest.raises(WeightsError, match="expected"):
            ask(spec)


def test_a_pin_may_be_in_capitals():
    require_source(f"{_URL}SHA256=ABCD1234")


def test_a_seed_is_a_network():
    one, again, other = (load_encoder(f"seeded:{seed}", widths=WIDTHS) for seed in (0, 0, 1))
    assert fingerprint(one) == fingerprint(again) != fingerprint(other)


def test_seeded_features_tell_images_apart():
    """Channels neither die nor grow alike: over noise the deepest map has some variance in every channel."""
    encoder = load_encoder("seeded:0", widths=(8, 16, 32, 64))
    features = encoder(torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)))[-1]
    assert (features.var(dim=(0, 2, 3)) > 0).float().mean() > 0.9


def test_normalised_features_are_the_old_ones_times_a_factor_per_channel(images):
    encoder, images = load_encoder("seeded:3", widths=WIDTHS).double(), images.double()
    before = list(encoder._maps(images))
    normalise_encoder(encoder, [images[:1], images[1:]])
    for old, new, step in zip(before, encoder._maps(images), THEN, strict=True):
        factor = new.mean(dim=(0, 2, 3)) / old.mean(dim=(0, 2, 3)).clamp(min=1e-12)
        torch.testing.assert_close(new, old * factor.view(1, -1, 1, 1), rtol=1e-9, atol=1e-9)
        if step == "pool":  # which raises the mean
            continue
        alive = old.mean(dim=(0, 2, 3)) > 0.1 * old.mean()
        torch.testing.assert_close(new.mean(dim=(0, 2, 3))[alive], torch.ones(int(alive.sum())).double())


def test_it_is_known_which_weights_an_encoder_was_made_of(images):
    """Whatever it was normalised over; and not where a layer has others."""
    seeded = [load_encoder("seeded:0", widths=WIDTHS) for _ in range(4)]
    for encoder, part in zip(seeded[1:], (images[:1], images[1:], images), strict=True):
        normalise_encoder(encoder, [part])
    assert [normalisation_of(encoder, seeded[0]) for encoder in seeded] == ["none", "data", "data", "data"]
    assert normalisation_of(seeded[1], seeded[2]) == "data"
    assert normalisation_of(load_encoder("seeded:1", widths=WIDTHS), seeded[0]) is None
    with torch.no_grad():
        seeded[3].convs[-1].bias[0] += seeded[3].convs[-1].weight[0].norm()
    assert normalisation_of(seeded[3], seeded[0]) is None


@pytest.mark.parametrize("autocast", [False, True])
def test_a_reflect_convolution_is_torchs(autocast):
    """Outputs to the bit; gradients of bfloat16 up to its rounding."""
    torch.manual_seed(0)
    theirs = nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")
    ours = ReflectConv2d(4, 6)
    ours.load_state_dict(theirs.state_dict())
    results = []
    for conv in (ours, theirs):
        x = torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(0))
        x = (x.bfloat16() if autocast else x).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = conv(x)
        out.float().square().sum().backward()
        results.append((out, x.grad, conv.weight.grad, conv.bias.grad))
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-2 if autocast else 0, atol=1e-2 if autocast else 0)
    assert torch.equal(results[0][0], results[1][0])


def test_the_encoder_is_frozen_and_lets_gradients_through(images):
    encoder = VGGEncoder(widths=WIDTHS).train()
    assert not encoder.training
    assert not [p for p in encoder.parameters() if p.requires_grad]
    pixels = images.clone().requires_grad_()
    encoder(pixels)[-1].sum().backward()
    assert pixels.grad.abs().sum() > 0
