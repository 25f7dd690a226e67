#!/usr/bin/env bash
# Makes .venv, installs, checks the code's style and runs the tests: bash runs/test.sh [pytest options]
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt requirements-dev.txt requirements-cluster.txt
ruff check .
ruff format --check .
# Two processes, each with one thread: the tests of a file stay together, as they share fixtures.
OMP_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadfile "$@"
