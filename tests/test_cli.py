"""The commands from end to end: faults, training, kills, submissions, and the runs of record that are committed."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from foldwise.cli import BLENDS, CORRECTIONS, main
from foldwise.data.demo import draw_demo
from foldwise.files import sha256_file
from foldwise.records.calibration import PRIORS
from foldwise.records.ensemble import METHODS
from foldwise.records.store import load_run
from foldwise.records.submission import predict_as_described

REPO = Path(__file__).resolve().parents[1]
REAL = REPO / ".." / "shared" / "data" / "aspicv"
HEAVY = ("torch", "timm", "albumentations", "pandas", "sklearn", "wandb", "matplotlib", "optuna")

TINY = """\
name: {name}
competition: demo
model: {{arch: vit_tiny_patch16_224, image_size: 32, options: {{embed_dim: {width}, depth: 1, num_heads: 3}}}}
augment:
  - HorizontalFlip: {{p: 0.5}}
optim: {{lr: 3.0e-3}}
train: {{epochs: {epochs}, batch_size: 16, precision: fp32, threads: 1{train}}}
"""


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have settings of their own."""
    for name in ("DEVICE", "TRACK", *(name for name in os.environ if name.startswith("WANDB_"))):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRACK", "none")


def write_experiment(root: Path, name: str, *, width: int = 24, epochs: int = 1, train: str = "") -> None:
    path = root / "experiments" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(TINY.format(name=name, width=width, epochs=epochs, train=train))


def call(root: Path, *arguments: str) -> int:
    return main(["--root", str(root), *arguments])


