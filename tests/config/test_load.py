"""Files and flags to one validated configuration."""

import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, model_validator

from adaconv.config.base import Config, Location, PathOrWord
from adaconv.config.load import flag_names, load_config, to_yaml
from adaconv.config.register import RegisterConfig
from adaconv.config.train import TrainConfig
from adaconv.errors import ConfigError

REPO = Path(__file__).parents[2]


class Train(Config):
    steps: int = Field(default=100, ge=1)
    """Updates."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Rate."""
    compile: bool = False
    """Whether to compile."""
    kind: Literal["a", "b"] = "a"
    """Which."""

    @model_validator(mode="after")
    def _agree(self) -> "Train":
        if self.compile and self.steps > 50:
            raise ValueError(f"train.compile needs train.steps <= 50, found {self.steps}")
        return self


class Top(Config):
    source: tuple[str, ...]
    """Where from."""
    output: str
    """Where to."""
    workers: int | tuple[int, int] = 2
    """How many."""
    train: Train = Train()


def load(*argv: str):
    return load_config(Top, argv, prog="test", description="Test.")


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_flags_win_over_later_files_over_earlier_files_over_defaults(tmp_path):
    one = write(tmp_path / "1.yaml", "source: [a]\ntrain: {steps: 5, learning_rate: 1e-3}\n")
    two = write(tmp_path / "2.yaml", "train: {steps: 6, kind: b}\n")
    loaded = load("--config", one, "--config", two, "--output", "o", "--train.kind", "a")
    assert loaded.config.train == Train(steps=6, learning_rate=1e-3, kind="a")
    assert loaded.config.source == ("a",)
    assert not loaded.dry_run


def test_the_resolved_configuration_is_accepted_again_as_a_file(tmp_path):
    config = load("--source", "a", "b", "--output", "o", "--workers", "1", "4", "--train.compile", "true",
                  "--train.steps", "3").config  # fmt: skip
    again = load("--config", write(tmp_path / "resolved.yaml", to_yaml(config)))
    assert again.config == config


@pytest.mark.parametrize(
    ("flags", "compiled"),
    [
        (("--train.compile",), True),
        (("--train.compile", "--train.kind", "b"), True),
        (("--train.compile", "false"), False),
        (("--train.compile=false",), False),
    ],
)
def test_a_flag_of_yes_or_no_needs_no_value(flags, compiled):
    config = load("--source", "a", "--output", "o", "--train.steps", "3", *flags).config
    assert config.train.compile is compiled


def test_every_problem_of_a_file_is_named_at_once_with_the_nearest_known_key(tmp_path):
    bad = write(tmp_path / "bad.yaml", "sourc: x\ntrains: {}\ntrain: {stepz: 4, kind: q, learning_rate: -1}\n")
    with pytest.raises(ConfigError) as caught:
        load("--config", bad)
    message = str(caught.value)
    assert "unknown key 'sourc'; did you mean source?" in message
    assert "unknown key 'train.stepz'; did you mean train.steps?" in message
    assert "unknown key 'trains'; did you mean train?" in message
    assert "train.kind: input should be 'a' or 'b', found 'q'" in message
    assert "train.learning_rate: input should be greater than 0, found -1" in message
    assert message.count("bad.yaml") == 5


@pytest.mark.parametrize(
    ("flag", "meant"),
    [("--trian.steps", "--train.steps"), ("--steps", "--train.steps"), ("--ouput", "--output")],
)
def test_an_unknown_flag_is_refused_with_the_one_that_was_probably_meant(flag, meant):
    with pytest.raises(ConfigError, match=f"unknown flag {flag}; did you mean {meant}?"):
        load("--source", "a", "--output", "o", flag, "4")


def test_every_unknown_flag_is_named_at_once():
    with pytest.raises(ConfigError) as caught:
        load("--source", "a", "--ouput=o", "--trian.steps", "4")
    lines = str(caught.value).splitlines()
    assert lines[0] == "unknown flag --ouput; did you mean --output?"
    assert lines[1] == "unknown flag --trian.steps; did you mean --train.steps?; --help lists every flag"


