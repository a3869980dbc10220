"""Rectangles of pixels in memory or in a file of the same layout: rows of pixels, channels innermost.

Files are read and written by position rather than mapped: pages of a mapping count as the process's memory.
"""

import os
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Window(NamedTuple):
    """Rows [top, bottom) and columns [left, right)."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left

    def moved(self, down: int, right: int) -> "Window":
        return Window(self.top + down, self.bottom + down, self.left + right, self.right + right)

    def scaled(self, factor: int) -> "Window":
        return Window(*(side * factor for side in self))


class Raster(Protocol):
    """(C, height, width), read and written by windows of (1, C, h, w); what is read is the caller's to change."""

    height: int
    width: int

    def read(self, window: Window) -> Tensor: ...

    def write(self, window: Window, values: Tensor) -> None: ...


class MemoryRaster:
    def __init__(self, values: Tensor) -> None:
        self.values = values  # (1, C, H, W)
        self.height, self.width = values.shape[-2:]

    def read(self, window: Window) -> Tensor:
        top, bottom, left, right = window
        return self.values[..., top:bottom, left:right].clone()

    def write(self, window: Window, values: Tensor) -> None:
        top, bottom, left, right = window
        self.values[..., top:bottom, left:right] = values


class FileRaster:
    """A file of height x width x channels values, which `close` removes.

    Takes height x width x channels x itemsize bytes of disk.
    """

    def __init__(
        self,
        path: Path,
        channels: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        *,
        device: torch.device | None = None,
    ) -> None:
        self.path, self.height, self.width = path, height, width
        self._channels, self._dtype, self._device = channels, dtype, device
        self._pixel_bytes = channels * dtype.itemsize
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        if hasattr(os, "posix_fallocate"):
            # Room is taken now: a full disk says so here rather than in the middle.
            try:
                os.posix_fallocate(self._file, 0, max(1, height * width * self._pixel_bytes))
            except OSError as error:
                self.close()
                error.filename = str(path)
                raise

    def read(self, window: Window) -> Tensor:
        rows = torch.empty(window.height, window.width * self._pixel_bytes, dtype=torch.uint8)
        for row, offset in zip(rows.numpy(), self._offsets(window), strict=True):
            os.preadv(self._file, [row], offset)
        values = rows.view(self._dtype).view(1, window.height, window.width, self._channels)
        return values.to(self._device).permute(0, 3, 1, 2)  # channels_last as it lies

    def write(self, window: Window, values: Tensor) -> None:
        by_rows = values.to(self._dtype).permute(0, 2, 3, 1).contiguous().cpu()
        rows = by_rows.view(window.height, window.width * self._channels).view(torch.uint8)
        for row, offset in zip(rows.numpy(), self._offsets(window), strict=True):
            os.pwrite(self._file, row, offset)

    def fileno(self) -> int:
        """For who writes all of it; at the file's beginning."""
        return self._file

    def read_bytes(self, offset: int, size: int) -> bytes:
        """Of the file as it lies."""
        return os.pread(self._file, size, offset)

    def close(self) -> None:
        """May be called again. Until it is called the disk's room is taken, though the folder be removed."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self.path.unlink(missing_ok=True)

    def _offsets(self, window: Window) -> list[int]:
        return [(row * self.width + window.left) * self._pixel_bytes for row in range(window.top, window.bottom)]


def tiles(height: int, width: int, side: int) -> list[Window]:
    """Windows of at most side x side that cover a frame, row by row."""
    return [
        Window(top, min(top + side, height), left, min(left + side, width))
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]
