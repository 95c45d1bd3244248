"""RMSNorm, and what is said where NVIDIA apex is missing."""

import importlib
from pathlib import Path

import pytest
import torch

from megamoe.common.errors import KernelUnavailable
from megamoe.model.norms import build_norm
from megamoe.testing import assert_close


def test_root_mean_square() -> None:
    norm = build_norm("torch", 7, eps=0.5)
    torch.nn.init.uniform_(norm.weight)
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    expected = x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt() * norm.weight
    assert_close(norm(x), expected, rel=1e-6)
    assert [name for name, _ in norm.named_parameters()] == ["weight"]


def has_apex() -> bool:
    try:
        importlib.import_module("apex.normalization")
    except ImportError:
        return False
    return True


@pytest.mark.skipif(has_apex(), reason="NVIDIA apex is installed")
def test_apex_is_asked_for_and_not_installed() -> None:
    with pytest.raises(KernelUnavailable) as refusal:
        build_norm("apex", 8, eps=1e-5)
    message = str(refusal.value)
    for part in (
        "NVIDIA apex is not installed",
        "model.norm: apex",
        "PyPI is something else",
        "model.norm: torch",
    ):
        assert part in message


@pytest.mark.skipif(has_apex(), reason="NVIDIA apex is installed")
def test_the_other_package_called_apex_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(importlib.sys.modules, "apex", raising=False)
    with pytest.raises(KernelUnavailable, match="apex"):
        build_norm("apex", 8, eps=1e-5)
    importlib.sys.modules.pop("apex", None)
