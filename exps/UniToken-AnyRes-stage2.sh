#!/usr/bin/env bash
# UniToken stage II with each image as a whole and in tiles: trains everything.
# Running it again goes on where it stopped. Flags given to this script override the ones below.
set -euo pipefail
cd "$(dirname "$0")/.."
source exps/gpu_check.sh

INIT_FROM=${INIT_FROM:-output/UniToken-AnyRes-stage1}  # stage I's output
VIT_FROM=${VIT_FROM:-ckpts/SigLIP}
DATA_CONFIG=${DATA_CONFIG:-configs/data/stage2.yaml}
OUTPUT_DIR=${OUTPUT_DIR:-output/UniToken-AnyRes-stage2}

# several nodes: set these on each of them
distributed_args=(
  --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" --nproc_per_node "${NPROC_PER_NODE:-gpu}"
  --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29500}"
)
accum_iter=(${ACCUM_ITER:+--accum_iter "$ACCUM_ITER"}) # else what GLOBAL_BATCH_SIZE needs

torchrun "${distributed_args[@]}" training/train.py --stage II --variant anyres \
  --init_from "$INIT_FROM" --vit_from "$VIT_FROM" --data_config "$DATA_CONFIG" --output_dir "$OUTPUT_DIR" \
  --trainable_params "${TRAINABLE_PARAMS:-vit,adapter,model,lm_head}" \
  --lr "${LR:-1e-5}" --vit_lr_scale "${VIT_LR_SCALE:-1}" --min_lr "${MIN_LR:-0}" \
  --wd "${WD:-0.1}" --clip_grad "${CLIP_GRAD:-4}" --dropout "${DROPOUT:-0.05}" \
  --z_loss_weight "${Z_LOSS_WEIGHT:-1e-5}" --unmask_image_logits \
  --epochs "${EPOCHS:-1}" --warmup_epochs "${WARMUP_EPOCHS:-0.01}" \
  --batch_size "${BATCH_SIZE:-4}" --global_batch_size "${GLOBAL_BATCH_SIZE:-128}" "${accum_iter[@]}" \
  --max_seq_len "${MAX_SEQ_LEN:-4096}" --seed "${SEED:-0}" --num_workers "${NUM_WORKERS:-8}" \
  --precision "${PRECISION:-bf16}" --data_parallel "${DATA_PARALLEL:-fsdp}" --checkpointing --cache_ann_on_disk \
  --save_iteration_interval "${SAVE_ITERATION_INTERVAL:-1000}" --ckpt_max_keep "${CKPT_MAX_KEEP:-2}" "$@"
