"""The JSON schema of a configuration, for completion and checks in editors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megamoe.common.errors import ConfigError
from megamoe.config.run import RunConfig


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a configuration file; every key is optional, as files are layers."""
    schema = RunConfig.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **_any_variant(schema),
        "title": "megamoe run configuration",
    }


def _any_variant(node: Any) -> Any:
    """`oneOf` becomes `anyOf`: an overlay without the discriminator fits several variants, which is fine."""
    if isinstance(node, list):
        return [_any_variant(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {"anyOf" if key == "oneOf" else key: _any_variant(value) for key, value in node.items()}


def schema_text() -> str:
    """The schema as it is stored in a file."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def write_schema(path: str | Path) -> None:
    """Write the schema to `path`.

    Raises:
        ConfigError: where the file cannot be written.
    """
    try:
        Path(path).write_text(schema_text(), encoding="utf-8")
    except OSError as error:
        raise ConfigError("The schema cannot be written.", got=str(error), expected="a writable path") from error