def test_a_flag_may_repair_what_two_fields_of_a_file_disagree_on(tmp_path):
    file = write(tmp_path / "c.yaml", "source: [a]\noutput: o\ntrain: {compile: true}\n")
    assert load("--config", file, "--train.steps", "50").config.train.steps == 50
    with pytest.raises(ConfigError, match=r"train\.compile needs train\.steps <= 50, found 100"):
        load("--config", file)


def test_bounds_of_flags_are_checked_by_the_model():
    with pytest.raises(ConfigError, match=r"train\.steps: input should be greater than or equal to 1, found 0"):
        load("--source", "a", "--output", "o", "--train.steps", "0")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train: {steps: yes}", r"train\.steps: expected no truth value; YAML reads yes, no, on and off as such"),
        ("workers: on", r"workers: expected no truth value"),
        ("workers: [yes, 8]", r"workers: expected no truth value"),
        ("train: {learning_rate: .inf}", r"train\.learning_rate: input should be a finite number, found inf"),
        ("train: {learning_rate: .nan}", r"train\.learning_rate: input should be a finite number, found nan"),
    ],
)
def test_what_is_no_number_is_refused_for_one(tmp_path, text, told):
    with pytest.raises(ConfigError, match=told):
        load("--config", write(tmp_path / "a.yaml", text), "--source", "a", "--output", "o")


class Paths(Config):
    output: Location
    """Where to."""
    model: PathOrWord = "models:/a@b"
    """Of what."""


@pytest.mark.parametrize("text", ["no", "yes", "off", "3", "[1]", "null", ""])
def test_a_section_that_is_none_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match=r"a\.yaml: train: expected settings below it, found "):
        load("--config", write(tmp_path / "a.yaml", f"train: {text}"), "--source", "a", "--output", "o")


def test_a_list_that_is_too_short_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"a\.yaml: model\.groups\.3: field required"):
        load_config(
            TrainConfig, ("--config", write(tmp_path / "a.yaml", "model: {groups: [8, 4, 2]}")), prog="", description=""
        )


@pytest.mark.parametrize("name", ["", ".", "..", "/etc/x", "team/a", "a\nb"])
def test_a_run_is_named_as_a_folder_is(name):
    with pytest.raises(ConfigError, match="name: expected a name for a folder"):
        load_config(
            TrainConfig, ("--content", "c", "--style", "s", "--output", "o", "--name", name), prog="", description=""
        )


@pytest.mark.parametrize("name", ["", " ", "a/b", "a:b", "a@b"])
def test_a_model_is_named_as_registries_can(name):
    with pytest.raises(ConfigError, match="name: expected a name of a registered model"):
        load_config(RegisterConfig, ("--model", "m", "--name", name), prog="", description="")


def test_a_home_is_in_full_whatever_kept_a_shell_from_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = write(tmp_path / "a.yaml", "output: ~/out\n")
    for argv in (("--config", file), ("--output=~/out",), ("--output=~/out", "--model=~/run")):
        config = load_config(Paths, argv, prog="test", description="Test.").config
        assert config.output == f"{tmp_path}/out"
        assert config.model == (f"{tmp_path}/run" if len(argv) == 2 and argv[0] != "--config" else "models:/a@b")


@pytest.mark.parametrize("content", [None, "- a\n- b\n", "a: [unclosed\n"])
def test_a_file_that_is_missing_or_no_mapping_is_one_clear_line(tmp_path, content):
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"--config .*x\.yaml: ") as caught:
        load("--config", str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["train: {steps: 4}\noutput: o\ntrain: {kind: b}\n", "train:\n  steps: 4\n  steps: 5\n"]
)
def test_a_key_that_is_there_twice_is_refused_and_located(tmp_path, text):
    with pytest.raises(ConfigError, match=r"the key '(train|steps)' a second time .*line 3"):
        load("--config", write(tmp_path / "twice.yaml", text), "--source", "a", "--output", "o")


