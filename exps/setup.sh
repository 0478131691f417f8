# Sourced by the scripts here and by tests/run.sh: a virtual environment in the checkout, made on first use.
#   PYTHON=python3.12 bash exps/quickstart.sh    another interpreter
#   VENV=/path/to/env bash exps/quickstart.sh    an environment of your own
# $1: the extras to install with the toolkit, e.g. train,plot

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv}
[ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
installed="$VENV/vistoken-setup-$1"  # one for each set of extras: scripts that need fewer do not undo one another
if [ "$(cat "$installed" 2>/dev/null)" != "$(cksum < pyproject.toml)" ]; then
  echo "installing vistoken${1:+[$1]} into $VENV (torch is large: a minute or two)"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".${1:+[$1]}"
  cksum < pyproject.toml > "$installed"
fi
export PATH="$(cd "$VENV" && pwd)/bin:$PATH"
