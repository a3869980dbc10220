"""What a user can get wrong is answered in one clear line, with exit code 1 or 2 and no traceback."""

import http.server
import importlib
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.helpers import save_checkpoint

REPO = Path(__file__).parents[2]


def answer(capsys, name, *argv) -> tuple[int, str]:
    """Run a pipeline's main and return its exit code and what it wrote to stderr."""
    module = importlib.import_module(f"pipelines.{name}")
    try:
        code = module.main([str(argument) for argument in argv])
    except SystemExit as exit_:
        code = exit_.code
    written = capsys.readouterr()
    assert "Traceback" not in written.out + written.err
    return code, written.err


@pytest.fixture
def folders(tmp_path):
    """A folder each that is empty, has texts only, has an image, is a file."""
    for name in ("empty", "texts", "images"):
        (tmp_path / name).mkdir()
    (tmp_path / "texts" / "a.txt").write_text("x")
    (tmp_path / "images" / "a.jpg").write_bytes(b"x")
    (tmp_path / "file").write_text("x")
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ("shard", "--source", "{}/nothing", "--output", "{}/out"),
            "--source {}/nothing: expected a folder of images, found nothing",
        ),
        (("shard", "--source", "{}/empty", "--output", "{}/out"), "found an empty folder"),
        (("shard", "--source", "{}/texts", "--output", "{}/out"), "found 1 other files"),
        (("shard", "--source", "{}/file", "--output", "{}/out"), "found a file"),
        (("shard", "--source", "{}/images", "--output", "{}/file"), "--output: cannot make the folder {}/file"),
        (("shard", "--source", "{}/images", "--output", "{}/out", "--shard.target-md", "3"), "--shard.target-mb"),
        (("shard", "--source", "{}/images", "--output", "{}/out", "--shard.target-mb", "-1"), "shard.target_mb"),
        (("shard", "--source", "{}/images", "--output", "{}/out", "--config", "{}/no.yaml"), "{}/no.yaml"),
        (("shard", "--output", "{}/out"), "source"),
        (("shard", "--source", "{}/images", "--output", ""), "output: expected a path, found an empty one"),
        (("shard", "--source", "{}/images", "", "--output", "{}/out"), "source.1: expected a path, found an empty one"),
        (
            ("shard", "--source", "~nobody-here/x", "--output", "{}/out"),
            "source.0: expected a path, found ~nobody-here/x",
        ),
        (("register", "--model", ""), "model: expected a path, found an empty one"),
        (("shard", "--source", "{}/images", "--output", "{}/out@cafe"), "would be read as a version"),
        (
            ("train", "--content", "{}/empty", "--style", "{}/empty", "--output", "{}/out"),
            "expected a dataset version at {}/empty",
        ),
        (
            ("train", "--content", "{}/empty", "--style", "{}/empty", "--output", "{}/out", "--data.crop", "100"),
            "multiple of 8",
        ),
        (("register", "--model", "{}/empty", "--output", "{}/out"), "found no whole checkpoint below it"),
        (
            ("stylize", "--model", "{}/empty", "--content", "{}/empty", "--style", "{}/images", "--output", "{}/out"),
            "--content {}/empty: expected images",
        ),
        (
            ("stylize", "--model", "{}/empty", "--content", "{}/images", "--style", "{}/images", "--output", "{}/out"),
            "expected a checkpoint, a run or a folder of runs at {}/empty",
        ),
        (
            ("stylize", "--model", "m", "--content", "{}", "--style", "{}/images", "--output", "{}/out"),
            "--content {}: expected a folder apart from the outputs",
        ),
        (("stylize", "--tile.scratch", "s3://b/x"), "tile.scratch: expected a folder on a disk, found s3://b/x"),
        (
            ("train", "--content", "c", "--style", "s", "--output", "o", "--data.cache-dir", "s3://b/x"),
            "data.cache_dir: expected a folder on a disk, found s3://b/x",
        ),
        (
            ("train", "--content", "c", "--style", "s", "--output", "o", "--train.ledger", "s3://b/x"),
            "train.ledger: expected a folder on a disk, found s3://b/x",
        ),
        (("runs", "sync", "--runs", "s3://b/x"), "runs: expected a folder on a disk, found s3://b/x"),
        (("stylize", "--pairs", "random:1", "--seed", str(2**63)), "seed"),
        (("stylize", "--pairs", "random:1", "--seed", "-1"), "seed"),
        (
            (
                "stylize",
                "--model",
                "models:/none@champion",
                "--tracking.uri",
                "sqlite:///{}/m.db",
                "--content",
                "{}/images",
                "--style",
                "{}/images",
                "--output",
                "{}/out",
            ),
            "expected MLflow's database at {}/m.db, found none",
        ),
        (
            ("demo", "--content", "{}/nothing", "--output", "{}/out"),
            "--content {}/nothing: expected a folder of images, found nothing",
        ),
        (("demo", "--content", "{}/empty", "--output", "{}/out"), "--content {}/empty: expected images"),
        (("submit", "--working-dir", "."), "expected the job's command after --"),
        (("submit", "--dry-run", "--", "x", "--tracking.uri=http://me:secret@host"), "the URI carries a password"),
        (
            ("submit", "--", "x", "--tracking.uri", "http://me@host?access_token=secret"),
            "the URI carries a password or token",
        ),
        (("submit", "--working-dir", "{}/nothing", "--", "python", "x.py"), "--working-dir: expected a folder"),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, tuple) else value[:30],
)
def test_wrong_input_is_answered_in_a_line(capsys, folders, argv, words):
    code, err = answer(capsys, *(part.replace("{}", str(folders)) for part in argv))
    assert code in (1, 2), err
    assert words.replace("{}", str(folders)) in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission_is_answered(capsys, folders):
    locked = folders / "locked"
    locked.mkdir()
    locked.chmod(stat.S_IRUSR | stat.S_IXUSR)
    code, err = answer(capsys, "shard", "--source", folders / "images", "--output", locked / "out")
    assert code == 2
    assert "choose another" in err


