"""Every recipe and overlay loads, and the schema that editors use is the current one."""

import json
from pathlib import Path

import pytest
import yaml

from megamoe.common.errors import ConfigError
from megamoe.config.hardware import load_hardware
from megamoe.config.load import load_config
from megamoe.config.schema import json_schema
from megamoe.study.plan import load_study

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
# Recipes lie directly in configs/ and stand alone; everything in a folder below is laid over a recipe.
RECIPES = sorted(CONFIGS.glob("*.yaml"))
STUDIES = sorted(CONFIGS.glob("reproduce/**/study*.yaml"))
CLUSTERS = sorted(CONFIGS.glob("hardware/*.yaml"))
OVERLAYS = sorted(set(CONFIGS.glob("*/**/*.yaml")) - {*STUDIES, *CLUSTERS})
# What an overlay is laid over where that is not configs/tiny.yaml; an empty tuple means that it stands alone.
BASE: dict[str, tuple[str, ...]] = {"reproduce/etr/gpu.yaml": ("reproduce/etr/base.yaml",)}


def relative(path: Path) -> str:
    return path.relative_to(CONFIGS).as_posix()


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_every_recipe_loads_by_itself(path: Path) -> None:
    load_config([path])


@pytest.mark.parametrize("path", OVERLAYS, ids=relative)
def test_every_overlay_loads_over_its_recipe(path: Path) -> None:
    base = BASE.get(relative(path), ("tiny.yaml",))
    load_config([*(CONFIGS / name for name in base), path])


@pytest.mark.parametrize("path", STUDIES, ids=relative)
def test_every_study_loads_with_all_its_arms(path: Path) -> None:
    assert len(load_study(path).arms) > 1


def test_the_table_of_bases_is_current() -> None:
    assert BASE.keys() <= set(map(relative, OVERLAYS))


@pytest.mark.parametrize("path", CLUSTERS, ids=relative)
def test_every_cluster_loads(path: Path) -> None:
    load_hardware(path)


@pytest.mark.parametrize("path", [*RECIPES, *OVERLAYS, *STUDIES, *CLUSTERS], ids=relative)
def test_every_file_says_in_its_first_line_what_it_is_for(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# "), "begin with a comment"
    assert yaml.safe_load(path.read_text(encoding="utf-8")), "an overlay that changes nothing"


def test_the_schema_file_is_current() -> None:
    stored = json.loads((CONFIGS / "schema.json").read_text(encoding="utf-8"))
    assert stored == json_schema(), "renew it: python -m megamoe check --write-schema configs/schema.json"


def test_a_file_with_an_unknown_key_does_not_load(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("training:\n  stepz: 3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="stepz"):
        load_config([broken])
