#!/usr/bin/env bash
# Tokens a second and memory of the trainer against a plain padded loop, start-up, data loading, and GPU utilisation.
set -euo pipefail
source "$(dirname "$0")/setup.sh" train
exec python exps/benchmark_train.py "$@"
