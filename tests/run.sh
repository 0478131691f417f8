#!/usr/bin/env bash
# Everything the tests need, then the tests: lint, format, types, pytest.
# Arguments go to pytest: bash tests/run.sh -k chunks
set -euo pipefail
source "$(dirname "$0")/../exps/setup.sh" train,plot,dev
ruff check .
ruff format --check .
mypy > "$VENV/mypy.log" 2>&1 & types=$!  # a minute of one core, beside the tests
failed=0
python -m pytest "$@" || failed=$?
wait "$types" || { failed=$?; cat "$VENV/mypy.log"; }
exit "$failed"
