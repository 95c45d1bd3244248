"""The stored schema, the shipped YAML files, and what editors see in them."""

import os
from pathlib import Path

import pytest

from megamoe.config.load import load_config
from megamoe.config.schema import json_schema, schema_text

CONFIGS = Path(__file__).parents[3] / "configs"
OVERLAYS = sorted(set(CONFIGS.glob("*/*.yaml")) - set(CONFIGS.glob("hardware/*.yaml")))


def test_the_stored_schema_is_current() -> None:
    stored = (CONFIGS / "schema.json").read_text(encoding="utf-8")
    assert stored == schema_text(), "run: python -m megamoe check --write-schema configs/schema.json"


def test_no_key_is_required_and_unknown_ones_are_refused() -> None:
    schema = json_schema()
    assert "required" not in schema
    assert schema["additionalProperties"] is False


def test_an_overlay_may_leave_out_the_router_type() -> None:
    router = json_schema()["$defs"]["MoEConfig"]["properties"]["router"]
    assert "oneOf" not in router
    assert len(router["anyOf"]) == 6


@pytest.mark.parametrize("path", [CONFIGS / "tiny.yaml", *OVERLAYS], ids=lambda path: path.name)
def test_files_point_editors_to_the_schema(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# yaml-language-server: $schema={os.path.relpath(CONFIGS / 'schema.json', path.parent)}"


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.name)
def test_overlays_fit_the_tiny_recipe(path: Path) -> None:
    load_config([CONFIGS / "tiny.yaml", path])


def test_the_tiny_recipe() -> None:
    config = load_config([CONFIGS / "tiny.yaml"])
    assert config.parallel.ep == 2
    assert config.training.output_dir == "runs/tiny"
    assert config.training.optimizer.lr == 3e-3
