"""What a run's sample grids looked like at each step, on one HTML page that needs no other file and asks for none.

Built from what the run logged, so any run can be made into a page: `pipelines/runs.py page`. Styles and contents, which
are the same at all steps, lie in it once; the stylized cells of a step are one WebP picture.
"""

import base64
import html
import io
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from adaconv import pages, storage
from adaconv.scratch import scratch_folder
from adaconv.tracking.mlflow_tracker import logged_checkpoints
from adaconv.tracking.runs import logged_images
from adaconv.tracking.tracker import GRID_GAP, GRID_KEY

log = logging.getLogger(__name__)

PAGE_FILE = "time-machine.html"
_LINKED = ("file:", "s3:", "http:", "https:")  # a run may name anything as its checkpoint, also a script
_PAGE = (Path(__file__).parent / "time_machine.html").read_text(encoding="utf-8")
_MAX_BYTES, _MOST_STEPS, _MOST_POINTS = 18_000_000, 200, 500
_HEADER_SIDE = 256
_QUALITIES = (85, 75, 65, 50, 35, 20)


def render(client: MlflowClient, runs: Sequence[Run], *, max_bytes: int = _MAX_BYTES) -> str | None:
    """The page of one run, or of two side by side; None where the first logged no sample grid.

    Args:
        client: of the server.
        runs: one or two.
        max_bytes: of the pictures of each run, as they lie in the page.
    """
    shown = [found for run in runs if (found := _data_of(client, run, max_bytes))]
    if not shown:
        return None
    title = " and ".join(f"{one['name']}" for one in shown)
    parts = {"title": html.escape(f"{title}: samples over time"), "data": pages.script_json(shown)}
    return pages.fill(_PAGE, parts)


