#!/usr/bin/env bash
# The Slurm recipes on a real Slurm of one node. Not in CI: it needs root and, on Debian,
#   apt-get install slurmctld slurmd slurm-client munge
# It starts daemons of its own, with files in a new folder, and ends them. What it shows: an array of four and an srun of
# three write the bytes of one process; a task that is told to stop finishes its open chunks, is requeued and goes on;
# and an srun of three into S3 (moto's server), of which one task is killed, ends, and once more goes on to these bytes.
#   bash tests/slurm.sh
set -euo pipefail
cd "$(dirname "$0")/.."
top=$PWD; work=$(mktemp -d); node=$(hostname -s); export PYTHONPATH=$top OMP_NUM_THREADS=1
python=$(command -v python); export PATH=$(dirname "$python"):$PATH

pids=()
finish() { for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done; }
trap finish EXIT

mkdir -p "$work/spool" "$work/state" /run/munge; chown munge: /run/munge 2>/dev/null || true
[ -s /etc/munge/munge.key ] || dd if=/dev/urandom of=/etc/munge/munge.key bs=1 count=1024 status=none
chown munge: /etc/munge/munge.key /etc/munge /var/lib/munge /var/log/munge; chmod 400 /etc/munge/munge.key
cat > "$work/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=requeue_delay=1
NodeName=$node NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes=$node Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
CONF
export SLURM_CONF=$work/slurm.conf
pgrep -x munged >/dev/null || { runuser -u munge -- munged --foreground & pids+=($!); sleep 1; }
slurmctld -D & pids+=($!)
slurmd -D & pids+=($!)
for _ in $(seq 60); do sinfo -h -o %T 2>/dev/null | grep -q idle && break; sleep 1; done
sinfo

PYTHONPATH=$top:$top/tests "$python" - "$work" <<'PY'
"""A small data set and a tiny DualViTok in the folder that is named."""
import json, runpy, sys
from pathlib import Path

import torch
from PIL import Image

from conftest import TINY_DUALVITOK, synthetic_tensor
from vision_tokenizer.models.dualvitok.config import read_config
from vision_tokenizer.models.dualvitok.model import DualViTok

work = Path(sys.argv[1])
(work / "tiny.py").write_text(TINY_DUALVITOK)
with torch.device("meta"):
    shapes = {name: t.shape for name, t in DualViTok(read_config(work / "tiny.py"), decoder=True).state_dict().items()}
torch.save({n: torch.from_numpy(synthetic_tensor(n, tuple(s))) for n, s in shapes.items()}, work / "pytorch_model.bin")
for folder in ("images", "annotations"):
    (work / folder).mkdir()
for number in range(40):
    Image.new("RGB", (40, 48), (6 * number, 90, 7)).save(work / f"images/{number}.png")
for name in "ab":
    lines = [json.dumps({"id": number, "images": [f"{number % 40}.png"]}) for number in range(300)]
    (work / f"annotations/{name}.jsonl").write_text("\n".join(lines))
for name in ("alone", "array", "srun", "stopped", "killed"):
    root = "s3://lab/killed" if name == "killed" else f"{work}/{name}"
    entry = {"root": root, "image_dir": f"{work}/images", "annotation_dir": f"{work}/annotations"}
    (work / f"{name}.json").write_text(json.dumps({"birds": {**entry, "tokenizer_inference": True}}))
PY
flags() { echo --model_config "$work/tiny.py" --tokenizer_checkpoint "$work/pytorch_model.bin" --device cpu \
  --resolution_type fixed --resolution 32 --batch_size 2 --num_workers 1 --data_config "$work/$1.json"; }
settled() { while squeue -h | grep -q .; do sleep 1; done; }
same() { diff -r -x .work -x run_summary.json "$work/alone" "$work/$1" && echo "== $1: the bytes of one process"; }

"$python" -m vision_tokenizer.tokenizer.tokenizer_codebook_inference $(flags alone)
cd "$work"
sbatch --array=0-3 "$top/exps/cluster/slurm-array.sh" $(flags array); settled; same array || tail -n 20 codes-*.log
sbatch --ntasks=3 "$top/exps/cluster/slurm-srun.sh" $(flags srun); settled; same srun || tail -n 20 codes-*.log
job=$(sbatch --parsable --array=0-1 "$top/exps/cluster/slurm-array.sh" $(flags stopped))
until ls "$work"/stopped/*/*/*/.work/*/0*.json >/dev/null 2>&1; do sleep 0.2; done
scancel --batch --signal=USR1 "$job"; settled; same stopped
grep -h "SIGUSR1" codes-"$job"-*.log

export AWS_ENDPOINT_URL=http://127.0.0.1:16819 AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test AWS_REGION=us-east-1
"$python" - 2>/dev/null <<'PY' & pids+=($!)
import threading
from moto.server import ThreadedMotoServer
ThreadedMotoServer("127.0.0.1", 16819, verbose=False).start()
from pyarrow import fs
fs.S3FileSystem(endpoint_override="http://127.0.0.1:16819", allow_bucket_creation=True).create_dir("lab")
threading.Event().wait()
PY
results() { "$python" -c 'from vistoken.store import Url; print(sum(1 for _ in Url("s3://lab/killed").glob("*/*/*/.work/*/0*.json")))'; }
until [ "$(results 2>/dev/null)" = 0 ]; do sleep 1; done
job=$(sbatch --parsable --ntasks=3 "$top/exps/cluster/slurm-srun.sh" $(flags killed))
until [ "$(results)" -gt 0 ]; do sleep 0.2; done
task=$(scontrol listpids "$job.0" | awk '$4 == 1 {print $1; exit}')  # of rank 1
kill -9 "$task"; settled
if grep -h "images encoded" codes-"$job".log; then echo "ended before it was killed"; exit 1; fi
echo "== after kill -9 of task $task: $(results) results"
sbatch --ntasks=3 "$top/exps/cluster/slurm-srun.sh" $(flags killed); settled
"$python" -c 'import shutil, sys; from vistoken.store import Url, local_copy
with local_copy(Url("s3://lab/killed")) as copy: shutil.copytree(copy, sys.argv[1])' "$work/killed"
same killed || tail -n 20 codes-*.log
echo "all as it should be"
