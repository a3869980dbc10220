"""Outputs made again from their recipes, whatever the job was given besides."""

import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin

from adaconv.errors import UsageError
from adaconv.stylize import stylizer as stylizer_module
from adaconv.stylize.inputs import list_items, mixture_of, sha256_of
from adaconv.stylize.outputs import RECIPE_KEY, Recipe, pack_name
from adaconv.stylize.production import Limits, Options, Production, Wanted
from adaconv.stylize.replay import replay
from adaconv.stylize.stylizer import Stylizer
from adaconv.stylize.trace import trace_outputs
from tests.helpers import save_checkpoint


@pytest.mark.parametrize("given", ["memory", "batch", "tiles"])
def test_what_a_job_was_given_is_not_needed_again(given, tmp_path, monkeypatch):
    """Memory for the whole frame, where a replay's own would take tiles; several styles at once; tiles.

    No other disk than the one that is named takes what is put aside.
    """
    if given == "memory":
        monkeypatch.setattr(
            stylizer_module, "plan_tile", lambda *size, max_memory_gb, **how: None if max_memory_gb > 100 else 64
        )
    folder = Path(save_checkpoint(tmp_path / "model")[1])
    content = tmp_path / "contents" / "c.png"
    content.parent.mkdir()
    (content.parent / "weights.safetensors").touch()  # which a job passes over among contents
    Image.effect_noise((96, 80), 60).convert("RGB").save(content)
    stylizer = Stylizer.from_folder(folder, max_memory_gb=1000)
    outputs = []
    for number in range(4):
        name = "images.jpg" if number == 3 else f"{number}.jpg"  # as browsers name downloads
        pack = stylizer.style_pack(Image.effect_noise((64, 64), 20 + 40 * number), side=32, source=name)
        told = ("c.png", sha256_of(content), pack.source, pack.source_sha256, pack.digest)
        recipe = Recipe(*told, "models:/m/1", stylizer.info.digest, Options().__dict__)
        outputs.append(Wanted(number, recipe, lambda pack=pack: pack))
        beside = tmp_path / "out" / pack_name(pack.source, pack.digest)
        beside.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(pack.to_bytes())
    limits = Limits(batch_size=4 if given == "batch" else 1, tile=64 if given == "tiles" else None)
    assert len(list(Production(lambda: stylizer, str(tmp_path / "out"), limits).make(content, outputs))) == 4

    (tmp_path / "file").touch()  # where no folder can be made
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))

    @contextmanager
    def resolved(name):
        yield name, folder

    content.rename(content.with_name("moved.png"))
    content.symlink_to("nowhere")  # what has its name cannot be had
    for one in outputs:
        uri = str(tmp_path / "out" / one.recipe.name)
        assert replay(uri, resolved=resolved, content=[str(content.parent)], scratch=str(tmp_path))["same_bytes"], uri
    for changed in (False, True):
        with Image.open(uri) as image:
            notes = PngImagePlugin.PngInfo()
            notes.add_itxt(RECIPE_KEY, image.info[RECIPE_KEY])
            if changed:
                image.putpixel((5, 5), tuple(255 - level for level in image.getpixel((5, 5))))
            image.save(uri, pnginfo=notes, compress_level=9)
        result = replay(uri, resolved=resolved, content=[str(content.parent)], scratch=str(tmp_path))
        assert (result["same_bytes"], result["same_pixels"], result["status"]) == (False, not changed, "failed")
        assert (", of the same pixels" in result["error"]) is not changed


def test_a_mixture_is_made_again_from_its_table_and_found_by_its_parts(tmp_path):
    folder = Path(save_checkpoint(tmp_path / "model")[1])
    stylizer = Stylizer.from_folder(folder)
    for number, name in enumerate(("content", "a", "b", "unused")):
        Image.effect_noise((64, 48), 20 + 40 * number).convert("RGB").save(tmp_path / f"{name}.png")
    content, table, out = tmp_path / "content.png", tmp_path / "mixtures.csv", tmp_path / "out"
    table.write_text("name,style,weight\ndusk 0.3,a.png,3\ndusk 0.3,b.png,1\ndusk 0.3,unused.png,0\n")

    def pack_of(item):
        with Image.open(item.uri) as image:
            return stylizer.style_pack(image, side=32, source=item.source, source_sha256=sha256_of(Path(item.uri)))

    (item,) = list_items([str(table)], flag="--style", packs=True)
    pack = mixture_of(item, pack_of)
    told = ("content.png", sha256_of(content), pack.source, pack.source_sha256, pack.digest)
    recipe = Recipe(*told, "models:/m/1", stylizer.info.digest, Options(style_side=32).__dict__)
    assert recipe.name.startswith("images/dusk-0.3/")
    (made,) = Production(lambda: stylizer, str(out), Limits()).make(content, [Wanted(0, recipe, lambda: pack)])
    assert made.state == "done"
    uri = str(out / recipe.name)
    found = {name: [*trace_outputs(str(out), {sha256_of(tmp_path / f"{name}.png")}, set())] for name in ("a", "unused")}
    assert [one.by for one in found["a"]] == ["style"]
    assert found["unused"] == []

    how = {"resolved": lambda name: nullcontext((name, folder)), "content": [str(content)]}
    assert replay(uri, style=[str(table)], **how)["same_bytes"]
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"dusk 0.3 is a mixture; expected its table .* not_an_image: b.png, a part"):
        replay(uri, style=[str(table)], **how)


def test_what_another_kind_of_device_made_may_differ_by_rounding_alone(tmp_path, monkeypatch, caplog):
    folder = Path(save_checkpoint(tmp_path / "model")[1])
    content = tmp_path / "contents" / "c.png"
    content.parent.mkdir()
    Image.effect_noise((96, 80), 60).convert("RGB").save(content)
    stylizer = Stylizer.from_folder(folder)
    pack = stylizer.style_pack(Image.effect_noise((64, 64), 60), side=32, source="s.jpg")
    told = ("c.png", sha256_of(content), pack.source, pack.source_sha256, pack.digest)
    recipe = Recipe(*told, "models:/m/1", stylizer.info.digest, Options().__dict__)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(Stylizer, "device", "cuda")
        elsewhere.setattr(torch.cuda, "get_device_name", lambda: "H200")
        wanted = [Wanted(0, recipe, lambda: pack)]
        assert list(Production(lambda: stylizer, str(tmp_path / "out"), Limits()).make(content, wanted))
    output, beside = tmp_path / "out" / recipe.name, tmp_path / "out" / pack_name(pack.source, pack.digest)
    beside.parent.mkdir()
    beside.write_bytes(pack.to_bytes())

    def replayed(change):
        with Image.open(output) as image:
            notes = PngImagePlugin.PngInfo()
            notes.add_itxt(RECIPE_KEY, image.info[RECIPE_KEY])
            image.point(change).save(output, pnginfo=notes)
        resolved = lambda name: nullcontext((name, folder))  # noqa: E731
        return replay(str(output), resolved=resolved, content=[str(content.parent)])

    result = replayed(lambda level: level + (level == 100))
    assert (result["same_bytes"], result["same_pixels"], result["levels_apart"]["most"]) == (False, False, 1)
    assert 0 < result["levels_apart"]["mean"] < 0.1
    assert "status" not in result
    assert "'gpu': 'H200'" in caplog.text
    assert "Another kind of device rounds otherwise" in caplog.text
    result = replayed(lambda level: 255 - level)
    assert result["status"] == "failed"
    assert result["levels_apart"]["mean"] > 1
