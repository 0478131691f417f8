#!/usr/bin/env bash
# Throughput, size, random access, record joining and peak memory of pre-tokenization.
#   bash exps/benchmark_pretokenize.sh                        a million items; on 2 CPU cores about 25 minutes, 8 GB of disk
#   bash exps/benchmark_pretokenize.sh --items 20000 --models small --images 16     two minutes
#   bash exps/benchmark_pretokenize.sh --device cuda --batch_size 32 --images 2048
set -euo pipefail
source "$(dirname "$0")/setup.sh" ""
exec python exps/benchmark_pretokenize.py "$@"
