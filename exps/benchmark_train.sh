#!/usr/bin/env bash
# Tokens a second and memory of the trainer against a plain padded loop, start-up, data loading, and GPU utilisation.
set -euo pipefail
cd "$(dirname "$0")/.."
exec python exps/benchmark_train.py "$@"