def _data_of(client: MlflowClient, run: Run, max_bytes: int) -> dict[str, Any] | None:
    with scratch_folder("page") as scratch:
        grids = _grids(client, run, scratch)
        if not grids:
            return None
        side = int(run.data.params.get("data.crop", "0"))
        with Image.open(grids[max(grids)]) as newest:
            size, layout = newest.size, _Layout.of(newest.size, side)
            headers = layout.headers(newest.convert("RGB"))
        # A run that was resumed with other pictures has earlier grids of another layout.
        others = {step for step, path in grids.items() if _size_of(path) != size}
        if others:
            log.info("grids of other pictures are not on the page: %d, up to step %d", len(others), max(others))
        grids = {step: path for step, path in grids.items() if step not in others}
        budget = int(max_bytes * 0.75) - sum(map(len, (*headers[0], *headers[1])))  # base64 is a third longer
        shrunk = layout.fitting(grids[max(grids)], budget // len(grids))
        checkpoints = logged_checkpoints(client, run.info.run_id)
        frames = []
        for step, path in grids.items():
            with Image.open(path) as grid:
                picture = _webp(shrunk.sheet(grid.convert("RGB")), budget // len(grids))
            frames.append({"step": step, "sheet": _base64(picture), "checkpoint": _checkpoint_at(checkpoints, step)})
    return {
        "name": run.info.run_name,
        "run_id": run.info.run_id,
        "status": run.info.status,
        "rows": layout.rows,
        "columns": layout.columns,
        "aspect": layout.width / layout.height,
        "contents": [_base64(one) for one in headers[0]],
        "styles": [_base64(one) for one in headers[1]],
        "frames": frames,
        "loss": _curve(client, run),
    }


def _size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as grid:
        return grid.size


@dataclass(frozen=True)
class _Layout:
    """Where the cells of a grid lie: `rows` x `columns` stylized ones, of `width` x `height` pixels as they are shown.

    `side` is 0 for a picture that is no grid of known cells: it is one cell.
    """

    side: int
    rows: int
    columns: int
    width: int
    height: int

    @classmethod
    def of(cls, size: tuple[int, int], side: int) -> "_Layout":
        across, down = ((length + GRID_GAP) / (side + GRID_GAP) for length in size)
        if side == 0 or across % 1 or down % 1 or min(across, down) < 2:
            return cls(0, 1, 1, *size)
        return cls(side, int(down) - 1, int(across) - 1, side, side)

    def headers(self, grid: Image.Image) -> tuple[list[bytes], list[bytes]]:
        """Contents and styles, as WebP."""
        if not self.side:
            return [], []
        contents = [self._cell(grid, row + 1, 0) for row in range(self.rows)]
        styles = [self._cell(grid, 0, column + 1) for column in range(self.columns)]
        return [_header(one) for one in contents], [_header(one) for one in styles]

    def sheet(self, grid: Image.Image) -> Image.Image:
        """The stylized cells of a grid without gaps, each scaled to its shown size."""
        if not self.side:
            return grid.resize((self.width, self.height), Image.Resampling.LANCZOS)
        sheet = Image.new("RGB", (self.columns * self.width, self.rows * self.height))
        for row in range(self.rows):
            for column in range(self.columns):
                cell = self._cell(grid, row + 1, column + 1)
                if cell.width != self.width:
                    cell = cell.resize((self.width, self.height), Image.Resampling.LANCZOS)
                sheet.paste(cell, (column * self.width, row * self.height))
        return sheet

    def fitting(self, path: Path, budget: int) -> "_Layout":
        """The largest shown size at which a typical grid takes no more bytes than this at a good quality."""
        with Image.open(path) as image:
            grid = image.convert("RGB")
        fits = self
        while fits.width > 48 and len(_encode(fits.sheet(grid), _QUALITIES[1])) > budget:
            fits = replace(fits, width=int(fits.width * 0.85), height=int(fits.height * 0.85))
        return fits

    def _cell(self, grid: Image.Image, down: int, across: int) -> Image.Image:
        step = self.side + GRID_GAP
        return grid.crop((across * step, down * step, across * step + self.side, down * step + self.side))


def _grids(client: MlflowClient, run: Run, scratch: Path) -> dict[int, Path]:
    """Files of the run's grids, by step; evenly fewer where there are very many."""
    found = {step: path for key, step, path in logged_images(client, run.info.run_id) if key == GRID_KEY}
    steps = sorted(found)
    if len(steps) > _MOST_STEPS:
        steps = sorted({steps[round(i * (len(steps) - 1) / (_MOST_STEPS - 1))] for i in range(_MOST_STEPS)})
    return {step: Path(client.download_artifacts(run.info.run_id, found[step], str(scratch))) for step in steps}


def _checkpoint_at(checkpoints: list[dict[str, Any]], step: int) -> dict[str, str] | None:
    """Where it is, and, of what can only be looked at, a link to it."""
    before = [one for one in checkpoints if one["step"] <= step]
    if not before:
        return None
    uri = max(before, key=lambda one: one["step"])["uri"]
    href = Path(uri).absolute().as_uri() if storage.is_local(uri) else uri
    return {"uri": uri, "href": href} if href.startswith(_LINKED) else {"uri": uri}


def _curve(client: MlflowClient, run: Run) -> list[list[float]]:
    points = sorted(client.get_metric_history(run.info.run_id, "train/loss"), key=lambda point: point.step)
    every = max(1, len(points) // _MOST_POINTS)
    finite = (point for point in points[::every] if abs(point.value) < sys.float_info.max)  # MLflow's infinity
    return [[point.step, float(f"{point.value:.6g}")] for point in finite]


def _header(cell: Image.Image) -> bytes:
    shown = cell.copy()
    shown.thumbnail((_HEADER_SIDE, _HEADER_SIDE))
    return _encode(shown, 85)


def _webp(sheet: Image.Image, budget: int) -> bytes:
    """At the best quality that fits."""
    for quality in _QUALITIES:
        data = _encode(sheet, quality)
        if len(data) <= budget:
            break
    return data


def _encode(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=2)
    return buffer.getvalue()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