@pytest.fixture
def root(demo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project to write in, the working directory too, with the experiment `tiny` that was never run."""
    copy = shutil.copytree(demo_root, tmp_path / "project")
    write_experiment(copy, "tiny")
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture(scope="session")
def trained(demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the runs `tiny`, `wide` and `peeking`, which watched the scored folds; read-only."""
    copy = shutil.copytree(demo_root, tmp_path_factory.mktemp("trained") / "project")
    write_experiment(copy, "tiny", epochs=2)
    write_experiment(copy, "wide", width=48, epochs=2)
    write_experiment(copy, "peeking", epochs=2, train=", keep: best, watch: scored")
    assert call(copy, "exp", "all", "--track", "none") == 0
    return copy


@pytest.fixture
def submittable(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = shutil.copytree(trained, tmp_path / "project")
    monkeypatch.chdir(copy)
    return copy


def read_csv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype={"id": str})


# Light commands -------------------------------------------------------------------------------------------------------


def heavy_modules_of(root: Path, *arguments: str) -> tuple[int, list[str], str]:
    """Run a command in a process of its own: its exit code, the heavy modules that it loaded, what it printed."""
    code = (
        "import sys; from foldwise.cli import main; code = main(sys.argv[1:]); "
        f"print(','.join(name for name in {HEAVY!r} if name in sys.modules)); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "--root", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    *printed, modules = done.stdout.splitlines()
    return done.returncode, modules.split(",") if modules else [], "\n".join([*printed, done.stderr])


@pytest.mark.slow
def test_the_committed_experiments_are_valid_and_check_loads_nothing_heavy() -> None:
    code, modules, printed = heavy_modules_of(REPO, "check")
    assert code == 0, printed
    assert modules == []
    count = len(list((REPO / "experiments").glob("*.yaml")))
    assert f"{count} of {count} experiments are valid" in printed


@pytest.mark.slow
def test_submit_loads_nothing_heavy(submittable: Path) -> None:
    code, modules, printed = heavy_modules_of(submittable, "submit", "--comp", "demo")
    assert code == 0, printed
    assert modules == []


@pytest.mark.slow
def test_results_names_another_competition_and_loads_nothing_heavy() -> None:
    code, modules, printed = heavy_modules_of(REPO, "results", "demo")
    assert (code, modules) == (2, [])
    assert "the choices are those of `aspicv`, but the results of `demo` were asked for" in printed


# Faults ---------------------------------------------------------------------------------------------------------------

FAULTY = """\
name: faulty
competition: demo
model: {arch: cnn_3block, dropout: much}
augment:
  - HorizontalFlip: {prob: 0.5}
optim:
  learning_rate: 2e-4
  lr: 1e-3
train: {epochs: 0}
name: faulty
"""
FAULTS = """\
experiments/faulty.yaml:3:36: `model.dropout` must be a number, but got the string 'much'
    3 | model: {arch: cnn_3block, dropout: much}
      |                                    ^^^^
experiments/faulty.yaml:5:22: `HorizontalFlip` has no parameter `prob`
    5 |   - HorizontalFlip: {prob: 0.5}
      |                      ^^^^
  fix: did you mean `p`? `HorizontalFlip` takes: p
experiments/faulty.yaml:7:3: unknown key `optim.learning_rate`
    7 |   learning_rate: 2e-4
      |   ^^^^^^^^^^^^^
  fix: did you mean `lr`? `optim` takes: backbone_lr_scale, clip_grad_norm, layer_decay, lr, \
momentum, name, weight_decay
experiments/faulty.yaml:9:17: `train.epochs` must be at least 1, but got 0
    9 | train: {epochs: 0}
      |                 ^
experiments/faulty.yaml:10:1: duplicate key `name`, first given in line 1
   10 | name: faulty
      | ^^^^
  fix: remove one of the two
5 errors; nothing ran.
"""


@pytest.mark.parametrize("command", ["check", "exp"])
def test_five_faults_are_told_at_once_and_nothing_runs(
    root: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (root / "experiments" / "faulty.yaml").write_text(FAULTY)
    assert call(root, command, "faulty") == 2
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", FAULTS)
    assert not (root / "oof").exists()


def test_check_tells_the_valid_ones_beside_the_faults(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "experiments" / "faulty.yaml").write_text(FAULTY)
    assert call(root, "check") == 2
    told = capsys.readouterr()
    assert told.err == FAULTS
    assert told.out.startswith("1 of 2 experiments are valid (")
    assert told.out.endswith(" s): tiny\n")


def test_check_tries_overrides(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(root, "check", "tiny", "--set", "optim.lr=1e-4", "--name", "slower") == 0
    assert capsys.readouterr().out == "slower: ok\n"
    assert call(root, "check", "tiny", "--set", "optim.lr=-1") == 2
    assert "--set optim.lr=-1: `optim.lr` must be more than 0, but got -1" in capsys.readouterr().err
    assert call(root, "check", "--set", "optim.lr=-1") == 2
    assert capsys.readouterr().err == (
        "--set changes one experiment, but none is named\n  fix: check EXP --set optim.lr=-1\n"
    )


REFUSED = [
    (
        ["exp", "tinny"],
        2,
        "there is no experiment `tinny` (no file {root}/experiments/tinny.yaml)\n"
        "  fix: did you mean `tiny`? experiments here: tiny\n",
    ),
    (
        ["exp", "tiny", "--track", "wandb,tensorbord"],
        2,
        "unknown tracker `tensorbord`\n  fix: --track wandb, tensorboard, wandb,tensorboard or none\n",
    ),
    (
        ["exp", "tiny", "--folds", "0,9"],
        2,
        "there is no fold 9: `demo` has folds 0, 1, 2, 3, 4\n  fix: FOLDS=0,1\n",
    ),
    (
        ["exp", "tiny", "--device", "gpu"],
        3,
        "unknown device 'gpu'\n  fix: DEVICE=cpu, cuda, cuda:<number> or mps\n",
    ),
    (
        ["submit", "--comp", "demo"],
        2,
        "there is no complete run of `demo` to submit\n  fix: make exp EXP=<experiment>\n",
    ),
    (
        ["submit", "--comp", "demo", "--runs", "tiny"],
        2,
        "tiny: no such run\n  fix: runs that can be blended: none\n",
    ),
    (
        ["submit", "--comp", "faces"],
        2,
        "inputs/faces/competition.yaml: there is no such file\n"
        "  fix: `make data COMP=faces FROM=<folder>`, where the folder holds what was handed out\n"
        "1 error; nothing was written.\n",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "message"), REFUSED, ids=[" ".join(item[0]) for item in REFUSED])
def test_what_cannot_be_done_says_so_and_writes_nothing(
    root: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert call(root, *arguments) == code
    told = capsys.readouterr()
    assert told.err == message.format(root=root)
    assert told.out == ""
    assert not (root / "oof").exists()
    assert not (root / "submissions").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEVICE", "cuda")
    assert call(root, "exp", "tiny") == 3
    assert capsys.readouterr().err == (
        "device 'cuda' was asked for, but torch sees 0 CUDA devices\n"
        "  fix: leave DEVICE out, or see docs/TROUBLESHOOTING.md (no GPU)\n"
    )
    assert not (root / "oof").exists()


def test_folds_that_are_no_numbers_are_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        call(root, "exp", "tiny", "--folds", "first")
    assert caught.value.code == 2
    assert "argument --folds: expected fold numbers such as 0,1, but got 'first'" in capsys.readouterr().err


@pytest.mark.slow
def test_pretrained_weights_without_the_hub(root: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(root / "empty")}
    changes = "model={arch: resnet18.a1_in1k, weights: pretrained, image_size: 48}"
    done = subprocess.run(
        [sys.executable, str(REPO / "run.py"), "exp", "tiny", "--set", changes],
        cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == (
        "the pretrained weights of `resnet18.a1_in1k` are not in the local cache, and the Hugging Face Hub cannot be "
        "reached"
    )
    assert '    - train from scratch: SET="model.weights=none"' in lines
    assert "Traceback" not in done.stderr


# Training -------------------------------------------------------------------------------------------------------------


def test_exp_tells_the_score_and_what_is_next(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(root, "exp", "tiny", "--folds", "1,0") == 0
    assert "2 of 5 units are kept; still to run: folds 2, 3, 4" in capsys.readouterr().out
    assert call(root, "exp", "tiny") == 0
    told = capsys.readouterr().out
    record = load_run(root / "oof" / "tiny").info
    assert f"tiny: OOF accuracy {record['score']:.4f} +- {record['standard_error']:.4f}" in told
    assert "oof/tiny" in told
    assert "make submit" in told
    log = (root / "oof" / "tiny" / "run.log").read_text()
    for fold in range(5):
        assert f"fold {fold} seed 42 epoch 1: " in log
    assert call(root, "exp", "tiny") == 0
    assert "tiny is complete and kept; FRESH=1 (--fresh) redoes it" in capsys.readouterr().out


def test_an_override_makes_another_experiment(root: Path) -> None:
    changes = ["--set", "optim.lr=1e-4 tta=[identity]", "--folds", "0"]
    assert call(root, "exp", "tiny", *changes) == 0
    (path,) = (root / "oof").iterdir()
    assert path.name.startswith("tiny_")
    assert len(path.name) == len("tiny_") + 6
    assert call(root, "exp", "tiny", *changes, "--name", "slower") == 0
    assert sorted(folder.name for folder in (root / "oof").iterdir()) == ["slower", path.name]
    spec = (root / "oof" / "slower" / "spec.yaml").read_text()
    assert spec.startswith("name: slower\n")
    assert "lr: 0.0001" in spec


def test_all_goes_on_past_a_faulty_one(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "experiments" / "faulty.yaml").write_text(FAULTY)
    assert call(root, "exp", "all", "--folds", "0") == 2
    told = capsys.readouterr().err
    assert told == f"faulty: {FAULTS}1 experiment did not finish: faulty\n"
    assert (root / "oof" / "tiny" / "fold0" / "seed42" / "unit.json").exists()


def test_another_spec_under_the_same_name_is_refused(submittable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_experiment(submittable, "tiny", epochs=3)
    assert call(submittable, "exp", "tiny") == 2
    assert capsys.readouterr().err == (
        "oof/tiny: holds a run of another spec:\n"
        "  train.epochs: 2 -> 3\n"
        "  fix: give this one a name (NAME=...), or redo it with --fresh\n"
        "1 error; nothing was written.\n"
    )


@pytest.mark.slow
def test_both_trackers_follow_a_run(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert call(root, "exp", "tiny", "--track", "wandb,tensorboard", "--project", "faces") == 0
    path = root / "oof" / "tiny"
    told = capsys.readouterr().out
    assert told.count("W&B: offline (WANDB_MODE=offline). Sync later: .venv/bin/wandb sync ") == 1
    record = load_run(path).info
    runs = {}
    for file in path.glob("wandb/offline-run-*/run-*.wandb"):
        command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(file)]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        records = [(record["type"], record[record["type"]]) for record in map(json.loads, lines)]
        (run,) = [content for kind, content in records if kind == "run"]
        summary: dict[str, Any] = {}
        for kind, content in records:
            summary |= content["update"] if kind == "summary" else {}
        epochs = [content["item"].get("epoch") for kind, content in records if kind == "history"]
        runs[run["display_name"]] = (run["run_group"], run["project"], epochs, summary)
    assert sorted(runs) == ["tiny", *(f"tiny/fold{fold}" for fold in range(5))]
    assert {run[:2] for run in runs.values()} == {("tiny", "faces")}
    for fold, score in record["fold_scores"].items():
        *_, epochs, summary = runs[f"tiny/fold{fold}"]
        assert epochs == [1]
        assert summary["score"] == pytest.approx(score)
    assert runs["tiny"][3]["oof/accuracy"] == pytest.approx(record["score"])
    boards = [folder.name for folder in (path / "tensorboard").iterdir()]
    assert sorted(boards) == [f"fold{fold}-seed42" for fold in range(5)]


# Kills ----------------------------------------------------------------------------------------------------------------

EPOCHS = 12


@pytest.fixture(scope="session")
def uninterrupted(demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run `long`, trained in one piece."""
    copy = shutil.copytree(demo_root, tmp_path_factory.mktemp("uninterrupted") / "project")
    write_experiment(copy, "long", epochs=EPOCHS)
    assert call(copy, "exp", "long", "--track", "none") == 0
    return copy / "oof" / "long"


def start(root: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(REPO / "run.py"), "--root", str(root), "exp", "long", "--track", "none"]
    # Tests that a shell started in the background ignore Ctrl-C, and so would what they start.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool], seconds: float = 240.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.005)


def end(process: subprocess.Popen[str], sent: signal.Signals) -> tuple[int, str, str]:
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def assert_same_predictions(path: Path, other: Path) -> None:
    for name in ("oof.csv", "test.csv"):
        assert (path / name).read_bytes() == (other / name).read_bytes()
    assert load_run(path).info["weights"] == load_run(other).info["weights"]


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_epoch_and_ends_with_the_same_bytes(
    root: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_experiment(root, "long", epochs=EPOCHS)
    path = root / "oof" / "long"

    def logged(line: str) -> bool:
        return (path / "run.log").exists() and line in (path / "run.log").read_text()

    killed = start(root)
    wait_for(killed, lambda: logged("fold 1 seed 42 epoch 3: "))
    assert end(killed, signal.SIGKILL)[0] == -signal.SIGKILL
    first = path / "fold0" / "seed42" / "unit.json"
    finished = first.stat().st_mtime_ns
    assert not (path / "fold1" / "seed42" / "unit.json").exists()
    assert not (path / "run.json").exists()

    stopped = start(root)
    wait_for(stopped, lambda: logged("fold 2 seed 42 epoch 2: "))
    code, out, err = end(stopped, signal.SIGINT)
    assert (code, err) == (130, "\nstopped; the same command goes on from the last finished epoch\n")
    assert "1 kept from before" in out
    (line,) = [line for line in out.splitlines() if "goes on after epoch" in line]
    epoch = int(line.split("goes on after epoch ")[1].split()[0])
    assert line.endswith(f"fold 1, seed 42: goes on after epoch {epoch} of {EPOCHS}")
    assert 3 <= epoch < EPOCHS

    assert call(root, "exp", "long") == 0
    assert "fold 2, seed 42: goes on after epoch " in capsys.readouterr().out
    assert first.stat().st_mtime_ns == finished
    assert_same_predictions(path, uninterrupted)
    assert len(pd.read_csv(path / "history.csv")) == 5 * EPOCHS


@pytest.mark.slow
def test_kills_at_early_moments_leave_nothing_that_changes_the_result(root: Path, uninterrupted: Path) -> None:
    write_experiment(root, "long", epochs=EPOCHS)
    path = root / "oof" / "long"
    for delay_s in (0.0, 0.15, 0.5):
        process = start(root)
        before = path.joinpath(".state.json").stat().st_mtime_ns if path.joinpath(".state.json").exists() else 0
        wait_for(process, lambda: _changed(path / ".state.json", before))  # noqa: B023
        time.sleep(delay_s)
        end(process, signal.SIGKILL)
    assert call(root, "exp", "long") == 0
    assert_same_predictions(path, uninterrupted)
    assert not list(path.rglob("*.tmp"))


def _changed(path: Path, before: int) -> bool:
    return path.exists() and path.stat().st_mtime_ns > before


# Submissions ----------------------------------------------------------------------------------------------------------


def test_the_command_knows_every_way_to_blend() -> None:
    assert (BLENDS, CORRECTIONS) == (METHODS, PRIORS)


def recomputed_labels(root: Path, blend: dict[str, Any]) -> pd.Series:
    """The labels of a blend, from its members' weights and their test.csv alone."""
    tables = [read_csv(root / "oof" / member["run"] / "test.csv").set_index("id") for member in blend["members"]]
    assert sum(member["weight"] for member in blend["members"]) == pytest.approx(1, abs=1e-5)
    probs = predict_as_described(blend, [table.loc[tables[0].index].to_numpy() for table in tables])
    return pd.Series([blend["classes"][index] for index in probs.argmax(axis=1)], index=tables[0].index)


def test_a_score_is_noted_and_listed(submittable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(submittable, "submit", "--comp", "demo") == 0
    blend = (submittable / "submissions" / "demo" / "blend.json").read_bytes()
    capsys.readouterr()
    assert call(submittable, "submit", "--comp", "demo", "--score", "0.5", "--images", "10") == 0
    assert "0.5000" in capsys.readouterr().out
    assert (submittable / "submissions" / "demo" / "blend.json").read_bytes() == blend
    assert call(submittable, "submissions", "--comp", "demo", "--json") == 0
    (listed,) = json.loads(capsys.readouterr().out)["submissions"]
    assert (listed["public"]["score"], listed["public"]["images"]) == (0.5, 10)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--message", "hello"], "--message has no effect alone\n  fix: give --kaggle too\n"),
        (["--of", "abc"], "--of has no effect alone\n  fix: give --score or --kaggle too\n"),
        (
            ["--score", "0.5", "--prior", "train"],
            "--score and --prior do not go together\n  fix: one after the other\n",
        ),
        (
            ["--kaggle", "no/name"],
            "KAGGLE=no/name: is not the name of a competition\n"
            "  fix: give the end of its address, kaggle.com/competitions/<this>\n",
        ),
        (
            ["--score", "0.5", "--method", "mean"],
            "--score and --method do not go together\n  fix: one after the other\n",
        ),
        (
            ["--kaggle", "faces", "--of", "abc", "--track", "strict"],
            "--of and --track do not go together\n  fix: one after the other\n",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused(
    submittable: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert call(submittable, "submit", "--comp", "demo", *arguments) == 2
    assert capsys.readouterr().err == expected
    assert not (submittable / "submissions").exists()


def test_a_blend_may_be_told_how(submittable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--runs", "tiny,wide", "--method", "logit_mean", "--prior", "train"]
    assert call(submittable, "submit", "--comp", "demo", *arguments) == 0
    blend = json.loads((submittable / "submissions" / "demo" / "blend.json").read_text())
    assert (blend["method"], blend["prior"]["kind"]) == ("logit_mean", "train")
    assert "only `logit_mean` was asked for" in capsys.readouterr().out


def test_the_strict_track_is_made_and_scored_apart(submittable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = submittable / "oof" / "wide" / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"external": ["faces"]}))
    arguments = ["submit", "--comp", "demo", "--track", "strict"]
    assert call(submittable, *arguments, "--runs", "tiny,wide") == 2
    assert capsys.readouterr().err == (
        "TRACK=strict: not of competition data only: wide\n  fix: leave these out of RUNS, or TRACK\n"
    )
    assert call(submittable, *arguments) == 0
    folder = submittable / "submissions" / "demo"
    assert not (folder / "submission.csv").exists()
    assert "wide" not in json.loads((folder / "strict.json").read_text())["considered"]
    assert call(submittable, "submit", "--comp", "demo") == 0
    capsys.readouterr()
    assert call(submittable, *arguments, "--score", "0.5", "--images", "10") == 0
    (scored,) = folder.glob("*/public.json")
    assert (scored.parent / "blend.json").read_bytes() == (folder / "strict.json").read_bytes()


def test_runs_are_compared_as_text_json_csv_and_a_page(submittable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare = ["compare", "--comp", "demo", "--runs", "tiny,wide"]
    assert call(submittable, *compare) == 0
    assert "Is the difference real?" in capsys.readouterr().out
    assert call(submittable, *compare, "--json") == 0
    (group,) = json.loads(capsys.readouterr().out)["groups"]
    assert {row["run"] for row in group["runs"]} == {"tiny", "wide"}
    assert call(submittable, *compare, "--csv") == 0
    table = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert table["score"].tolist() == [row["score"] for row in group["runs"]]
    assert call(submittable, *compare, "--html", "--no-pictures") == 0
    assert capsys.readouterr().out == "written  oof/compare.html\n"
    assert '"picture": "data:image/png' not in (submittable / "oof" / "compare.html").read_text()
    assert call(submittable, *compare, "--html") == 0
    assert '"picture": "data:image/png' in (submittable / "oof" / "compare.html").read_text()
    assert call(submittable, *compare, "--no-pictures") == 2
    assert call(submittable, *compare, "--html", "oof/tiny/run.json") == 2
    assert json.loads((submittable / "oof" / "tiny" / "run.json").read_text())["experiment"] == "tiny"


def test_training_and_test_images_are_told_apart_or_not(submittable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(submittable, "drift", "--comp", "demo") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "written  inputs/demo/drift.json, inputs/demo/drift.png"


def test_nothing_is_sent_where_nothing_is_kept(submittable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(submittable, "sync", "nothing") == 2
    assert call(submittable, "sync") == 0
    assert "there is nothing on disk to send" in capsys.readouterr().out


def test_a_submission_holds_the_blends_labels_for_every_test_image(
    submittable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(submittable, "submit", "--comp", "demo", "--runs", "tiny,wide") == 0
    told = capsys.readouterr().out
    folder = submittable / "submissions" / "demo"
    submission = pd.read_csv(folder / "submission.csv", dtype=str)
    blend = json.loads((folder / "blend.json").read_text())
    assert list(submission.columns) == ["id", "label"]
    assert submission["id"].tolist() == [str(number) for number in range(141, 171)]
    assert submission["label"].tolist() == recomputed_labels(submittable, blend)[submission["id"]].tolist()
    counts = submission["label"].value_counts().to_dict()
    assert {name: count for name, count in blend["counts"].items() if count} == counts

    assert set(blend) == {
        "schema_version", "competition", "metric", "method", "members", "considered", "estimate", "naive",
        "expectation", "classes", "counts", "folds_sha256", "submission_sha256", "marks", "external",
        "weights_are", "bias", "calibration", "prior", "choice", "tried",
    }  # fmt: skip
    assert (blend["competition"], blend["metric"], blend["considered"]) == ("demo", "accuracy", ["tiny", "wide"])
    assert blend["submission_sha256"] == sha256_file(folder / "submission.csv")
    assert (blend["marks"], blend["external"]) == ([], [])
    low, high = blend["estimate"]["interval"]
    assert low < blend["estimate"]["score"] < high
    assert f"estimate     {blend['estimate']['score']:.4f} +- " in told
    for member in blend["members"]:
        record = load_run(submittable / "oof" / member["run"]).info
        assert (member["score"], member["hashes"]) == (record["score"], record["hashes"])
        assert blend["folds_sha256"] == record["hashes"]["folds"]
    (kept,) = [path for path in folder.iterdir() if path.is_dir()]
    for name in ("submission.csv", "blend.json"):
        assert (kept / name).read_bytes() == (folder / name).read_bytes()
    assert f"kept in submissions/demo/{kept.name}" in told


def test_the_same_runs_give_the_same_submission(submittable: Path) -> None:
    contents = []
    for _ in range(2):
        assert call(submittable, "submit", "--comp", "demo") == 0
        contents.append((submittable / "submissions" / "demo" / "submission.csv").read_bytes())
        blend = json.loads((submittable / "submissions" / "demo" / "blend.json").read_text())
        assert blend["considered"] == ["peeking", "tiny", "wide"]
    assert contents[0] == contents[1]


def test_a_single_run_is_submitted_as_it_is(submittable: Path) -> None:
    assert call(submittable, "submit", "--comp", "demo", "--runs", "wide") == 0
    blend = json.loads((submittable / "submissions" / "demo" / "blend.json").read_text())
    record = load_run(submittable / "oof" / "wide").info
    assert (blend["method"], [member["weight"] for member in blend["members"]]) == ("single", [1.0])
    assert blend["estimate"]["score"] == blend["naive"] == record["score"]


def test_the_mark_of_a_member_follows_into_the_blend(submittable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_run(submittable / "oof" / "peeking").info["marks"] == ["optimistic"]
    assert call(submittable, "submit", "--comp", "demo", "--runs", "peeking") == 0
    assert "marks        optimistic\n" in capsys.readouterr().out
    assert json.loads((submittable / "submissions" / "demo" / "blend.json").read_text())["marks"] == ["optimistic"]


def test_runs_that_cannot_be_blended_are_told(submittable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_experiment(submittable, "part", epochs=1)
    assert call(submittable, "exp", "part", "--folds", "0") == 0
    assert call(submittable, "exp", "tiny", "--smoke") == 0
    (submittable / "oof" / "wide" / "oof.csv").write_text("")
    capsys.readouterr()
    assert call(submittable, "submit", "--comp", "demo") == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "left out: part: is not complete: 1 of 5 units"
    assert told[1].startswith("left out: wide: is not the file that run.json vouches for")
    assert [line for line in told if line.startswith("left out")] == told[:2]
    blend = json.loads((submittable / "submissions" / "demo" / "blend.json").read_text())
    assert blend["considered"] == ["peeking", "tiny"]
    assert call(submittable, "submit", "--comp", "demo", "--runs", "part") == 2
    assert capsys.readouterr().err == (
        "part: is not complete: 1 of 5 units\n  fix: runs that can be blended: peeking, tiny\n"
    )


# What is made of kept runs --------------------------------------------------------------------------------------------


def test_a_finished_run_has_its_report_and_a_kept_one_is_not_drawn_again(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(root, "exp", "tiny") == 0
    assert capsys.readouterr().out.endswith("  report     oof/tiny/report\n")
    report = root / "oof" / "tiny" / "report"
    assert {"history.png", "confusion.png", "classification_report.txt"} <= {path.name for path in report.iterdir()}
    (report / "history.png").unlink()
    assert call(root, "exp", "tiny") == 0
    assert not (report / "history.png").exists()
    assert call(root, "report", "tiny") == 0
    assert (report / "history.png").exists()


@pytest.mark.slow
def test_runs_are_drawn_explained_evaluated_and_published(
    submittable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(submittable, "plot", "tiny", "wide") == 0
    assert (submittable / "oof" / "comparison.png").exists()
    assert call(submittable, "explain", "tiny", "--count", "2") == 0
    assert (submittable / "oof" / "tiny" / "report" / "explain.png").exists()
    draw_demo(submittable / "other", train=60, test=1, seed=9)
    capsys.readouterr()
    assert call(submittable, "eval", "tiny", "--on", "other", "--map", "disgust=angry", "--name", "more") == 0
    scored = json.loads((submittable / "oof" / "tiny" / "eval" / "more" / "eval.json").read_text())
    table = read_csv(submittable / "oof" / "tiny" / "eval" / "more" / "predictions.csv")
    assert f"accuracy {scored['score']:.4f} +- {scored['standard_error']:.4f}" in capsys.readouterr().out
    assert "disgust" not in set(table["label"])
    card = submittable / "card"
    assert call(submittable, "publish", "tiny", "--repo", "me/tiny", "--license", "mit", "--dry-run", str(card)) == 0
    assert "license: mit" in (card / "README.md").read_text()


def test_an_origin_of_data_is_asked_for(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        call(root, "data", "--comp", "faces")
    assert ended.value.code == 2
    assert "one of the arguments --from --kaggle is required" in capsys.readouterr().err


# The home competition's own data --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A project with the real data taken in under the committed description and folds, and what `data` printed."""
    if not REAL.is_dir():
        pytest.skip("the competition's data is not beside the checkout (../shared/data/aspicv)")
    copy = tmp_path_factory.mktemp("real")
    shutil.copytree(REPO / "experiments", copy / "experiments")
    (copy / "inputs" / "aspicv").mkdir(parents=True)
    for name in ("competition.yaml", "folds.csv"):
        shutil.copy(REPO / "inputs" / "aspicv" / name, copy / "inputs" / "aspicv")
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert call(copy, "data", "--comp", "aspicv", "--from", str(REAL)) == 0
    return copy, printed.getvalue()


@pytest.mark.slow
def test_the_real_data_is_told_in_numbers(real: tuple[Path, str]) -> None:
    copy, told = real
    assert "aspicv: 2,700 labelled and 300 test images" in told
    counts = {"angry": 355, "disgust": 39, "fear": 413, "happy": 640, "neutral": 489, "sad": 451, "surprise": 313}
    rows = [line.split() for line in told.splitlines()]
    assert {name: int(row[1]) for name in counts for row in rows if row and row[0] == name and len(row) == 3} == counts
    assert "29 pairs of near-duplicates" in told
    for name in ("competition.yaml", "folds.csv"):
        assert (copy / "inputs" / "aspicv" / name).read_bytes() == (REPO / "inputs" / "aspicv" / name).read_bytes()


@pytest.mark.slow
def test_a_smoke_run_of_the_vit_on_the_real_data(real: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    copy, _ = real
    changes = "model.weights=none model.arch=vit_tiny_patch16_224"
    assert call(copy, "exp", "vit_mixup", "--set", changes, "--name", "small", "--smoke") == 0
    record = load_run(copy / "oof" / ".smoke" / "small").info
    assert (record["smoke"], record["n_scored"], record["tta"]) == (True, 64, ["identity", "hflip", "zoom_1.1"])
    assert "a smoke run's score means nothing" in capsys.readouterr().out


# Runs of record -------------------------------------------------------------------------------------------------------

# Those of the demo are everyone's own.
RECORDS = [path.parent for path in sorted((REPO / "oof").glob("*/run.json")) if not path.parent.name.startswith("demo")]
# The newest of each track: its copy, the description beside it, and what makes it again.
SUBMISSIONS = [
    (submission, description, arguments)
    for submission, description, arguments in (
        ("submission.csv", "blend.json", []),
        ("strict.csv", "strict.json", ["--track", "strict"]),
    )
    if (REPO / "submissions" / description).exists()
]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name)
def test_a_run_of_record_is_what_its_files_say(path: Path) -> None:
    run = load_run(path)
    assert not run.info["smoke"]
    if run.info["score"] is None:  # all images were trained on: starting weights for other runs
        assert not (path / "oof.csv").exists()
        assert not len(run.ids)
        history = pd.read_csv(path / "history.csv")
        assert len(history) == yaml.safe_load((path / "spec.yaml").read_text())["train"]["epochs"]
        return
    oof = read_csv(path / "oof.csv")
    probs = oof.filter(like="p_").rename(columns=lambda name: name.removeprefix("p_"))
    hits = probs.idxmax(axis=1) == oof["label"]
    assert run.info["metric"] == "accuracy"
    assert hits.mean() == run.info["score"]
    assert hits.groupby(oof["fold"]).mean().to_dict() == {int(k): v for k, v in run.info["fold_scores"].items()}
    folds = pd.read_csv(REPO / "inputs" / run.info["competition"] / "folds.csv", dtype={"id": str})
    folds = (folds[folds["split"] == 0] if "split" in folds else folds).set_index("id")["fold"]
    folds = folds[folds >= 0]
    assert oof.set_index("id")["fold"].to_dict() == folds.to_dict()


@pytest.mark.parametrize(("submitted", "description", "arguments"), SUBMISSIONS, ids=[name for name, *_ in SUBMISSIONS])
def test_the_committed_submission_is_what_its_runs_give(
    submitted: str, description: str, arguments: list[str], tmp_path: Path
) -> None:
    folder = REPO / "submissions"
    blend = json.loads((folder / description).read_text())
    submission = pd.read_csv(folder / submitted, dtype=str)
    competition = blend["competition"]
    assert set(submission["label"]) <= set(blend["classes"])
    if competition == "aspicv":
        assert submission["id"].tolist() == [str(number) for number in range(2701, 3001)]
    assert submission["label"].tolist() == recomputed_labels(REPO, blend)[submission["id"]].tolist()

    (tmp_path / "inputs" / competition).mkdir(parents=True)
    for name in ("competition.yaml", "folds.csv"):
        shutil.copy(REPO / "inputs" / competition / name, tmp_path / "inputs" / competition)
    for name in blend["considered"]:
        (tmp_path / "oof" / name).mkdir(parents=True)
        for file in ("spec.yaml", "oof.csv", "test.csv", "history.csv", "run.json"):
            shutil.copy(REPO / "oof" / name / file, tmp_path / "oof" / name)
    assert call(tmp_path, "submit", "--comp", competition, "--runs", ",".join(blend["considered"]), *arguments) == 0
    for name in (submitted, description):
        assert (tmp_path / "submissions" / name).read_bytes() == (folder / name).read_bytes()
