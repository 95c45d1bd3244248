import pytest
from pydantic import ValidationError

from megamoe.config.data import DataConfig, SourceConfig


def test_the_default_is_the_standard_library():
    assert [(s.name, s.path) for s in DataConfig().sources] == [("stdlib", "stdlib")]


def test_names_of_sources_must_differ():
    twice = (SourceConfig(name="a", path="x"), SourceConfig(name="a", path="y"))
    with pytest.raises(ValidationError, match="more than once: a"):
        DataConfig(sources=twice)


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "tokenizer.model"])
def test_a_name_of_a_source_is_a_folder_name(name: str):
    with pytest.raises(ValidationError, match="pattern"):
        SourceConfig(name=name, path="x")


@pytest.mark.parametrize(
    "values",
    [
        {"sources": []},
        {"sources": [{"name": "a", "path": "x", "weight": 0}]},
        {"sources": [{"name": "a", "path": "x", "weight": float("inf")}]},
        {"validation_fraction": 0.0},
        {"validation_fraction": 1.0},
        {"seq_length": 0},
        {"num_workers": -1},
        {"tokenizer": {"vocab_size": 258}},
        {"seq_len": 8},
    ],
)
def test_values_out_of_bounds_are_refused(values: dict[str, object]):
    with pytest.raises(ValidationError):
        DataConfig.model_validate(values)


def test_every_field_is_described():
    schema = DataConfig.model_json_schema()
    fields = [*schema["properties"].items()]
    fields += [item for part in schema["$defs"].values() for item in part["properties"].items()]
    assert [name for name, field in fields if not field.get("description")] == []
