"""Who may import whom, read from the source: the table of docs/design/0001-rooms.md, kept by machine."""

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]

# Room -> what it must not import, directly or inside a function. Rooms are files or folders of adaconv/.
FORBIDDEN = {
    "config": {"torch", "ray", "mlflow", "pyarrow", "fsspec", "numpy", "adaconv.!config,errors"},
    "errors": {"adaconv.!"},
    "ctrl_c": {"pydantic", "torch", "ray", "mlflow", "adaconv.!"},
    "pages": {"torch", "ray", "mlflow", "adaconv.!"},
    "progress": {"torch", "ray", "mlflow", "adaconv.!"},
    "cli": {"torch", "ray", "mlflow", "adaconv.!config,ctrl_c,errors,storage"},
    "download": {"torch", "ray", "mlflow", "adaconv.!progress"},
    "images": {"ray", "mlflow", "webdataset", "pydantic", "adaconv.!errors"},
    "storage": {"torch", "ray", "mlflow", "adaconv.!errors,scratch"},
    "model": {"ray", "mlflow", "webdataset", "pydantic", "fsspec", "pyarrow", "adaconv.!errors,model,download"},
    "scratch": {"torch", "ray", "mlflow", "adaconv.!errors"},
    "allocator": {"torch", "ray", "mlflow", "adaconv.!"},
    "data": {"ray", "mlflow", "adaconv.!data,images,storage,errors,pages,progress,config,scratch"},
    "training": {"ray", "mlflow", "webdataset", "pyarrow", "pydantic"},
    "checkpoint": {"ray", "mlflow", "webdataset", "pyarrow", "pydantic"},
    "stylize": {"ray", "mlflow", "webdataset", "pydantic"},
    "evaluation": {
        *("ray", "mlflow", "webdataset", "pydantic"),
        "adaconv.!evaluation,errors,images,model,pages,progress,storage,stylize,training",
    },
    "tracking": {
        "ray",
        "webdataset",
        "adaconv.!tracking,config,checkpoint,storage,errors,images,pages,stylize,scratch",
    },
    "orchestration": {"mlflow"},
}
# Only these rooms may name these libraries.
OWNERS = {
    "ray": {"orchestration"},
    "mlflow": {"tracking"},
    "s3fs": {"storage"},
    "fsspec": {"storage"},
    "boto3": {"storage"},
    "tyro": {"config"},
}


def room_of(path: Path) -> str:
    return path.relative_to(REPO / "adaconv").parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[str]:
    """Every module that a file imports, except where only a type checker looks."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def breaks(name: str, rule: str) -> bool:
    """`adaconv.!a,b` forbids every room but a and b; any other rule forbids a package."""
    if rule.startswith("adaconv.!"):
        parts = name.split(".")
        return parts[0] == "adaconv" and len(parts) > 1 and parts[1] not in rule.removeprefix("adaconv.!").split(",")
    return name.split(".")[0] == rule


FILES = sorted((REPO / "adaconv").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(REPO)))
def test_a_room_leaves_alone_what_is_not_its_own(path):
    room = room_of(path)
    wrong = [name for name in imports_of(path) for rule in FORBIDDEN.get(room, ()) if breaks(name, rule)]
    wrong += [name for name in imports_of(path) if room not in OWNERS.get(name.split(".")[0], {room})]
    wrong += [name for name in imports_of(path) if name.split(".")[0] in ("pipelines", "tests", "bench")]
    assert not wrong


def test_pipelines_do_not_import_one_another():
    for path in (REPO / "pipelines").glob("*.py"):
        assert not [name for name in imports_of(path) if name.split(".")[0] == "pipelines"], path


def test_no_pipeline_hides_a_library():
    """A script's folder comes first on the path: a file pipelines/ray.py would be what `import ray` finds."""
    names = {path.stem for path in (REPO / "pipelines").glob("*.py")}
    assert not names & {"ray", "mlflow", "torch", "webdataset", "s3fs", "tyro", "pydantic", "numpy", "pyarrow", "PIL"}


def test_the_rules_can_fail(tmp_path):
    """The checker sees imports at the top, inside functions and through `from`, and not those for type checkers."""
    file = tmp_path / "x.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import mlflow\n"
        "def f():\n    import ray.data\nfrom adaconv.model import network\n"
    )
    names = imports_of(file)
    assert "mlflow" not in names
    assert any(breaks(name, "ray") for name in names)
    assert any(breaks(name, "adaconv.!data") for name in names)
    assert not any(breaks(name, "adaconv.!model") for name in names)
