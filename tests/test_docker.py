"""The container files keep what docs/SERVING.md promises of them: no root, no open port, no data, nothing unpinned.

They are parsed, not built: no engine is needed.
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from fnmatch import translate
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from foldwise.cli import _parser
from foldwise.stats import wilson

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SERVICES = ("serve", "train", "serve-gpu", "train-gpu")


@dataclass
class Stage:
    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, word: str) -> list[str]:
        return [text for step, text in self.steps if step == word]


def instructions(text: str) -> list[tuple[str, str]]:
    """Word and rest of each instruction; a here-document is left out, but for its head."""
    lines, found = iter(text.splitlines()), []
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        whole = line
        while whole.endswith("\\"):
            whole = whole[:-1] + next(lines).strip()
        if here := re.search(r"<<-?'?(\w+)'?", whole):
            while next(lines) != here[1]:
                pass
        word, rest = whole.split(None, 1)
        found.append((word, rest))
    return found


def stages() -> dict[str, Stage]:
    """Stages by name, in order."""
    found: dict[str, Stage] = {}
    for word, rest in instructions(DOCKERFILE):
        if word == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()  # type: ignore[union-attr]
            found[name] = Stage(name, base)
        elif found:
            list(found.values())[-1].steps.append((word, rest))
    return found


@cache
def services() -> dict[str, dict[str, Any]]:
    loaded: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    return loaded


def image_lock_script() -> str:
    match = re.search(r"^COPY <<'PY' image_lock\.py\n(.*?)^PY$", DOCKERFILE, re.MULTILINE | re.DOTALL)
    assert match
    return match[1]


def kept_out(path: str) -> bool:
    """Whether .dockerignore keeps a path out: the last line that matches it or a folder above it decides."""
    out = False
    parts = path.split("/")
    above = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.lstrip("!")
        if not line or line.startswith("#"):
            continue
        # `*` stays within a folder, `**/` is any number of them.
        expression = translate(pattern.removeprefix("**/")).replace(".*", "[^/]*").replace(r"\z", r"\Z")
        matched = [one for one in above if re.match(expression, one)]
        if pattern.startswith("**/"):
            matched += [one for one in parts if re.match(expression, one)]
        if matched:
            out = not line.startswith("!")
    return out


def test_every_stage_begins_at_one_pinned_base() -> None:
    found = stages()
    for stage in found.values():
        assert stage.base == "${BASE}" or stage.base in list(found)[: list(found).index(stage.name)]
    base = re.search(r"^ARG BASE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert base
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base[1]), "a tag of one version, to which a digest may be added"
    assert "latest" not in DOCKERFILE


@pytest.mark.parametrize("target", ["train", "serve"])
def test_a_container_never_runs_as_root(target: str) -> None:
    found = stages()
    line = [found[target]]
    while line[-1].base in found:
        line.append(found[line[-1].base])
    steps = [step for stage in reversed(line) for step in stage.steps]
    last = max(n for n, (word, _) in enumerate(steps) if word == "USER")
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", steps[last][1]), "a number, so that Kubernetes can check it"
    assert not [word for word, _ in steps[last:] if word in ("RUN", "COPY", "ADD")]
    assert dict(steps)["STOPSIGNAL"] == "SIGINT"
    assert all(json.loads(text) for word, text in steps if word in ("CMD", "ENTRYPOINT")), "no shell takes the signal"


def test_only_the_server_has_a_health_check_and_a_port() -> None:
    found = stages()
    assert "http://127.0.0.1:8000/health" in found["serve"].all("HEALTHCHECK")[0]
    assert found["serve"].all("EXPOSE") == ["8000"]
    for name in ("base", "train"):
        assert not found[name].all("HEALTHCHECK") + found[name].all("EXPOSE")


def test_every_install_is_by_hash_offline_or_the_one_pair_of_torch() -> None:
    installs = [
        part.strip()
        for stage in stages().values()
        for text in stage.all("RUN")
        for part in re.split(r"&&|;|\bthen\b", text)
        if re.search(r"\bpip (install|wheel)\b", part)
    ]
    assert len(installs) == 4
    for line in installs:
        pair = 'PIP_INDEX_URL="$TORCH_INDEX" pip install --no-deps --requirement torch.txt' in line
        assert pair or "--require-hashes" in line or "--no-index" in line or "--no-build-isolation" in line, line
    assert re.findall(r"https?://[\w.]+", DOCKERFILE) == ["https://download.pytorch.org", "http://127.0.0.1"]
    for text in (text for stage in stages().values() for text in stage.all("RUN")):
        assert "--no-cache-dir" in text or "type=cache" in text or "pip" not in text or "venv /opt" in text, text


def test_what_is_copied_is_there_and_let_in() -> None:
    for stage in stages().values():
        for text in stage.all("COPY"):
            if text.startswith(("--from", "<<")):
                continue
            for source in shlex.split(text)[:-1]:
                assert (ROOT / source).exists(), source
                assert not kept_out(source), source
    package = [file for file in (ROOT / "src").rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    package = [file for file in package if not any(part.endswith(".egg-info") for part in file.parts)]
    left = [file.relative_to(ROOT).as_posix() for file in package if kept_out(file.relative_to(ROOT).as_posix())]
    assert left == []


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".venv/bin/python",
        ".env",
        "src/.env",
        "src/foldwise/.env",
        "inputs/aspicv/images/1.jpg",
        "inputs/aspicv/train.csv",
        "oof/resnet18/fold0/seed42/weights.safetensors",
        "oof/resnet18/oof.csv",
        "submissions/submission.csv",
        "shared/data/dataset.zip",
        "wandb/run/x.wandb",
        "docs/RESULTS.md",
        "tests/conftest.py",
        "src/foldwise/__pycache__/cli.cpython-311.pyc",
        "src/foldwise.egg-info/PKG-INFO",
        "experiments/demo_cnn_tuned.yaml",
    ],
)
def test_data_runs_history_and_keys_stay_out_of_the_image(path: str) -> None:
    assert kept_out(path)


def test_the_extras_of_the_image_are_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.search(r"^ARG EXTRAS=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert extras
    assert set(extras[1].split(",")) <= set(project["optional-dependencies"])


def test_the_wheel_of_the_image_takes_the_pages_along() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    package = ROOT / "src" / "foldwise"
    packed = {path for pattern in setuptools["package-data"]["foldwise"] for path in package.glob(pattern)}
    files = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert sorted(path.relative_to(package).as_posix() for path in files - packed) == []


FAKE_PIP = """
import json, sys
assert "--dry-run" in sys.argv
with open("wanted.txt") as wanted, open(sys.argv[sys.argv.index("--report") + 1], "w") as report:
    json.dump({"install": [{"metadata": {"name": name}} for name in %r]}, report)
