#!/usr/bin/env bash
# Stage I, then stage II, of a toy model on CPU, on what exps/quickstart.sh pre-tokenized. Under two minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v torchrun > /dev/null || source exps/setup.sh train,plot

RECORD=${RECORD:-output/quickstart/tokens/record.json}
TOKENIZER=${TOKENIZER:-checkpoints/chameleon_small} # with which RECORD was made
OUTPUT=${OUTPUT:-output/smoke-train}
STEPS=${STEPS:-12}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} CUDA_VISIBLE_DEVICES=

mkdir -p "$OUTPUT"
printf 'META:\n  - path: %s\n' "$(realpath "$RECORD")" > "$OUTPUT/data.yaml"
[ -d "$OUTPUT/toy/siglip" ] || python training/toy_model.py --tokenizer "$TOKENIZER" --output_dir "$OUTPUT/toy"

common=(
  --variant anyres --data_config "$OUTPUT/data.yaml" --precision fp32 --unmask_image_logits --checkpointing
  --batch_size 1 --global_batch_size 2 --epochs 20 --max_steps "$STEPS" --num_workers 1 --log_interval 1
)
train=(torchrun --standalone --nproc_per_node "${NPROC_PER_NODE:-2}" training/train.py)
"${train[@]}" --stage I --init_from "$OUTPUT/toy/llm" --vit_from "$OUTPUT/toy/siglip" \
  --output_dir "$OUTPUT/stage1" "${common[@]}" "$@"
"${train[@]}" --stage II --lr 1e-3 --init_from "$OUTPUT/stage1" --output_dir "$OUTPUT/stage2" "${common[@]}" "$@"
echo "stage II's model is in $OUTPUT/stage2/final, its losses in $OUTPUT/stage2/metrics.jsonl"