def test_no_permission_is_answered_even_to_root(capsys, folders):
    """/proc takes no folder from anybody."""
    code, err = answer(capsys, "shard", "--source", folders / "images", "--output", "/proc/adaconv")
    assert code == 2
    assert "--output: cannot make the folder /proc/adaconv" in err


def test_a_damaged_checkpoint_is_named(capsys, folders):
    _, uri = save_checkpoint(folders / "run" / "checkpoints")
    (folders / "run" / "checkpoints" / "step-00000007" / "model.safetensors").write_bytes(b"x")
    argv = ("--content", folders / "images", "--style", folders / "images", "--output", folders / "out")
    code, err = answer(capsys, "stylize", "--model", uri, *argv)
    assert code == 1
    assert "model.safetensors is not the file that was saved" in err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("style\npaint.jpg\n", "row 1: expected columns content and style, found style"),
        ("content,style\na.jpg,other.jpg\n", "row 1: expected the name of a style that --style holds"),
        ("content,style,alpha\na.jpg,a.jpg,2\n", "row 1: alpha: Input should be less than or equal to 1, found '2'"),
        ("content,style,depth\na.jpg,a.jpg,2\n", "row 1: unknown columns depth"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True], ids=["", "dry-run"])
def test_wrong_pairs_are_told_before_a_cluster_is_started(capsys, folders, monkeypatch, text, words, dry_run):
    monkeypatch.setattr("adaconv.orchestration.cluster.connect", lambda: pytest.fail("a cluster was started"))
    _, model = save_checkpoint(folders / "run")
    (folders / "pairs.csv").write_text(text)
    argv = ("--model", model, "--content", folders / "images", "--style", folders / "images")
    argv += ("--output", folders / "out", "--pairs", folders / "pairs.csv", *["--dry-run"][: int(dry_run)])
    code, err = answer(capsys, "stylize", *argv)
    assert code == 2
    assert f"--pairs {folders / 'pairs.csv'}, {words}" in err


def test_a_tracking_server_that_is_none_is_said_soon(capsys, content_version, style_version, tmp_path):
    """Some other server listens there: it answers, so this is no outage that a training could outlast."""
    other = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    uri = f"http://127.0.0.1:{other.server_port}"
    argv = ("--content", content_version.root, "--style", style_version.root, "--output", tmp_path)
    code, err = answer(capsys, "train", *argv, "--tracking.uri", uri)
    other.shutdown()
    other.server_close()
    assert code == 1
    assert f"cannot open a run at {uri}" in err