"""


def plan(folder: Path, names: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the script of the Dockerfile beside a pip that plans to install `names`."""
    for name in ("pyproject.toml", "requirements.lock"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    (folder / "pip").mkdir()
    (folder / "pip" / "__init__.py").touch()
    (folder / "pip" / "__main__.py").write_text(FAKE_PIP % names)
    (folder / "image_lock.py").write_text(image_lock_script())
    return subprocess.run(
        [sys.executable, "image_lock.py"],
        cwd=folder,
        env={"EXTRAS": "tensorboard", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_images_lock_is_a_part_of_the_lock_to_the_letter(tmp_path: Path) -> None:
    done = plan(tmp_path, ["numpy", "PyYAML", "huggingface_hub"])
    assert (done.returncode, done.stderr) == (0, "")
    lock = (ROOT / "requirements.lock").read_text()
    kept = (tmp_path / "image.lock").read_text()
    blocks = re.split(r"\n(?=[A-Za-z0-9])", kept.strip())
    assert [block.split("==")[0] for block in blocks] == ["huggingface-hub", "numpy", "numpy", "pyyaml"], (
        "of every Python that the lock is for"
    )
    for block in blocks:
        assert block + "\n" in lock
        assert "--hash=sha256:" in block
    wanted = (tmp_path / "wanted.txt").read_text().split("\n")
    assert {"tensorboard>=2.20", "setuptools", "albumentations==2.0.8"} <= set(wanted)
    pins = (tmp_path / "pins.txt").read_text().splitlines()
    assert pins == re.findall(r"^(\w.*?) \\$", lock, re.MULTILINE)


def test_a_package_without_a_pin_ends_the_build(tmp_path: Path) -> None:
    done = plan(tmp_path, ["numpy", "never-heard-of"])
    assert done.returncode == 1
    assert done.stderr == "requirements.lock does not pin never-heard-of: make it anew, as CONTRIBUTING.md says\n"
    assert not (tmp_path / "image.lock").exists()


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_can_write_its_folders_and_gain_nothing(name: str) -> None:
    service = services()[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"] == "${FOLDWISE_USER:-10001:10001}"
    assert service["init"] is True
    assert service["pids_limit"] > 0
    assert service["stop_signal"] == "SIGINT"
    assert [mount.split(":")[0] for mount in service["tmpfs"]] == ["/tmp"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc", "env_file"} & set(service)
    assert "docker.sock" not in str(service)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_built_here_and_named_by_the_projects_version(name: str) -> None:
    service = services()[name]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert service["image"] == f"foldwise:{version}-{name}"
    assert service["build"]["context"] == "."
    assert service["build"]["target"] == name.removesuffix("-gpu")
    assert service["build"]["target"] in stages()
    gpu = name.endswith("-gpu")
    assert service["build"].get("args") == ({"TORCH_INDEX": ""} if gpu else None)
    devices = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices")
    assert devices == ([{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}] if gpu else None)


def test_a_server_is_published_on_loopback_and_changes_no_file() -> None:
    for name in ("serve", "serve-gpu"):
        service = services()[name]
        assert service["ports"] == ["127.0.0.1:${PORT:-8000}:8000"]
        assert {mount.split(":")[1] for mount in service["volumes"]} == {
            "/app/inputs",
            "/app/oof",
            "/app/submissions",
        }
        assert all(mount.endswith(":ro") for mount in service["volumes"])
    for name in ("train", "train-gpu"):
        assert "ports" not in services()[name]
    started_by_up = [name for name in SERVICES if "profiles" not in services()[name]]
    assert started_by_up == ["serve"]


def test_every_folder_that_is_mounted_is_in_git_and_needs_no_root_to_be_made() -> None:
    for service in services().values():
        for mount in service["volumes"]:
            if mount.startswith("./"):
                assert (ROOT / mount.split(":")[0]).is_dir(), mount


def parsed(command: list[str], capsys: pytest.CaptureFixture[str]) -> argparse.Namespace:
    try:
        return _parser().parse_args(command)
    except SystemExit:
        pytest.fail(f"run.py {shlex.join(command)}: {capsys.readouterr().err.splitlines()[-1]}")


def test_the_commands_that_containers_run_are_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert stages()["train"].all("CMD") == ['["--help"]']
    parsed(json.loads(stages()["serve"].all("CMD")[0]), capsys)
    command = services()["serve"]["command"]
    parsed(shlex.split(command.replace("${MODEL:-}", "")), capsys)
    parsed(shlex.split(command.replace("${MODEL:-}", "resnet18")), capsys)


def commands(text: str) -> list[str]:
    """Lines of code blocks, and what stands after `$ ` or in comments of compose.yaml, that run the project."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        bare = re.split(r"\s{2,}#?|\s#\s", line.strip().lstrip("#$ "))[0]
        if re.match(r"(make|python run\.py|docker compose run --rm train(-gpu)?) \S", bare):
            found.append(bare.strip("`"))
    return found


def documented() -> list[str]:
    files = ("compose.yaml", "docs/SERVING.md", "docs/MODEL_CARD.md")
    return [command for name in files for command in commands((ROOT / name).read_text())]


def test_every_command_that_the_pages_name_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    found = documented()
    assert len(found) > 15
    makefile = (ROOT / "Makefile").read_text()
    targets = dict(re.findall(r"^(\w+):(.*(?:\n\t.*)*)", makefile, re.MULTILINE))
    for command in found:
        words = shlex.split(re.sub(r"<([^>]*)>", lambda match: match[1].split("|")[0].replace(" ", "_"), command))
        if words[0] == "make":
            assert words[1] in targets, command
            for word in words[2:]:
                name = word.partition("=")[0]
                assert f"$({name})" in targets[words[1]] or f",{name})" in targets[words[1]], command
        else:
            parsed(words[2:] if words[0] == "python" else words[5:], capsys)


def test_the_pages_speak_of_no_file_that_is_not_there() -> None:
    for name in ("SERVING", "MODEL_CARD"):
        text = (ROOT / "docs" / f"{name}.md").read_text()
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (ROOT / "docs" / link).exists(), link


def test_the_lock_pins_what_the_server_imports() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    for name in ("fastapi", "uvicorn", "python-multipart", "websockets", "prometheus-client", "onnx", "onnxruntime"):
        assert f"\n{name}==" in lock, name


def test_the_model_cards_table_is_that_of_the_runs() -> None:
    card = (ROOT / "docs" / "MODEL_CARD.md").read_text()
    head, *rows = re.findall(r"^\| (.*) \|$", card[card.index("| Label |") :].split("\n\n")[0], re.MULTILINE)
    runs = re.findall(r"`(\w+)`", head)
    told = {row.split(" | ")[0]: row.split(" | ")[1:] for row in rows}
    assert len(runs) == 2
    for column, name in enumerate(runs):
        with (ROOT / "oof" / name / "oof.csv").open() as file:
            lines = list(csv.DictReader(file))
        classes = [key.removeprefix("p_") for key in lines[0] if key.startswith("p_")]
        assert [*classes, "all"] == list(told)
        right = [line["label"] == max(classes, key=lambda one: float(line[f"p_{one}"])) for line in lines]
        for label in classes:
            hits = [hit for hit, line in zip(right, lines, strict=True) if line["label"] == label]
            share, count = sum(hits) / len(hits), len(hits)
            error = (share * (1 - share) / count) ** 0.5
            said = (
                f"{share:.3f} +- {error:.3f}"
                if share
                else f"none (95 %: 0 to {wilson(np.array([0]), np.array([count]))[0, 1]:.3f})"
            )
            assert (told[label][column], told[label][-1]) == (said, f"{count}"), (name, label)
        info = json.loads((ROOT / "oof" / name / "run.json").read_text())
        assert told["all"][column] == f"{info['score']:.4f} +- {info['standard_error']:.4f}"
        assert info["score"] == pytest.approx(sum(right) / len(right))


def defaults(file: str, name: str) -> dict[str, float]:
    """Numbers that a class of settings begins with; read and not imported, since the server imports torch."""
    tree = ast.parse((ROOT / "src" / "foldwise" / "serve" / file).read_text())
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return {
        node.target.id: eval(ast.unparse(node.value))
        for node in found.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if isinstance(node.value, ast.Constant | ast.BinOp)
    }


def test_the_limits_and_routes_that_the_guide_names_are_the_servers() -> None:
    guide = (ROOT / "docs" / "SERVING.md").read_text()
    section = guide[guide.index("### Limits") : guide.index("### Safety")]
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \| .* \|$", section, re.MULTILINE))
    limits = SimpleNamespace(**defaults("backend.py", "Settings"))
    picture = SimpleNamespace(**defaults("pictures.py", "Limits"))
    mib = 2**20
    assert rows["a picture"] == f"{picture.bytes // mib} MiB, {picture.pixels // 10**6} million pixels, one frame"
    assert rows["a request"].startswith(
        f"{limits.files} pictures, {limits.request_bytes // mib} MiB, which have {limits.body_s:.0f} s"
    )
    assert rows["faces of a picture"] == f"the {limits.faces} largest"
    rate = f"{limits.rate:.0f} a second, {limits.burst:.0f} at once (`--rate`)"
    assert rows["requests of one address, and frames of its mirror"] == rate
    assert rows["pictures that wait for the models"] == f"{limits.waiting}"
    assert rows["all bodies that are held"] == f"{limits.held_bytes // mib} MiB"
    assert rows["an answer, loading included"] == f"{limits.answer_s:.0f} s"
    assert rows["models in memory"].startswith(f"{limits.models} runs or blends")
    assert rows["mirrors"].startswith(f"{limits.mirrors} at a time, 1 MiB a frame; {limits.idle_s:.0f} s")
    server = (ROOT / "src" / "foldwise" / "serve" / "app.py").read_text()
    routes = re.findall(r"^\| `(?:GET|POST|WS) (/\w+)", guide, re.MULTILINE)
    assert len(routes) == 7
    assert [route for route in routes if f'"{route}"' not in server] == []
