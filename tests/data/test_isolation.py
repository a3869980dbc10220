"""An image that kills its decoder is refused; what the others become does not depend on where they are decoded."""

import os
import signal
import sys

import pytest
from PIL import Image, PngImagePlugin

from adaconv.config.shard import RecipeConfig
from adaconv.data.ingest import Refusal, ingest, look
from adaconv.data.isolation import IsolatedDecoder

RECIPE = RecipeConfig(short_side=64, min_side=16)

HOOK = """
import os, signal, time
from pathlib import Path
from PIL import PngImagePlugin
loaded = PngImagePlugin.PngImageFile.load

def load(self):
    poison = self.info.get("poison", "")
    if poison == "always":
        os.kill(os.getpid(), signal.SIGSEGV)
    if poison.startswith("once ") and not Path(poison[5:]).exists():
        Path(poison[5:]).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return loaded(self)

PngImagePlugin.PngImageFile.load = load
"""


@pytest.fixture
def decoder(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])  # which the child is given
    with IsolatedDecoder(RECIPE) as decoder:
        yield decoder


def png(folder, poison: str | None = None) -> bytes:
    info = PngImagePlugin.PngInfo()
    if poison:
        info.add_text("poison", poison)
    Image.effect_noise((80, 70), 50).convert("RGB").save(folder / "x.png", pnginfo=info)
    return (folder / "x.png").read_bytes()


def test_answers_are_those_of_this_process(decoder, tmp_path):
    thin = tmp_path / "thin.png"
    Image.new("RGB", (300, 20)).save(thin)
    for data in (png(tmp_path), b"", b"text", thin.read_bytes()):
        assert decoder.look(data) == look(data, RECIPE)
        assert decoder.ingest(data, "a.jpg") == ingest(data, "a.jpg", RECIPE)


def test_what_kills_the_decoder_is_refused_and_the_next_is_decoded(decoder, tmp_path):
    answer = decoder.ingest(png(tmp_path, "always"), "a.png")
    assert answer == Refusal("decoder_crashed", "the decoder ended with SIGSEGV")
    good = png(tmp_path)
    assert decoder.ingest(good, "a.png") == ingest(good, "a.png", RECIPE)


def test_an_image_is_not_blamed_for_a_kill_from_outside(decoder, tmp_path):
    """SIGKILL is what operators and the kernel's memory killer send: the image is tried again."""
    data = png(tmp_path, f"once {tmp_path / 'mark'}")
    answer = decoder.ingest(data, "a.png")
    assert (tmp_path / "mark").exists()
    assert not isinstance(answer, Refusal)


def test_no_child_is_left():
    with IsolatedDecoder(RECIPE) as decoder:
        decoder.look(b"")
        pid = decoder._child.pid
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
