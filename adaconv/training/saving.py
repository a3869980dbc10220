"""Checkpoints written beside the training: a copy is taken at once, a thread writes and publishes it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from adaconv import checkpoint
from adaconv.training.state import TrainState


class CheckpointWriter:
    """Publishes checkpoints one at a time and in order; training goes on meanwhile, unless one is still being written.

    Args:
        folder: (local or s3://) that checkpoints go to.
        settings, encoder_fingerprint: as `checkpoint.save` takes them.
        keep_last, keep_best: checkpoints that stay; see `checkpoint.keep`.
        first_step: that the training begins at. Later checkpoints that are there already were passed over, as damaged.
        tell: takes a line about what went wrong and ended nothing; from any thread.
    """

    def __init__(
        self,
        folder: str,
        *,
        settings: Mapping[str, Any],
        encoder_fingerprint: str,
        keep_last: int,
        keep_best: int,
        first_step: int,
        tell: Callable[[str], None],
    ) -> None:
        self._folder, self._settings, self._fingerprint = folder, settings, encoder_fingerprint
        self._keep_last, self._keep_best, self._tell = keep_last, keep_best, tell
        self._passed_over = {step for step in checkpoint.steps_in(folder) if step > first_step}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._published: list[tuple[int, str]] = []

    def save(self, state: TrainState, *, data: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Take a copy of the state and return; what is still being written is waited for first.

        Where that one could not be written, this one is waited for as well: it may be the last one of a run that is
        asked to stop, and the storage may be back.

        Raises:
            Exception: what this checkpoint met, after another before it.
        """
        failed = False
        try:
            self.wait()
        except Exception as error:
            failed = True
            self._tell(f"WARNING a checkpoint could not be written, step {state.step} is tried instead: {error}")
        copy: dict[str, Any] = {
            "step": state.step,
            "weights": state.inference_weights(),
            "trainer": state.trainer_dict(),
            "data": dict(data),
            "meta": dict(meta),
        }
        # Not a daemon: an interpreter that ends waits for what is being written.
        self._thread = threading.Thread(target=self._write, args=(copy,), name="checkpoint-writer")
        self._thread.start()
        if failed:
            self.wait()

    def wait(self) -> None:
        """Until what was saved is published.

        Raises:
            Exception: what was met instead.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    @property
    def has_failed(self) -> bool:
        """Whether the last checkpoint is known not to have been written, though nobody has waited for it yet."""
        return self._error is not None

    def take_published(self) -> list[tuple[int, str]]:
        """Steps and URIs of the checkpoints published since this was last asked."""
        taken, self._published = self._published, []
        return taken

    def _write(self, copy: dict[str, Any]) -> None:
        try:
            uri = checkpoint.save(self._folder, settings=self._settings, encoder_fingerprint=self._fingerprint, **copy)
            self._published.append((copy["step"], uri))
            self._passed_over.discard(copy["step"])
        except BaseException as error:  # for whoever waits
            self._error = error
            return
        try:
            checkpoint.keep(
                self._folder,
                last=self._keep_last,
                best=self._keep_best,
                passed_over=self._passed_over,
            )
        except Exception as error:  # the next one tries again
            self._tell(f"WARNING step {copy['step']} is saved, but none before it could be removed: {error}")
