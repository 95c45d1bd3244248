"""`python -m megamoe plan` as a user starts it: what it prints and draws, and what it says of bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megamoe.cli import main
from megamoe.common.errors import MegamoeError

ROOT = Path(__file__).resolve().parents[2]
NODE, NODES = "configs/hardware/h200_node.yaml", "configs/hardware/h100_ib.yaml"
MODEL = ("configs/gpu/1b.yaml", "parallel.ep=8", "training.global_batch_size=128", "training.micro_batch_size=4")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def plan(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megamoe", "plan", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def planned(*words: str | Path) -> str:
    done = plan(*words)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def rows(text: str) -> dict[tuple[str, int], list[str]]:
    """The table: exchange and chunks to the words behind them."""
    found = re.findall(r"^[ >*] (all_to_all|deduplicated|hierarchical) +(\d+) +(.*)$", text, re.MULTILINE)
    return {(name, int(chunks)): cells.split() for name, chunks, cells in found}


def test_a_node_with_its_picture(tmp_path: Path) -> None:
    picture = tmp_path / "new" / "plan.html"
    text = planned(*MODEL, "--cluster", NODE, "--timeline", picture)
    assert text.startswith("8 x H200 per node")
    assert "8 ranks on 1 node, ep 8, all_to_all, 2 chunks" in text
    assert set(rows(text)) == {(way, chunks) for way in ("all_to_all", "deduplicated") for chunks in (1, 2)}
    whole, chunked = (float(rows(text)["all_to_all", chunks][0]) for chunks in (1, 2))
    assert chunked < whole
    assert rows(text)["all_to_all", 1][6] == "0%"
    page = picture.read_text(encoding="utf-8")
    assert "http" not in page.replace("http://www.w3.org", "")  # nothing from elsewhere
    svg = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    titles = {title.text or "" for title in svg.iter("title")}
    for name in ("dispatch 2/2", "experts 1/2", "combine 2/2", "gradients of weights 1/2", "dispatch backward 1/2"):
        assert any(title.startswith(name) for title in titles), name
    assert any(title.startswith("exposed: ") for title in titles)
    assert "exchange that nothing hides" in page


def test_several_nodes_and_words_after_options(tmp_path: Path) -> None:
    words = ("--cluster", NODES, "--nodes", "4", "parallel.ep=16", "moe.dispatcher=all_to_all", "--chunks", "1")
    picture = tmp_path / "plan.svg"
    text = planned(*MODEL, *words, "--timeline", picture)
    assert "32 ranks on 4 nodes, ep 16 over 2 nodes, all_to_all, not chunked" in text
    assert "limited by" in text
    assert set(rows(text)) == {(way, 1) for way in ("all_to_all", "deduplicated", "hierarchical")}
    drawn = "".join(ElementTree.parse(picture).getroot().itertext())
    assert "link between nodes" in drawn
    assert "computation" in drawn


def test_equal_plans_are_equal_files(tmp_path: Path) -> None:
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    for picture in (first, second):
        assert main(["plan", *MODEL, "--cluster", NODE, "--timeline", str(picture)]) == 0
    assert first.read_bytes() == second.read_bytes()


def test_it_loads_no_torch(tmp_path: Path) -> None:
    words = ["plan", *MODEL, "--cluster", NODE, "--timeline", str(tmp_path / "a.html")]
    code = (
        f"import json, sys\nfrom megamoe.cli import main\ncode = main({words!r})\n"
        "print(json.dumps([code, 'torch' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout.splitlines()[-1]) == [0, False], done.stderr


@pytest.mark.parametrize(
    "words, says",
    [
        ((*MODEL, "--cluster", "configs/none.yaml"), ("there is no file configs/none.yaml",)),
        ((*MODEL, "--cluster", "configs/tiny.yaml"), ("unknown key", "launch: is required and not given")),
        ((*MODEL, "--cluster", NODE, "--nodes", "0"), ("at least one node", "--nodes 0")),
        ((*MODEL, "parallel.ep=16", "--cluster", NODE), ("parallel.ep", "8 % 16 = 8")),
        ((*MODEL, "--cluster", NODE, "--chunks", "3"), ("3 chunks, 2 experts on a rank", "1 to 2")),
        ((*MODEL, "--cluster", NODE, "--chunks", "many"), ("many", "auto, or 1 and more")),
        ((*MODEL, "--cluster", NODE, "--timeline", "plan.pdf"), ("plan.pdf", ".html, .png, .svg")),
        ((*MODEL, "moe.num_experts=0", "parallel.ep=1", "--cluster", NODE), ("no MoE layer to plan",)),
        ((*MODEL, "moe.topk=3", "--cluster", NODE), ("did you mean moe.top_k?",)),
        (
            (*MODEL, "training.precision=fp64", "parallel.zero_stage=0", "--cluster", NODE),
            ("no rates of products in fp64", "bench rates"),
        ),
        (("configs/tiny.yaml", "--cluster", "configs/hardware/cpu_2_ranks.yaml", "--nodes", "2"), ("between nodes",)),
    ],
)
def test_bad_input(words: tuple[str, ...], says: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MegamoeError) as caught:
        main(["plan", *words])
    assert capsys.readouterr().out == ""
    text = str(caught.value)
    assert not [part for part in says if part not in text], text


def test_the_exit_code_of_bad_input() -> None:
    done = plan(*MODEL, "--cluster", NODE, "--nodes", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("TopologyError: A cluster has at least one node.")
    assert "Traceback" not in done.stderr