def test_a_range_with_a_colon_is_read_as_written(tmp_path):
    text = "source: [10:20, 41200:41500]\noutput: o\ntrain: {steps: 4}\n"
    assert load("--config", write(tmp_path / "ranges.yaml", text)).config.source == ("10:20", "41200:41500")


def test_a_number_is_read_as_written(tmp_path):
    text = "source: [007, 1:30.5]\noutput: o\ntrain: {steps: 0100, learning_rate: 1e-4}\n"
    config = load("--config", write(tmp_path / "a.yaml", text)).config
    assert (config.source, config.train.steps, config.train.learning_rate) == (("007", "1:30.5"), 100, 1e-4)


def test_keys_that_a_merge_brings_may_be_given_anew(tmp_path):
    text = "source: [a]\noutput: o\ntrain: {<<: {steps: 4, kind: b}, steps: 5}\n"
    assert load("--config", write(tmp_path / "merge.yaml", text)).config.train == Train(steps=5, kind="b")


def test_dry_run_is_a_flag_and_no_part_of_the_configuration():
    loaded = load("--source", "a", "--output", "o", "--dry-run")
    assert loaded.dry_run
    assert "dry_run" not in to_yaml(loaded.config)


def test_flag_names_are_dotted_and_dashed():
    assert "train.learning-rate" in flag_names(Top)


@pytest.mark.parametrize("pipeline", sorted(p.name for p in (REPO / "pipelines").glob("*.py")))
def test_help_answers_without_torch_or_ray(pipeline):
    """`--help` shows the fields and imports neither torch nor ray nor mlflow, so it answers at once."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{pipeline}', '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "heavy = {'torch', 'ray', 'mlflow', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO / "pipelines", capture_output=True, text=True, timeout=60,
        env={"PYTHONPATH": str(REPO), "PATH": "/usr/bin:/bin"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--config FILE" in done.stdout


@pytest.mark.parametrize("path", sorted((REPO / "conf").rglob("*.yaml")), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_shipped_file_fits_its_pipeline(path):
    """Each file under conf/ is accepted by the configuration of its pipeline."""
    import importlib

    module = importlib.import_module(f"adaconv.config.{path.parent.name}")
    model = getattr(module, f"{path.parent.name.capitalize()}Config")
    known = [f"--{n}={v}" for n, v in (("content", "c"), ("output", "o")) if n in model.model_fields]
    for name in ("source", "style", "model"):
        field = model.model_fields.get(name)
        if field is not None and (field.is_required() or field.default in ("", ())):
            known += [f"--{name}", "x"]
    load_config(model, ["--config", str(path), *known], prog="test", description="")


def test_all_that_is_missing_is_named_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"^required: --source, --output; give them as flags or in a --config file$"):
        load()
    with pytest.raises(ConfigError, match=r"^required: --output;"):
        load("--config", write(tmp_path / "1.yaml", "source: [a]\n"))


def test_what_does_not_fit_together_is_told_with_the_files_that_it_may_stand_in(tmp_path):
    (tmp_path / "k5.yaml").write_text("model:\n  kernel_size: 5\n")
    told = ["--content", "c", "--style", "s", "--output", "o", "--config", str(tmp_path / "k5.yaml")]
    with pytest.raises(ConfigError, match=r"^\S*/k5.yaml and command line: model.descriptor_size \(3\) must equal"):
        load_config(TrainConfig, told, prog="test", description="")


def test_a_dotted_key_of_a_file_is_told_how_to_be_written(tmp_path):
    (tmp_path / "dots.yaml").write_text("train.steps: 5\n")
    told = ["--content", "c", "--style", "s", "--output", "o", "--config", str(tmp_path / "dots.yaml")]
    with pytest.raises(
        ConfigError, match=r"dots.yaml: unknown key 'train.steps'; write train: \{steps: …\}, or a line"
    ):
        load_config(TrainConfig, told, prog="test", description="")
