"""Every command in the documentation, in conf/, infra/ and the pipelines' own help is one that they take."""

import importlib
import re
import shlex

import pytest

from adaconv import cli
from adaconv.config.load import flag_names, load_config
from tests.servers import REPO

_FILES = (
    "README.md", "docs/**/*.md", "conf/**/*.yaml", "infra/**/*.md", "infra/**/*.yaml", "infra/**/*.sh", "pipelines/*.py"
)  # fmt: skip
# Lines go on behind a backslash, in a comment too, and in YAML where the next begins with a flag; what two spaces part
# from a command explains it. The command of a job stands within another one.
_GOES_ON = re.compile(r" *\\\n\s*#?\s*|\n\s+(?=--\w)")
_COMMAND = re.compile(r"""(?=python (?:/opt/adaconv/)?pipelines/(\w+)\.py((?: (?:"[^"\n]*"|[^`"\n ]+))*))""")


def documented():
    for pattern in _FILES:
        for path in sorted(REPO.glob(pattern)):
            text = _GOES_ON.sub(" ", path.read_text())
            for number, (name, rest) in enumerate(_COMMAND.findall(text)):
                yield pytest.param(name, rest, id=f"{path.relative_to(REPO)}-{number}-{name}")


@pytest.mark.parametrize(("name", "rest"), documented())
def test_it_is_taken(name, rest, monkeypatch):
    words = shlex.split(rest.replace("/opt/adaconv/", ""), comments=True)
    words = words[: words.index("--")] if "--" in words else words
    flags = [word for word in words if word.startswith("--")]
    whole = flags and not {"…", "...", "[...]"} & set(words) and words[-1:] != flags[-1:]
    read = []

    def run(model, argv, **how):
        if whole:
            read.append(load_config(model, argv, prog=name, description=""))
        else:
            known = {f"--{flag}" for flag in flag_names(model)} | {"--config", "--dry-run", "--help"}
            read.append({flag.partition("=")[0] for flag in flags} <= known)

    monkeypatch.setattr(cli, "run", run)
    monkeypatch.chdir(REPO)
    print(name, words)
    importlib.import_module(f"pipelines.{name}").main(words)
    assert read
    assert all(read)


def test_there_are_many():
    assert len([*documented()]) > 60
