"""`python -m megamoe`."""

from megamoe.cli import main
from megamoe.common.main import run_main

if __name__ == "__main__":
    run_main(main)
