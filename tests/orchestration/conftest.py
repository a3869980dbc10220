"""One Ray cluster for the tests of this folder, and a build that nothing happened to."""

import shutil
import time

import pytest

from adaconv.data.synthetic import generate_photos
from tests.orchestration.runs import hashes_of, shard
from tests.servers import ray_cluster

# Comes into every process of the cluster by PYTHONPATH: a decoder that dies, for real, of images that say so. It reads
# at address 0, as those do: a signal sent to the process may find another thread, and the decoding one goes on.
DEADLY_DECODER = """
import ctypes
from PIL import Image, PngImagePlugin

opened, loaded = PngImagePlugin.PngImageFile._open, PngImagePlugin.PngImageFile.load

def _open(self):
    opened(self)
    if self.info.get("poison") == "header":
        ctypes.string_at(0)

def load(self):
    if self.info.get("poison") == "pixels":
        ctypes.string_at(0)
    return loaded(self)

PngImagePlugin.PngImageFile._open, PngImagePlugin.PngImageFile.load = _open, load
"""


@pytest.fixture(scope="package")
def cluster(s3, tmp_path_factory):
    hooks = tmp_path_factory.mktemp("hooks")
    (hooks / "sitecustomize.py").write_text(DEADLY_DECODER)
    environment = {
        **s3.environment,
        "PYTHONPATH": str(hooks),
        "ADACONV_STORAGE_PATIENCE": "4",
        "RAY_worker_niceness": "0",
    }
    with ray_cluster(environment) as cluster:
        yield cluster


@pytest.fixture(scope="package")
def images(tmp_path_factory):
    """60 photographs, some in folders, one twice and one broken."""
    folder = tmp_path_factory.mktemp("raw") / "images"
    generate_photos(folder, 60, seed=3, size=144)
    (folder / "more" / "of.them").mkdir(parents=True)
    for number in range(10):
        (folder / f"photo_{number:05d}.jpg").rename(folder / "more" / "of.them" / f"{number}. é 写.jpg")
    shutil.copy(folder / "photo_00020.jpg", folder / "again.jpg")
    (folder / "cut.jpg").write_bytes((folder / "photo_00021.jpg").read_bytes()[:3000])
    return folder


@pytest.fixture(scope="package")
def undisturbed(cluster, images, tmp_path_factory):
    """Root of a build that nothing happened to, its hashes, the seconds it took and what it printed."""
    root = tmp_path_factory.mktemp("undisturbed") / "data"
    began = time.monotonic()
    done = shard(cluster, images, root)
    return root, hashes_of(root), time.monotonic() - began, done.stdout
