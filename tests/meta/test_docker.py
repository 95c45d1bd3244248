"""The image's files keep their rules: linted, nothing of a builder's machine, everything they copy exists."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker/Dockerfile"
HADOLINT = Path(sys.executable).with_name("hadolint")


def hadolint(file: Path) -> list[str]:
    """What the linter says of a Dockerfile, with the project's exceptions."""
    assert HADOLINT.is_file(), "hadolint is not in this environment: bash launch/setup.sh test"
    command = [str(HADOLINT), "--config", str(ROOT / ".hadolint.yaml"), "--format", "json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout, done.stderr
    return [f"{found['line']}: {found['code']} {found['message']}" for found in json.loads(done.stdout)]


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, its words) of a Dockerfile: continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(words[0], words[1]) for line in joined.splitlines() if len(words := line.split(maxsplit=1)) == 2]


STEPS = instructions(DOCKERFILE.read_text(encoding="utf-8"))


def of(kind: str) -> list[str]:
    return [words for instruction, words in STEPS if instruction == kind]


def test_the_linter_has_nothing_to_say() -> None:
    assert hadolint(DOCKERFILE) == []


def test_the_linter_finds_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "Dockerfile"
    file.write_text("FROM debian\nRUN cd x && sudo echo $HOME\n", encoding="utf-8")
    assert {"DL3006", "DL3004", "SC2086"} <= {found.split()[1] for found in hadolint(file)}


def test_there_is_one_base_and_it_has_a_version() -> None:
    bases = {words.split()[0] for words in of("FROM")}
    stages = {words.split()[-1] for words in of("FROM") if " AS " in words}
    assert bases - stages == {"${BASE}"}
    assert re.fullmatch(r"BASE=[\w./-]+:\d\d\.\d\d-py3", of("ARG")[0])


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    taken = [line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"]
    copied = {name for words in of("COPY") if "--from" not in words for name in words.split()[:-1]} - {"."}
    assert {name for name in {*copied, *taken} if not (ROOT / name).exists()} == set()
    assert {name for name in copied if not any(Path(name).is_relative_to(above) for above in taken)} == set()


def test_packages_come_from_wherever_the_builder_gets_them() -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    assert not re.search(r"index-url|find-links|trusted-host|https?_proxy", text, re.IGNORECASE)
    kept = [words for words in (*of("ENV"), *of("ARG")) if "PIP_" in words]
    assert not kept, "what is lent to one step stays in the image"


def test_nothing_is_built_from_apex_unless_it_is_asked_for() -> None:
    assert 'APEX_COMMIT=""' in of("ARG")


def test_it_ends_with_the_doctor_as_a_user_other_than_root() -> None:
    uid = next(words.removeprefix("UID=") for words in of("ARG") if words.startswith("UID="))
    assert of("USER") == ["${UID}"]
    assert int(uid) > 0
    last = max(at for at, (kind, _) in enumerate(STEPS) if kind == "RUN")
    assert STEPS[last][1].endswith("python -m megamoe doctor")
    assert STEPS.index(("USER", "${UID}")) < last
