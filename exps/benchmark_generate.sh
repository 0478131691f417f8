#!/usr/bin/env bash
# Tokens a second of generating pictures: with the cache, recomputing everything, and what the machine allows.
set -euo pipefail
source "$(dirname "$0")/setup.sh" train
exec python exps/benchmark_generate.py "$@"
