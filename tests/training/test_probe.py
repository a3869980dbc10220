"""The pictures that a run is watched by: of its datasets, or of folders that the user names."""

import pytest
import torch
from PIL import Image

from adaconv.errors import UsageError
from adaconv.images import ORIENTATION
from adaconv.model.encoder_weights import load_encoder
from adaconv.model.network import build_network
from adaconv.training.probe import given_squares, probe_of, squares_of_folder, squares_of_version
from tests.training.runs import config_of

SIDE, GAP = 32, 4
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def paint(path, width, height, colour):
    """A picture with a black frame beyond the square of its middle."""
    short = min(width, height)
    picture = Image.new("RGB", (width, height))
    picture.paste(colour, ((width - short) // 2, (height - short) // 2, (width + short) // 2, (height + short) // 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


@pytest.fixture
def pictures(tmp_path):
    """By path: red and wide, blue and tall in a folder, green lying on its side, transparent."""
    paint(tmp_path / "a.png", 96, 64, RED)
    paint(tmp_path / "b" / "blue.png", 40, 200, BLUE)
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    half = Image.new("RGB", (64, 64), "black")
    half.paste((0, 255, 0), (0, 0, 32, 64))  # left; it is shown on top
    half.save(tmp_path / "c.png", exif=turned)
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "d.png")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def inner(square):
    """Without the edge, where the frame beyond it shows by the kernel's width."""
    return square[2:-2, 2:-2]


def cell(grid, down, across):
    step = SIDE + GAP
    return grid[down * step : down * step + SIDE, across * step : across * step + SIDE]


def test_the_first_of_a_folder_by_path_are_shown_as_seen(pictures):
    squares = squares_of_folder(str(pictures), 9, side=SIDE, flag="--x")
    assert [square.shape for square in squares] == [(3, SIDE, SIDE)] * 4  # all, where there are fewer
    seen = torch.stack(squares).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert (inner(seen[0]) == torch.tensor(RED)).all()
    assert (inner(seen[1]) == torch.tensor(BLUE)).all()
    assert (seen[2, : SIDE // 2 - 2] == torch.tensor((0, 255, 0))).all()
    assert not seen[2, SIDE // 2 + 2 :].any()
    assert (seen[3] == torch.tensor(WHITE)).all()
    first = squares_of_folder(str(pictures), 2, side=SIDE, flag="--x")
    assert len(first) == 2
    assert torch.equal(first[1], squares[1])


def test_a_picture_of_a_large_camera_is_taken(tmp_path):
    Image.new("1", (9000, 7000), 1).save(tmp_path / "a.png")
    assert squares_of_folder(str(tmp_path), 1, side=SIDE, flag="--x")[0].min() == 1


def test_the_grid_is_of_the_named_folders(content_version, style_version, pictures):
    given = {"contents_from": str(pictures), "sample_contents": 2, "sample_styles": 3}
    config = config_of(content_version, style_version, tracking=given)
    probe = probe_of(config, content_version, style_version)
    encoder = load_encoder(config.encoder.weights, widths=config.encoder.widths)
    grid = probe.look(build_network(encoder=encoder, **config.model.model_dump()), config.loss).grid
    assert grid.shape == (3 * SIDE + 2 * GAP, 4 * SIDE + 3 * GAP, 3)
    assert (inner(cell(grid, 1, 0)) == RED).all()
    assert (inner(cell(grid, 2, 0)) == BLUE).all()
    of_data = squares_of_version(style_version, 3, side=SIDE)
    for across, square in enumerate(of_data, start=1):
        shown = torch.from_numpy(cell(grid, 0, across).copy()).permute(2, 0, 1)
        assert torch.equal(shown, square.mul(255).round().to(torch.uint8))


def test_the_first_of_a_dataset_are_the_same_each_time_and_those_of_a_larger_grid(content_version):
    two, three = (squares_of_version(content_version, count, side=SIDE) for count in (2, 3))
    assert all(torch.equal(a, b) for a, b in zip(two, three, strict=False))
    assert not torch.equal(three[1], three[2])


def test_flat_pictures_can_be_looked_at(content_version, style_version, tmp_path):
    paint(tmp_path / "white" / "a.png", 64, 64, WHITE)
    shown = {"contents_from": str(tmp_path / "white"), "styles_from": str(tmp_path / "white")}
    config = config_of(content_version, style_version, tracking=shown)
    network = build_network(encoder=load_encoder("seeded:0", widths=config.encoder.widths), **config.model.model_dump())
    look = probe_of(config, content_version, style_version, cache=None).look(network, config.loss)
    assert all(torch.tensor(list(look.metrics.values())).isfinite())


def test_what_cannot_be_shown_is_refused_by_name(content_version, style_version, pictures):
    (pictures / "b" / "broken.jpg").write_bytes(b"\xff\xd8\xff no more")
    config = config_of(content_version, style_version, tracking={"styles_from": str(pictures), "sample_styles": 3})
    with pytest.raises(UsageError, match=r"--tracking.styles-from .*: expected images, found b/broken.jpg: damaged_h"):
        given_squares(config)
    config = config_of(content_version, style_version, tracking={"contents_from": str(pictures / "nothing")})
    with pytest.raises(UsageError, match=r"--tracking.contents-from .*nothing: expected a folder of images"):
        given_squares(config)
