"""JSON that every reader takes."""

import json
import math

from megamoe.common import strict_json


def test_what_is_not_finite_becomes_null() -> None:
    values = {"loss": math.nan, "norm": math.inf, "loads": [1.0, -math.inf], "steps": (1, True, None), "name": "a"}
    text = strict_json.dumps(values)
    assert json.loads(text, parse_constant=lambda name: f"{name} is no JSON") == {
        "loss": None,
        "norm": None,
        "loads": [1.0, None],
        "steps": [1, True, None],
        "name": "a",
    }


def test_the_rest_stays_as_it_is() -> None:
    values = {"a": [1, 2.5, {"b": "c"}]}
    assert strict_json.dumps(values, indent=1) == json.dumps(values, indent=1)
