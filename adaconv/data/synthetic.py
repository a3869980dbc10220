"""Generated images for the demo and the tests: scenes like photographs, textures like paintings.

Drawn with numpy alone from a seed, so the same seed gives the same bytes. Varied enough that one can see a style
arrive: palettes, stroke directions, grain and contrast differ between paintings, and content between scenes.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Array = NDArray[np.float64]

# Five colours each, (R, G, B) in 0 ... 255, dark to light: names are for readers only.
_PALETTES = (
    ((12, 28, 72), (28, 78, 148), (70, 140, 190), (228, 190, 76), (250, 236, 170)),  # night sky
    ((60, 20, 16), (150, 48, 30), (214, 110, 44), (240, 176, 86), (250, 226, 180)),  # embers
    ((16, 44, 28), (44, 92, 52), (110, 150, 74), (190, 198, 120), (238, 236, 206)),  # meadow
    ((44, 18, 60), (110, 40, 120), (190, 84, 150), (236, 150, 170), (252, 222, 214)),  # dusk
    ((20, 20, 22), (78, 76, 74), (136, 132, 126), (190, 186, 178), (240, 236, 226)),  # charcoal
    ((8, 60, 74), (20, 120, 130), (96, 178, 168), (236, 214, 150), (246, 244, 230)),  # shore
    ((120, 10, 20), (230, 40, 40), (250, 200, 30), (30, 80, 180), (246, 244, 238)),  # primaries
    ((54, 36, 22), (110, 78, 48), (160, 126, 84), (206, 180, 138), (240, 226, 200)),  # sepia
)


def generate_photos(directory: Path, count: int, *, seed: int, size: int = 288) -> None:
    """Write `photo_00000.jpg` ...: landscapes, streets and still lifes, shorter side `size` pixels."""
    _generate(directory, "photo", count, seed, size, (_landscape, _street, _still_life))


def generate_paintings(directory: Path, count: int, *, seed: int, size: int = 288) -> None:
    """Write `painting_00000.jpg` ...: strokes, dots, swirls, blocks and hatching, shorter side `size` pixels."""
    _generate(directory, "painting", count, seed, size, (_strokes, _dots, _swirls, _blocks, _hatching))


def _generate(
    directory: Path,
    name: str,
    count: int,
    seed: int,
    size: int,
    motifs: tuple[Callable[[np.random.Generator, int, int], Image.Image], ...],
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        rng = np.random.default_rng([seed, len(name), index])
        long = int(size * rng.choice([1.0, 1.25, 1.33, 1.5]))
        width, height = (long, size) if rng.random() < 0.65 else (size, long)
        image = motifs[index % len(motifs)](rng, width, height)
        image.save(directory / f"{name}_{index:05d}.jpg", quality=92)


def _landscape(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Sky with a sun and clouds, ridges that pale with distance, a field."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    top, bottom = rng.uniform([40, 70, 130], [120, 150, 230]), rng.uniform([180, 150, 120], [255, 225, 210])
    fade = (y / y.max())[..., None]
    sky = top * (1 - fade) + bottom * fade
    clouds = np.clip(_noise(rng, height, width, 4) * 2 - 0.9, 0, 1)[..., None]
    sky = sky * (1 - 0.7 * clouds) + 250 * 0.7 * clouds
    sun = np.hypot(x - rng.uniform(0.1, 0.9), y - rng.uniform(0.05, 0.25))
    sky += np.exp(-((sun / 0.12) ** 2))[..., None] * 70 + (sun < 0.045)[..., None] * 90
    picture = sky
    ridges = int(rng.integers(2, 5))
    earth = rng.uniform([20, 50, 20], [110, 110, 70])
    for ridge in range(ridges):
        near = (ridge + 1) / ridges
        line = height * (0.35 + 0.4 * near) + height * 0.12 * (_wave(rng, width, 3 + 3 * ridge) - 0.5)
        inside = (np.arange(height)[:, None] > line[None, :])[..., None]
        colour = earth * near + bottom * 0.75 * (1 - near)
        shade = 0.75 + 0.5 * _noise(rng, height, width, 24)[..., None]
        picture = np.where(inside, colour * shade, picture)
    return _finish(rng, picture)


def _street(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Houses with lit and dark windows along a street, under a plain sky."""
    fade = np.linspace(0, 1, height)[:, None, None]
    sky = rng.uniform(60, 200, 3) * (1 - fade) + rng.uniform(170, 250, 3) * fade
    image = Image.fromarray(np.broadcast_to(sky, (height, width, 3)).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    ground = int(height * rng.uniform(0.78, 0.9))
    left = 0
    while left < width:
        wide = int(width * rng.uniform(0.1, 0.24))
        roof = int(height * rng.uniform(0.15, 0.6))
        wall = rng.uniform(50, 210, 3)
        draw.rectangle((left, roof, left + wide, ground), fill=_rgb(wall))
        draw.rectangle((left + wide * 0.86, roof, left + wide, ground), fill=_rgb(wall * 0.7))
        if rng.random() < 0.5:
            gable = [(left, roof), (left + wide / 2, roof - wide * 0.4), (left + wide, roof)]
            draw.polygon(gable, fill=_rgb(wall * 0.5))
        cell = max(8, wide // int(rng.integers(3, 6)))
        for top in range(roof + cell // 2, ground - cell, cell):
            for start in range(left + cell // 3, left + wide - cell // 2, cell):
                lit = rng.random() < 0.4
                draw.rectangle(
                    (start, top, start + cell * 0.5, top + cell * 0.55),
                    fill=(250, 226, 140) if lit else _rgb(wall * 0.35),
                )
        left += wide + int(rng.integers(0, 6))
    draw.rectangle((0, ground, width, height), fill=_rgb(rng.uniform(60, 110, 3)))
    for start in range(0, width, max(12, width // 10)):
        middle = (ground + height) // 2
        draw.line((start, middle, start + width // 20, middle), fill=(220, 220, 200), width=3)
    return _finish(rng, np.asarray(image, dtype=np.float64))


def _still_life(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Shaded spheres and boxes with shadows on a table before a wall."""
    table = int(height * rng.uniform(0.55, 0.7))
    picture = np.empty((height, width, 3))
    picture[:table] = rng.uniform(90, 220, 3) * (0.9 + 0.2 * _noise(rng, table, width, 3)[..., None])
    rings = 0.5 + 0.5 * np.sin(60 * _noise(rng, height - table, width, 2))
    picture[table:] = rng.uniform([90, 60, 30], [190, 140, 90]) * (0.85 + 0.15 * rings[..., None])
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    for _ in range(int(rng.integers(3, 7))):
        radius = min(width, height) * rng.uniform(0.08, 0.2)
        cx, cy = rng.uniform(radius, width - radius), rng.uniform(table - radius * 0.4, height - radius)
        shadow = np.exp(-(((x - cx - radius * 0.6) / radius) ** 2 + ((y - cy - radius * 0.85) / (radius * 0.3)) ** 2))
        picture *= 1 - 0.55 * shadow[..., None]
        colour = rng.uniform(40, 245, 3)
        dx, dy = (x - cx) / radius, (y - cy) / radius
        if rng.random() < 0.65:
            inside = dx**2 + dy**2 < 1
            depth = np.sqrt(np.clip(1 - dx**2 - dy**2, 0, 1))
            light = np.clip(-0.5 * dx - 0.6 * dy + 0.62 * depth, 0, 1)
            shaded = colour * (0.25 + 0.85 * light)[..., None] + 200 * (light[..., None] ** 24)
        else:
            inside = (abs(dx) < 0.75) & (abs(dy) < 0.95)
            shaded = colour * np.where(dx < 0.3, 1.0, 0.6)[..., None] * (1.05 - 0.2 * dy)[..., None]
        picture = np.where(inside[..., None], shaded, picture)
    return _finish(rng, picture)


def _strokes(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Thick short strokes along a slowly turning direction."""
    palette, image = _canvas(rng, width, height)
    draw = ImageDraw.Draw(image)
    turn, tone = _noise(rng, height, width, 2), _noise(rng, height, width, 3)
    base, length, thick = rng.uniform(0, np.pi), rng.uniform(14, 34), int(rng.integers(4, 10))
    for _ in range(int(width * height / (length * thick) * 3.5)):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        angle = base + 2.5 * turn[y, x]
        dx, dy = length / 2 * np.cos(angle), length / 2 * np.sin(angle)
        draw.line((x - dx, y - dy, x + dx, y + dy), fill=_pick(rng, palette, tone[y, x], 18), width=thick)
    return image


def _dots(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Points of pure colour, close together."""
    palette, image = _canvas(rng, width, height)
    draw = ImageDraw.Draw(image)
    tone, radius = _noise(rng, height, width, 3), rng.uniform(2.5, 6)
    for _ in range(int(width * height / radius**2 * 0.9)):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        r = radius * rng.uniform(0.6, 1.2)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=_pick(rng, palette, tone[y, x], 40))
    return image


def _swirls(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Bands that wind around a few centres."""
    palette, _ = _canvas(rng, width, height)
    y, x = np.mgrid[0:height, 0:width] / min(width, height)
    field = 1.5 * _noise(rng, height, width, 2)
    for _ in range(int(rng.integers(2, 5))):
        dx, dy = x - rng.uniform(0, x.max()), y - rng.uniform(0, y.max())
        distance = np.hypot(dx, dy)
        field = field + np.exp(-4 * distance) * (np.arctan2(dy, dx) * rng.choice([-1, 1]) / np.pi + 6 * distance)
    bands = 0.5 + 0.5 * np.sin(field * rng.uniform(14, 30))
    grain = 0.12 * (rng.random((height, width)) - 0.5)
    return _coloured(palette, np.clip(0.75 * bands + 0.25 * _noise(rng, height, width, 2) + grain, 0, 1))


def _blocks(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Flat fields with dark lines between them."""
    palette, image = _canvas(rng, width, height)
    draw = ImageDraw.Draw(image)
    line = int(rng.integers(2, 8))

    def split(box: tuple[int, int, int, int], depth: int) -> None:
        left, top, right, bottom = box
        wide, high = right - left, bottom - top
        if depth == 0 or min(wide, high) < 24 or rng.random() < 0.12:
            colour = palette[int(rng.integers(1, len(palette)))] + rng.normal(0, 6, 3)
            draw.rectangle(box, fill=_rgb(colour), outline=_rgb(palette[0]), width=line)
        elif wide > high:
            cut = left + int(wide * rng.uniform(0.3, 0.7))
            split((left, top, cut, bottom), depth - 1)
            split((cut, top, right, bottom), depth - 1)
        else:
            cut = top + int(high * rng.uniform(0.3, 0.7))
            split((left, top, right, cut), depth - 1)
            split((left, cut, right, bottom), depth - 1)

    split((0, 0, width - 1, height - 1), int(rng.integers(4, 8)))
    return image


def _hatching(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Thin lines in two directions, closer where it is dark."""
    palette, _ = _canvas(rng, width, height)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    tone = _noise(rng, height, width, 3)
    ink = np.zeros((height, width))
    first = rng.uniform(0, np.pi)
    for index, angle in enumerate((first, first + rng.uniform(0.5, 1.4))):
        wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * rng.uniform(0.7, 1.3))
        ink = np.maximum(ink, (wave > tone * 2 - 0.6 + 0.5 * index).astype(np.float64))
    paper = 0.78 + 0.22 * _noise(rng, height, width, 8)
    etching = np.clip(np.where(ink > 0, 0.12 * paper, paper), 0, 1)
    return _coloured(palette, etching).filter(ImageFilter.GaussianBlur(0.6))


def _noise(rng: np.random.Generator, height: int, width: int, cells: int) -> Array:
    """Smooth random field in [0, 1]: (height, width); `cells` hills along the shorter side, and finer ones on them."""
    total = np.zeros((height, width))
    for octave in range(3):
        rows = cells * 2**octave * height // min(height, width) + 2
        columns = cells * 2**octave * width // min(height, width) + 2
        coarse = Image.fromarray(rng.random((rows, columns)).astype(np.float32))
        total += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float64) / 2**octave
    low, high = total.min(), total.max()
    scaled: Array = (total - low) / (high - low)
    return scaled


def _wave(rng: np.random.Generator, width: int, cells: int) -> Array:
    """Smooth random line in about [0, 1]: (width,)."""
    x = np.linspace(0, 1, width)
    waves = [np.sin(2 * np.pi * (f * x + rng.random())) / f for f in range(1, cells + 3)]
    line: Array = 0.5 + 0.35 * np.sum(waves, axis=0)
    return line


def _canvas(rng: np.random.Generator, width: int, height: int) -> tuple[Array, Image.Image]:
    """A palette, varied a little, and a sheet of one of its middle colours."""
    palette = np.array(_PALETTES[int(rng.integers(len(_PALETTES)))], np.float64) + rng.normal(0, 10, (5, 3))
    return palette, Image.new("RGB", (width, height), _rgb(palette[2]))


def _pick(rng: np.random.Generator, palette: Array, tone: float, spread: float) -> tuple[int, int, int]:
    index = int(np.clip(tone * len(palette) + rng.normal(0, 0.7), 0, len(palette) - 1))
    return _rgb(palette[index] + rng.normal(0, spread, 3))


def _coloured(palette: Array, tone: Array) -> Image.Image:
    """Tones in [0, 1] to the palette's colours, blended between neighbours."""
    stops = np.linspace(0, 1, len(palette))
    channels = [np.interp(tone, stops, palette[:, c]) for c in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8))


def _finish(rng: np.random.Generator, picture: Array) -> Image.Image:
    """Lens: a little blur, vignette and grain."""
    height, width = picture.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    shaded = picture * (1 - 0.18 * (x**2 + y**2))[..., None] + rng.normal(0, 4, picture.shape)
    return Image.fromarray(shaded.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.5))


def _rgb(colour: Array) -> tuple[int, int, int]:
    red, green, blue = np.asarray(colour).clip(0, 255).astype(int).tolist()
    return red, green, blue
