#!/usr/bin/env bash
# UniToken stage I with one view of each image: trains the vision tower and the adapter.
# Running it again goes on where it stopped. Other settings, several nodes: exps/recipe.sh. Flags given to this script
# override all of them.
set -euo pipefail
cd "$(dirname "$0")/.."

INIT_FROM=${INIT_FROM:-ckpts/Lumina-mGPT-7B-512} # the language model; the tower comes from VIT_FROM
VIT_FROM=${VIT_FROM:-ckpts/SigLIP}
DATA_CONFIG=${DATA_CONFIG:-configs/data/stage1.yaml}
OUTPUT_DIR=${OUTPUT_DIR:-output/UniToken-base-stage1}

source exps/recipe.sh --stage I --variant base --unmask_image_logits "$@"
