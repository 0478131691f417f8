#!/bin/bash
# Codebook inference as a Slurm array: every task does a range of the chunks, and who ends last writes the final files.
#   sbatch --array=0-63 exps/cluster/slurm-array.sh --model_config ... --tokenizer_checkpoint ... --data_config ...
# Tasks need not run at the same time. Submit the same array again after whatever happened: it goes on.
#SBATCH --job-name=codes
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%A-%a.log
# On a cluster with GPUs, also: #SBATCH --gpus=1 --cpus-per-task=16

python -u -m vision_tokenizer.tokenizer.tokenizer_codebook_inference --splits "$SLURM_ARRAY_TASK_COUNT" "$@" &
job=$!
trap 'kill -USR1 $job' USR1   # the end is near: finish what is open
trap 'kill -TERM $job' TERM   # it is now: drop what is open
while wait $job; code=$?; kill -0 $job 2>/dev/null; do :; done
if [ $code = 75 ]; then       # stopped before its end: the same task, once more, goes on
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit $code
