"""A packed folder predicts what its run or blend did, with nothing but its requirements and without a network.

Where it is run as a stranger would run it, Python finds no other package, and ends at the first connection.
"""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import venv
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.utils import canonicalize_name
from PIL import Image

from foldwise.data.competition import load_dataset
from foldwise.errors import FoldwiseError, HubError, RecordError
from foldwise.files import sha256_bytes
from foldwise.records.store import load_run, read_probs, rows_of
from foldwise.records.submission import predict_as_described
from foldwise.serve import kernel as module
from foldwise.serve.kernel import (
    NEEDED,
    Kernel,
    build_kernel,
    download_wheels,
    kernel_lines,
    main,
    predict_folder,
    requirements_of,
)

REPO = Path(__file__).resolve().parents[2]
TEST_IDS = [str(number) for number in range(141, 171)]


@pytest.fixture(scope="session")
def project(asked_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with the runs `tiny` and `twice` and a blend of both, and what pins packages; read-only."""
    root = Path(shutil.copytree(asked_root, tmp_path_factory.mktemp("kernel") / "project"))
    shutil.copy(REPO / "requirements.lock", root)
    return root


@pytest.fixture(scope="session")
def packed(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    """The kernel of the run `tiny`; read-only."""
    return build_kernel(project, "tiny", tmp_path_factory.mktemp("packed") / "kernel", say=lambda _line: None)


@pytest.fixture
def images(project: Path, tmp_path: Path) -> Path:
    """A folder of the test images alone."""
    folder = tmp_path / "images"
    folder.mkdir()
    for image in TEST_IDS:
        shutil.copy(project / "inputs" / "demo" / "images" / f"{image}.jpg", folder)
    return folder


def said_of(packed: Kernel, source: Path, out: Path, **options: Any) -> list[str]:
    said: list[str] = []
    root = packed.path / "project"
    predict_folder(root, packed.name, source, out, device="cpu", say=said.append, **options)
    return said


def rows_in(file: Path) -> list[list[str]]:
    return list(csv.reader(io.StringIO(file.read_text())))


def labels_of(project: Path, run: str) -> dict[str, str]:
    """What a run says of each test image."""
    classes = load_dataset(project, "demo").competition.classes
    (ids,), probs = read_probs(project / "oof" / run / "test.csv", ("id",), classes)
    return dict(zip(ids.tolist(), np.array(classes)[probs.argmax(axis=1)].tolist(), strict=True))


def bare_environment(kernel: Path, to: Path) -> Path:
    """A Python that has nothing but the requirements of a kernel, and ends with status 97 at the first connection."""
    venv.EnvBuilder(with_pip=False, symlinks=True).create(to)
    (site,) = to.glob("lib/python*/site-packages")
    for name in re.findall(r"^([\w.-]+)==", (kernel / "requirements.txt").read_text(), re.MULTILINE):
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # another system's
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    cut = "import os, socket\ndef refuse(*_, **__):\n    os._exit(97)\n"
    cut += "socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse\n"
    (site / "sitecustomize.py").write_text(cut)
    return to / "bin" / "python"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="links stand in for an installation")
def test_a_blend_is_reproduced_with_its_requirements_alone_and_no_network(project: Path, tmp_path: Path) -> None:
    packed = build_kernel(project, "best", tmp_path / "kernel", say=lambda _line: None)
    assert (set(packed.runs), packed.models) == ({"tiny", "twice"}, 15)
    python = bare_environment(packed.path, tmp_path / "venv")
    alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": os.environ["PATH"]}
    tried = subprocess.run([python, "-c", "import socket; socket.create_connection(('127.0.0.1', 1))"], env=alone)
    assert tried.returncode == 97, "the network is cut"

    moved = packed.path.rename(tmp_path / "elsewhere")
    command = [python, moved / "predict.py", project / "handout", "--device", "cpu", "--probs", "probs.csv"]
    done = subprocess.run(command, env=alone, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder,) = (project / "submissions" / "demo").glob("2*")
    assert (tmp_path / "submission.csv").read_bytes() == (folder / "submission.csv").read_bytes()
    told = json.loads((folder / "blend.json").read_text())
    members = [load_run(project / "oof" / member["run"]) for member in told["members"]]
    blended = predict_as_described(told, [run.test_probs[rows_of(run.test_ids, np.array(TEST_IDS))] for run in members])
    (ids,), probs = read_probs(tmp_path / "probs.csv", ("id",), told["classes"])
    assert ids.tolist() == TEST_IDS
    np.testing.assert_allclose(probs, blended, rtol=0, atol=1e-5)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("images     30 of 170 images in ")
    assert lines[0].endswith("handout, 30 without a label")
    assert lines[1] == "rows       those of test_ids 141-170, in their order"
    assert lines[2].startswith(f"model      blend:{folder.name}: right on ")
    assert lines[-1] == "written    submission.csv, probs.csv"
    assert done.stderr == ""


def test_a_run_gives_its_test_rows_again(project: Path, packed: Kernel, images: Path, tmp_path: Path) -> None:
    said = said_of(packed, images, tmp_path / "out" / "submission.csv", probs_to=tmp_path / "probs.csv")
    classes = load_dataset(project, "demo").competition.classes
    (ids,), probs = read_probs(tmp_path / "probs.csv", ("id",), classes)
    (test_ids,), kept = read_probs(project / "oof" / "tiny" / "test.csv", ("id",), classes)
    np.testing.assert_allclose(probs, kept[rows_of(test_ids, ids)], rtol=0, atol=1e-5)
    answers = labels_of(project, "tiny")
    expected = [["id", "label"], *([image, answers[image]] for image in TEST_IDS)]
    assert rows_in(tmp_path / "out" / "submission.csv") == expected
    assert not any("note" in line for line in said)


@pytest.mark.parametrize("form", ["zip", "folder of all images", "part of them"])
def test_images_in_other_forms(form: str, project: Path, packed: Kernel, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "submission.csv"
    answers = labels_of(project, "tiny")
    if form == "zip":
        with zipfile.ZipFile(tmp_path / "test.zip", "w") as archive:
            for file in images.iterdir():
                archive.write(file, f"test/{file.name}")
        said = said_of(packed, tmp_path / "test.zip", out)
    elif form == "folder of all images":
        said = said_of(packed, project / "inputs" / "demo" / "images", out)
        assert said[0].startswith("images     30 of 170 images in ")
    else:
        (images / "150.jpg").unlink()
        said = said_of(packed, images, out)
        assert said[1] == "rows       all images without a label, in natural order; 1 of test_ids 141-170 are not there"
        del answers["150"]
    assert dict(rows_in(out)[1:]) == answers


def test_the_sample_submission_says_which_rows_in_what_order(
    project: Path, packed: Kernel, images: Path, tmp_path: Path
) -> None:
    wanted = ["150.jpg", "141", "170.jpg"]
    sample = images.parent / "sample_submission.csv"
    sample.write_text("image,emotion\n" + "".join(f"{image},happy\n" for image in wanted))
    said = said_of(packed, images, tmp_path / "submission.csv")
    answers = labels_of(project, "tiny")
    expected = [["image", "emotion"], *([image, answers[image.removesuffix(".jpg")]] for image in wanted)]
    assert rows_in(tmp_path / "submission.csv") == expected
    assert said[1] == f"rows       those of {sample.as_posix()}, in their order"

    (images / "sampleSubmission.csv").write_text("id,label\n142,happy\n")
    said_of(packed, images, tmp_path / "submission.csv")
    assert rows_in(tmp_path / "submission.csv") == [["id", "label"], ["142", answers["142"]]], "the nearer one counts"
    said_of(packed, images, tmp_path / "submission.csv", sample=sample)
    assert rows_in(tmp_path / "submission.csv") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,label\n7,x\n141,x\n8,x\n", "2 of 3 ids have no image, such as 7, 8"),
        ("id,angry,happy\n141,0,1\n", ":1: expected two columns, an id and a label, but got id,angry,happy"),
        ("id,label\n141,x\n141,x\n", "the id 141 is there more than once"),
        ("", ":1: expected two columns, an id and a label, but got an empty file"),
    ],
)
def test_samples_that_do_not_fit(packed: Kernel, images: Path, tmp_path: Path, text: str, message: str) -> None:
    sample = tmp_path / "sample_submission.csv"
    sample.write_text(text)
    with pytest.raises(FoldwiseError) as caught:
        said_of(packed, images, tmp_path / "submission.csv")
    assert message in str(caught.value).splitlines()[0]
    assert not (tmp_path / "submission.csv").exists()


def test_images_of_another_form_are_brought_to_the_competition_s_and_told(
    project: Path, packed: Kernel, images: Path, tmp_path: Path
) -> None:
    with Image.open(images / "141.jpg") as image:
        image.convert("RGB").resize((96, 96)).save(images / "141.jpg")
    said = said_of(packed, images, tmp_path / "submission.csv")
    assert "note       brought to 48x48 px, gray, from other sizes or colours: 1 images" in said
    others = {image: label for image, label in labels_of(project, "tiny").items() if image != "141"}
    assert others.items() <= dict(rows_in(tmp_path / "submission.csv")).items()


def test_what_cannot_be_read_is_named_and_nothing_is_written(packed: Kernel, images: Path, tmp_path: Path) -> None:
    (images / "142.jpg").write_bytes((images / "142.jpg").read_bytes()[:400])
    (images / "160.jpg").write_bytes(b"no image")
    with pytest.raises(FoldwiseError) as caught:
        said_of(packed, images, tmp_path / "submission.csv")
    assert "142.jpg: is truncated" in str(caught.value)
    assert "160.jpg: is no image: 8 bytes" in str(caught.value)
    assert not (tmp_path / "submission.csv").exists()


def test_labelled_images_are_no_test_images(project: Path, packed: Kernel, tmp_path: Path) -> None:
    damaged = shutil.copytree(project / "handout", tmp_path / "damaged")
    (damaged / "train.csv").write_text("id,label\n1,happy,sad\n")
    with pytest.raises(FoldwiseError, match="expected 2 cells, but got 3"):
        said_of(packed, damaged, tmp_path / "submission.csv")
    labelled = shutil.copytree(project / "handout", tmp_path / "labelled")
    more = "".join(f"{image},happy\n" for image in TEST_IDS)
    (labelled / "train.csv").write_text((labelled / "train.csv").read_text() + more)
    spec = tmp_path / "project"
    shutil.copytree(packed.path / "project", spec)
    described = spec / "inputs" / "demo" / "competition.yaml"
    described.write_text(re.sub("test_ids: .*", "", described.read_text()))
    with pytest.raises(FoldwiseError) as caught:
        predict_folder(spec, "tiny", labelled, tmp_path / "submission.csv", device="cpu", say=lambda _line: None)
    assert "all of the 170 images have a label\n  fix: give a folder of the test images alone" in str(caught.value)


def test_the_command_prints_errors_with_their_mend(
    packed: Kernel, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(packed.path, [str(tmp_path / "nowhere")]) == 2
    assert "nowhere: there is no such folder or zip\n  fix: give where the test images lie" in capsys.readouterr().err
    assert main(packed.path, [str(images), "--out", str(tmp_path / "s.csv"), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"written    {tmp_path / 's.csv'}"


def test_what_is_packed(project: Path, packed: Kernel) -> None:
    files = {file.relative_to(packed.path).as_posix() for file in packed.path.rglob("*") if file.is_file()}
    own = {file for file in files if not file.startswith("foldwise/")}
    weights = {f"project/oof/tiny/fold{fold}/seed42/weights.safetensors" for fold in range(5)}
    assert own == weights | {
        "README.md",
        "kernel.json",
        "predict.py",
        "requirements.txt",
        "project/inputs/demo/competition.yaml",
        *(f"project/oof/tiny/{name}" for name in ("run.json", "spec.yaml", "oof.csv", "test.csv")),
    }
    assert not any("__pycache__" in file or file.endswith((".jpg", ".png", ".npy")) for file in files)
    assert {"foldwise/serve/kernel.py", "foldwise/learn/predict.py"} <= files
    sizes = {
        part: sum((packed.path / file).stat().st_size for file in some)
        for part, some in (("weights", weights), ("rest", files - weights))
    }
    assert packed.sizes == sizes | {"wheels": 0}
    assert json.loads((packed.path / "kernel.json").read_text())["runs"] == ["tiny"]
    assert len((packed.path / "README.md").read_text().splitlines()) < 20
    lines = kernel_lines(packed, project)
    assert lines[0] == "packed     tiny: 5 models of 1 run (tiny)"
    assert lines[-1] == f"try it     python {packed.path.as_posix()}/predict.py <folder of test images>"


def test_an_earlier_kernel_is_replaced_and_nothing_else(project: Path, packed: Kernel, tmp_path: Path) -> None:
    out = shutil.copytree(packed.path, tmp_path / "kernel")
    shutil.rmtree(out / "project")
    build_kernel(project, "twice", out, say=lambda _line: None)
    assert [path.name for path in (out / "project" / "oof").iterdir()] == ["twice"]
    assert sorted(tmp_path.iterdir()) == [out], "no scratch is left"
    (out / "notebook.ipynb").write_text("{}")
    with pytest.raises(FoldwiseError) as caught:
        build_kernel(project, "tiny", out, say=lambda _line: None)
    assert str(caught.value) == (
        f"{out} holds something else than a kernel (notebook.ipynb)\n  fix: name a new folder, or empty it"
    )
    assert [path.name for path in (out / "project" / "oof").iterdir()] == ["twice"]


def test_what_cannot_be_packed(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = shutil.copytree(project, tmp_path / "lacking")
    (lacking / "oof" / "tiny" / "fold3" / "seed42" / "weights.safetensors").unlink()
    with pytest.raises(RecordError, match="oof/tiny: its weights are not on this machine: fold3/seed42"):
        build_kernel(lacking, "tiny", tmp_path / "kernel", say=lambda _line: None)
    monkeypatch.setattr(module, "LARGEST", 100_000)
    with pytest.raises(FoldwiseError) as caught:
        build_kernel(project, "tiny", tmp_path / "kernel", say=lambda _line: None)
    assert "the kernel of tiny has 0.0 GB, and Kaggle takes" in str(caught.value)
    assert "nothing was written" in str(caught.value)
    assert not (tmp_path / "kernel").exists()


# Requirements and wheels ----------------------------------------------------------------------------------------------


def test_requirements_are_the_lock_s_own_with_all_that_they_need() -> None:
    lock = REPO / "requirements.lock"
    needed = requirements_of(NEEDED, lock)
    assert set(NEEDED) <= needed.keys()
    assert needed.keys() >= {"torchvision", "huggingface-hub", "typing-extensions", "pydantic-core"}
    assert not needed.keys() & {"wandb", "optuna", "matplotlib", "albumentations", "scikit-learn", "pytest", "rich"}
    assert all(pin in lock.read_text() and "--hash=sha256:" in pin for pin in needed.values())
    for name in needed:
        for text in importlib.metadata.requires(name) or [] if _installed(name) else []:
            if ";" not in text:
                assert canonicalize_name(re.split(r"[^\w.-]", text)[0]) in needed


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def test_a_lock_that_lacks_something(tmp_path: Path) -> None:
    with pytest.raises(FoldwiseError, match=r"requirements\.lock is missing, which pins what a kernel needs\n  fix: "):
        requirements_of(["numpy"], tmp_path / "requirements.lock")
    (tmp_path / "requirements.lock").write_text("numpy==2.4.6 \\\n    --hash=sha256:0\n")
    assert requirements_of(["NumPy"], tmp_path / "requirements.lock") == {
        "numpy": "numpy==2.4.6 \\\n    --hash=sha256:0\n"
    }
    twice = "".join(
        f"numpy=={version} ; python_full_version {when} '3.12' \\\n    --hash=sha256:{version}\n"
        for version, when in (("2.4.6", "<"), ("2.5.5", ">="))
    )
    (tmp_path / "requirements.lock").write_text(twice)
    assert requirements_of(["numpy"], tmp_path / "requirements.lock") == {"numpy": twice}
    with pytest.raises(FoldwiseError, match=r"requirements\.lock does not pin filelock, which predicting needs"):
        requirements_of(["numpy", "filelock"], tmp_path / "requirements.lock")


@pytest.mark.slow
def test_wheels_are_downloaded_as_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "index" / "tiny_thing-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_thing.py", "")
        archive.writestr("tiny_thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n")
        archive.writestr("tiny_thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_thing-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(f"tiny-thing==1.0 --hash=sha256:{sha256_bytes(wheel.read_bytes())}\n")
    download_wheels(requirements, tmp_path / "wheels")
    assert (tmp_path / "wheels" / wheel.name).read_bytes() == wheel.read_bytes()
    requirements.write_text(f"tiny-thing==1.0 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(HubError) as caught:
        download_wheels(requirements, tmp_path / "others")
    assert str(caught.value).splitlines()[1].startswith("  fix: go online, or pack without wheels")
