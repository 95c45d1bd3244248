#!/usr/bin/env bash
# Sets up and passes every check that needs no GPU: lint, format, types, shell scripts, tests.
#
#   bash tests/run.sh                       everything
#   bash tests/run.sh tests/unit -k blend   only pytest, with these arguments
#   bash tests/run.sh -m thorough           what everything leaves out: further combinations, last result in tests/thorough.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh test
export PATH="$PWD/.venv/bin:$PATH"
# Native ops that compile on first use belong to this environment; a shared cache would be rebuilt by every other one,
# and a lock that a killed process left there would stop all later starts.
export TORCH_EXTENSIONS_DIR="$PWD/.venv/torch_extensions"
export HF_HUB_OFFLINE=1 WANDB_MODE=offline

if (($#)); then
    exec python -m pytest -m "not gpu" "$@"
fi

# Every check runs even if an earlier one failed; the last line is pytest's, the exit status tells of all.
failed=()
check() {
    printf '== %s\n' "$1"
    "${@:2}" || failed+=("$1")
}
mapfile -t scripts < <(git ls-files --cached --others --exclude-standard '*.sh' '*.sbatch' .ci/run)
check "ruff check" ruff check --quiet .
check "ruff format" ruff format --check --quiet .
check "mypy" mypy
((${#scripts[@]} == 0)) || check "shellcheck" shellcheck -x "${scripts[@]}"
# Two workers: one runs the tests that start ranks of their own, the other everything else (tests/conftest.py).
printf '== pytest%s\n' "${failed:+ (failed before it: ${failed[*]})}"
python -m pytest -q -n 2 --dist loadgroup -m "not gpu and not thorough" || exit
((${#failed[@]} == 0)) || exit 1