@pytest.mark.parametrize(
    ("name", "argv", "flag"),
    [
        ("train", ("--content", "c", "--style", "s", "--output", "o"), "--tracking.uri"),
        ("register", ("--model", "m"), "--tracking.uri"),
        ("stylize", ("--model", "m", "--content", "c", "--style", "s", "--output", "o"), "--tracking.uri"),
        ("doctor", (), "--tracking-uri"),
        ("runs", ("sync", "--runs", "r"), "--tracking-uri"),
        ("runs", ("page", "--run", "r", "--output", "o"), "--tracking-uri"),
        ("runs", ("reap",), "--tracking-uri"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value[:1]),
)
def test_a_password_in_a_tracking_uri_is_refused_and_never_printed(capsys, tmp_path, name, argv, flag):
    main = importlib.import_module(f"pipelines.{name}").main
    file = tmp_path / "config.yaml"
    uri = "db://h/x?user=ann&password=secret"
    file.write_text(yaml.safe_dump({"tracking": {"uri": uri}} if flag == "--tracking.uri" else {"tracking_uri": uri}))
    for given in ((flag, "http://ann:secret@127.0.0.1:9"), ("--config", str(file))):
        assert main([*argv, *given]) == 2
        written = capsys.readouterr()
        assert "give it in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in written.err
        assert "secret" not in written.out + written.err


@pytest.mark.parametrize(
    ("name", "argv", "flag"),
    [
        ("train", ("--content", "c", "--style", "s", "--output", "o"), "--encoder.weights"),
        ("evaluate", ("--model", "m", "--content", "c", "--style", "s", "--output", "o"), "--judge.weights"),
        ("doctor", (), "--encoder-weights"),
        ("submit", ("--dry-run", "--", "python", "pipelines/train.py"), "--encoder.weights"),
    ],
)
def test_a_secret_in_the_url_of_weights_is_refused_and_never_printed(capsys, name, argv, flag):
    main = importlib.import_module(f"pipelines.{name}").main
    for place in (
        "ann:secret@h/v.pth",
        "secret@h/v.pth",
        "h/v.pth?private_token=secret",
        "h/v.pth?jwt=secret",
        "h/v.pth?a&X-Amz-Signature=secret",
    ):
        assert main([*argv, f"{flag}=https://{place}"]) == 2
        written = capsys.readouterr()
        assert "which would be printed and kept with runs" in written.err
        assert "secret" not in written.out + written.err


@pytest.mark.parametrize(
    ("flag", "given"),
    [
        ("--tracking.uri", "sqlite:///runs/mlflow.db"),
        ("--data.cache-dir", "cache"),
        ("--train.ledger", "ledger"),
        ("--resume", "images"),
        ("--encoder.weights", "file"),
    ],
)
def test_what_lies_in_the_folder_of_a_job_is_refused(capsys, folders, monkeypatch, flag, given):
    monkeypatch.chdir(folders)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    argv = ("--content", folders / "empty", "--style", folders / "empty", "--output", folders / "out")
    code, err = answer(capsys, "train", *argv, flag, given)
    assert code == 2
    assert f"{flag} {given}: a Ray job runs in a copy of the working directory" in err
    code, err = answer(capsys, "train", *argv, "--resume", "none", "--encoder.weights", "imagenet")
    assert "expected a dataset version" in err


STYLIZE = ("stylize", "--model", "m.pt", "--content", "/c", "--output", "/o")


@pytest.mark.parametrize(
    ("command", "refused"),
    [
        (
            ("stylize", "--replay", "out.png", "--content", "/contents", "--tile.scratch", "maps"),
            "error: --replay out.png, --tile.scratch maps: ",
        ),
        (("stylize", "--replay", "/out.png", "--content", "/contents"), ""),
        ((*STYLIZE, "--style", "/s", "--pairs", "p.csv"), "error: --pairs p.csv: "),
        ((*STYLIZE, "--style", "a", "b"), "error: --style a, --style b: "),
        (("doctor", "--encoder-weights", "p.csv"), "error: --encoder-weights p.csv: "),
        (("dataset", "append", "--dataset", "/d", "--source", "/s", "--exclude", "x"), "error: --exclude x: "),
        (("doctor",), ""),
        (("runs", "sync", "--runs", "runs"), "error: --runs runs: "),
        (("runs", "page", "--run", "one", "--against", "another", "--output", "/pages"), ""),
    ],
)
def test_paths_of_a_job_are_refused_and_names_of_runs_are_not(capsys, tmp_path, monkeypatch, command, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.csv").touch()  # else it is a word
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code, err = answer(capsys, *command, "--dry-run")
    assert code == (2 if refused else 0)
    assert refused in err


@pytest.mark.parametrize("name", ["ADACONV_CLUSTER_PATIENCE", "ADACONV_STORAGE_PATIENCE"])
@pytest.mark.parametrize("given", ["a minute", "", "-1", "nan"])
def test_a_setting_of_the_environment_that_is_no_number_is_answered_at_once(capsys, monkeypatch, name, given):
    monkeypatch.setenv(name, given)
    code, err = answer(capsys, "doctor", "--dry-run")
    assert code == 2
    assert f"{name}: expected a number of seconds, found {given!r}" in err


def started(*argv, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *argv]
    return subprocess.run(command, cwd=REPO, stderr=subprocess.PIPE, text=True, timeout=100, check=False, **options)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_paths_are_printed_where_the_terminal_has_not_their_letters(folders, encoding):
    folder = folders / "Gemälde"
    (folders / "images").rename(folder)
    done = started(
        *("pipelines/shard.py", "--source", folder, "--output", folders / "out", "--dry-run"),
        stdout=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ("Gem\\xe4lde" if encoding == "ascii" else "Gemälde") in done.stdout


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("shard", "--source"),
        ("shard", "--output"),
        ("stylize", "--content"),
        ("train", "--data.cache-dir"),
        ("dataset", "--dataset"),
        ("register", "--model"),
    ],
)
def test_a_path_that_is_no_text_is_refused(capsys, folders, name, flag):
    path = folders / os.fsdecode(b"images-\xff")
    (folders / "images").rename(path)
    command = ("verify",) if name == "dataset" else ()
    for given in ((flag, path), (f"{flag}={path}",)):
        code, err = answer(capsys, name, *command, *given, "--dry-run")
        assert code == 2
        assert re.search(rf"{flag}: expected a name in UTF-8, found the bytes b'.*images-\\xff'; rename it", err)


def test_a_result_holds_paths_that_are_no_text(folders):
    here = folders / os.fsdecode(b"here-\xff")  # such as the current folder, which no flag names
    code = (
        "import os, sys\n"
        "from adaconv import cli\n"
        "from adaconv.config.shard import ShardConfig\n"
        "def execute(config):\n"
        f"    return {{'root': os.fsdecode({os.fsencode(here)!r})}}\n"
        "sys.exit(cli.run(ShardConfig, None, prog='x.py', doc='', plan=str, execute=execute))\n"
    )
    done = started("-c", code, "--source", "a", "--output", folders / "out", stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert json.loads((folders / "out" / "result.json").read_text())["root"] == str(here)


def test_work_goes_on_where_its_lines_cannot_be_written(folders):
    """Behind `| head`, and on a full disk: no line becomes a traceback, and what was done is in result.json."""
    code = (
        "import logging, os, sys\n"
        "from adaconv import cli\n"
        "from adaconv.config.shard import ShardConfig\n"
        "def execute(config):\n"
        "    os.dup2(os.open('/dev/full', os.O_WRONLY), 1)\n"
        "    logging.info('a line')\n"
        "    return {'made': 3}\n"
        "sys.exit(cli.run(ShardConfig, None, prog='x.py', doc='', plan=str, execute=execute))\n"
    )
    (folders / "out").mkdir()
    done = started("-c", code, "--source", "a", "--output", folders / "out", stdout=subprocess.DEVNULL)
    assert done.returncode == 1
    assert json.loads((folders / "out" / "result.json").read_text())["made"] == 3
    assert done.stderr.startswith("x.py: error: No space left on device")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("shard", ["--help"]), ("dataset", ["--help"]), ("shard", ["--source", "a", "--output", "out", "--dry-run"])],
)
def test_a_reader_that_has_enough_is_no_error(folders, name, arguments):
    """`| head -1`: whatever is still in a buffer when Python ends."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    (folders / "a").mkdir(exist_ok=True)
    Image.new("RGB", (600, 600)).save(folders / "a" / "one.jpg")
    arguments = [str(folders / one) if one in ("a", "out") else one for one in arguments]
    with subprocess.Popen(
        [sys.executable, f"pipelines/{name}.py", *arguments], cwd=REPO, env=environment, text=True, **pipes
    ) as process:
        process.stdout.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (0, "")


def test_a_plan_that_a_full_disk_loses_is_an_error(folders):
    Image.new("RGB", (600, 600)).save(folders / "images" / "a.jpg")
    with open("/dev/full", "w") as full:
        arguments = ("--source", folders / "images", "--output", folders / "out", "--dry-run")
        done = started("pipelines/shard.py", *arguments, stdout=full)
    assert (done.returncode, done.stderr) == (1, "pipelines/shard.py: error: No space left on device\n")


def test_names_command_no_terminal(folders):
    """In plans, lines of the log and errors."""
    name = "a\x1b]0;owned\x07"
    (folders / name).mkdir()
    (folders / name / "notes.x\nERROR").write_text("no image")
    done = started(
        "pipelines/shard.py",
        "--source",
        folders / name,
        "--output",
        folders / "out",
        "--dry-run",
        stdout=subprocess.PIPE,
    )
    assert done.returncode == 2
    assert "a\\u001b]0;owned\\u0007: expected images" in done.stderr
    assert "found 1 other files (1 without an extension)" in done.stderr
    assert not set("\x1b\x07") & set(done.stdout + done.stderr)
    assert "\nERROR" not in done.stderr


@pytest.mark.parametrize("name", sorted(path.stem for path in (REPO / "pipelines").glob("*.py")))
def test_ctrl_c_while_python_imports_is_told_in_a_line(tmp_path, name):
    """Flags are read by tyro, which takes its time here."""
    (tmp_path / "tyro.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    command = [sys.executable, f"pipelines/{name}.py", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=REPO, env=environment, text=True, **pipes) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert err == f"pipelines/{name}.py: interrupted; the same command takes up where it stopped\n"
    assert process.returncode == 130


@pytest.mark.parametrize("name", ["shard", "train", "register", "evaluate", "stylize", "demo", "doctor", "submit"])
def test_help_explains_itself(capsys, name):
    module = importlib.import_module(f"pipelines.{name}")
    with pytest.raises(SystemExit) as exit_:
        module.main(["--help"])
    text = capsys.readouterr().out
    assert not exit_.value.code
    assert f"pipelines/{name}.py" in text
    examples = [line for line in module.__doc__.splitlines() if "pipelines/" in line or line.startswith("        ")]
    assert set(examples) <= {line.rstrip() for line in text.splitlines()}  # as they are, to be copied
    assert "--config" in text


def test_submit_that_is_no_longer_followed_says_that_the_job_goes_on(capsys, monkeypatch, tmp_path):
    submit = importlib.import_module("pipelines.submit")
    run = submit.subprocess.run

    def interrupted(line, **how):
        if "submit" in line:  # git is asked as well
            raise KeyboardInterrupt
        return run(line, **how)

    monkeypatch.setattr(submit.subprocess, "run", interrupted)
    assert submit.main(["--working-dir", str(tmp_path), "--", "python", "x.py"]) == 130
    assert "a job that was submitted goes on" in capsys.readouterr().err


def test_a_dry_run_of_submit_prints_a_line_for_the_shell(capsys):
    server = "http://alice@mlflow:5000"  # a name is no secret
    job = ["python", "pipelines/train.py", "--tracking.uri", server, f"--tracking.uri={server}", "--output", "my runs"]
    assert importlib.import_module("pipelines.submit").main(["--dry-run", "--", *job]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[-len(job) :] == job
    assert json.loads(words[words.index("--runtime-env-json") + 1])["env_vars"]
