"""Every experiment file is valid and trains a smoke epoch on the demo data: what a recipe asks for, the code does."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

from foldwise.cli import main
from foldwise.records.store import load_run
from foldwise.spec.load import check_all
from foldwise.spec.yaml import read_yaml

ROOT = Path(__file__).resolve().parents[1]
# In the place of a network that needs a GPU, a smaller one of its kind.
SMALLER = {"vit_mixup": "vit_tiny_patch16_224"}
RECIPES = sorted(path.stem for path in (ROOT / "experiments").glob("*.yaml"))


def test_every_experiment_file_is_valid() -> None:
    results = check_all(ROOT)
    assert [path.stem for path, _ in results] == RECIPES
    assert [str(error) for _, error in results if error is not None] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_a_smoke_epoch_on_the_demo_data(
    name: str, demo_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(demo_root, tmp_path / "project")
    shutil.copytree(ROOT / "experiments", root / "experiments")
    file = root / "experiments" / f"{name}.yaml"
    call = ["--root", str(root), "exp", str(file), "--smoke", "--device", "cpu", "--track", "none", "--name", "smoke"]
    # Other competitions and runs are not here; the guard and starting weights have tests of their own.
    call += ["--set", "competition=demo", "--set", "model.weights=none", "--set", "clear_of=[]"]
    if name in SMALLER:
        call += ["--set", f"model.arch={SMALLER[name]}"]
    assert main(call) == 0, capsys.readouterr()
    run = load_run(root / "oof" / ".smoke" / "smoke")
    spec = read_yaml(file).value
    assert run.info["smoke"]
    assert run.info["tta"] == spec.get("tta", ["identity", "hflip"])
    assert len(run.classes) == (len(set(spec["label_map"].values())) if "label_map" in spec else 7)
    assert len(run.ids) == 64
    history = pd.read_csv(run.path / "history.csv")
    assert history["epoch"].tolist() == [1, 1]
