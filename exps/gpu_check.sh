# Sourced by the recipes: torchrun's own answer where there is no GPU to count is a traceback.
if [ "${NPROC_PER_NODE:-gpu}" = gpu ] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "error: PyTorch finds no GPU here. On the CPU: NPROC_PER_NODE=1 PRECISION=fp32 bash $0" >&2
  exit 2
fi
