#!/usr/bin/env bash
# Images a second and memory of training a tokenizer, and of evaluating one against a plain loop.
#   bash exps/benchmark_tokenizer_training.sh --models small           the quick look
#   bash exps/benchmark_tokenizer_training.sh                          the full model, too: 15 GB of memory, minutes
#   bash exps/benchmark_tokenizer_training.sh --device cuda --losses published --batch_sizes 8 32
set -euo pipefail
source "$(dirname "$0")/setup.sh" ""
exec python exps/benchmark_tokenizer_training.py "$@"
