#!/usr/bin/env bash
# Codebook inference on Ray, one actor per GPU (or per CPU). Without RAY_ADDRESS a Ray of this machine is started.
#   bash exps/cluster/ray.sh --model_config ... --tokenizer_checkpoint ... --data_config ...
# A cluster of one's own: on the first node
#   ray start --head --port=6379
# on the others, at any time, in mid-run, too
#   ray start --address=FIRST:6379
# and then this with RAY_ADDRESS=FIRST:6379. vistoken is installed on every node; paths are on a shared disk, or URLs.
set -euo pipefail
exec python -u -m vision_tokenizer.tokenizer.tokenizer_codebook_inference --ray ${RAY_ADDRESS:+"$RAY_ADDRESS"} "$@"
