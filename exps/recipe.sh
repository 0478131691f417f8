# Sourced by the training recipes, with the trainer's flags as arguments: starts the trainer under torchrun.
#
# Settings come from the environment: the recipe's own, NPROC_PER_NODE, for several nodes NNODES, NODE_RANK, MASTER_ADDR
# and MASTER_PORT on each of them, and any of `settings` below; `python training/train.py --help` tells what they mean
# and what they are if not set. Flags override them.

settings=(
  INIT_FROM VIT_FROM TOKENIZER_FROM DATA_CONFIG OUTPUT_DIR TRAINABLE_PARAMS
  LR VIT_LR_SCALE MIN_LR WD CLIP_GRAD DROPOUT Z_LOSS_WEIGHT EPOCHS WARMUP_EPOCHS
  GLOBAL_BATCH_SIZE BATCH_SIZE BATCH_TOKENS ACCUM_ITER MAX_SEQ_LEN MAX_STEPS SEED
  PRECISION DATA_PARALLEL SHARD_OVER WHOLE_GRADIENTS NUM_WORKERS SAVE_ITERATION_INTERVAL CKPT_MAX_KEEP LOG_INTERVAL
)
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-128} # samples in an optimizer step, over all processes
NUM_WORKERS=${NUM_WORKERS:-8}

export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True} # batches are of many sizes

distributed_args=(
  --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" --nproc_per_node "${NPROC_PER_NODE:-gpu}"
  --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29500}"
)

# torchrun's own answer where there is no GPU to count is a traceback
if [ "${NPROC_PER_NODE:-gpu}" = gpu ] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "error: PyTorch finds no GPU here. On the CPU: NPROC_PER_NODE=1 PRECISION=fp32 bash $0" >&2
  exit 2
fi

flags=()
for name in "${settings[@]}"; do
  [ -z "${!name:-}" ] || flags+=("--${name,,}" "${!name}")
done
torchrun "${distributed_args[@]}" training/train.py "${flags[@]}" --checkpointing --cache_ann_on_disk "$@"
