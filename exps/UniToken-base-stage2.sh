#!/usr/bin/env bash
# UniToken stage II with one view of each image: trains everything.
# Running it again goes on where it stopped. Other settings, several nodes: exps/recipe.sh. Flags given to this script
# override all of them.
set -euo pipefail
cd "$(dirname "$0")/.."

INIT_FROM=${INIT_FROM:-output/UniToken-base-stage1} # stage I's output
DATA_CONFIG=${DATA_CONFIG:-configs/data/stage2.yaml}
OUTPUT_DIR=${OUTPUT_DIR:-output/UniToken-base-stage2}

source exps/recipe.sh --stage II --variant base --unmask_image_logits "$@"
