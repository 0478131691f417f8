#!/usr/bin/env bash
# Any transformers language model, its vocabulary extended by image codes, on text and codes: trains everything.
# Running it again goes on where it stopped. Other settings, several nodes: exps/recipe.sh. Flags given to this script
# override all of them.
set -euo pipefail
cd "$(dirname "$0")/.."

INIT_FROM=${INIT_FROM:-ckpts/Qwen2.5-7B-Instruct}
TOKENIZER_FROM=${TOKENIZER_FROM:-ckpts/Qwen2.5-dualvitok} # what pre_tokenize/extend_tokenizer.py wrote
DATA_CONFIG=${DATA_CONFIG:-configs/data/illume.yaml}
OUTPUT_DIR=${OUTPUT_DIR:-output/ILLUME-lm}

source exps/recipe.sh --variant lm "$@"
