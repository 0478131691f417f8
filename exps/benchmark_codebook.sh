#!/usr/bin/env bash
# How fast codebook inference is against what this machine can do, and how much memory it takes.
#   bash exps/benchmark_codebook.sh                       small and full model, then memory at 200,000 lines
#   bash exps/benchmark_codebook.sh --models small --skip_memory   the quick look
#   bash exps/benchmark_codebook.sh --device cuda --batch_size 32 --images_full 256
set -euo pipefail
source "$(dirname "$0")/setup.sh" ""
exec python exps/benchmark_codebook.py "$@"
