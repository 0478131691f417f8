#!/bin/bash
# Codebook inference under srun: the tasks take chunks from one queue, so fast ones do more.
#   sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-task=1 exps/cluster/slurm-srun.sh --model_config ... --data_config ...
# All tasks run at the same time. srun's variables stand in for torchrun's; where a task dies, srun ends them all.
#SBATCH --job-name=codes
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
#SBATCH --output=%x-%j.log

srun --kill-on-bad-exit=1 python -u -m vision_tokenizer.tokenizer.tokenizer_codebook_inference "$@"
code=$?
if [ $code = 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
