#!/bin/bash
# Train one run on a Slurm cluster. Submit from the project root:
#
#   sbatch papermill_runs/slurm.sh papermill_runs/configs/detr-r50.yaml my-run
#   sbatch papermill_runs/slurm.sh papermill_runs/configs/detr-r50.yaml my-run train.epochs=50 train.lr=2e-4
#   sbatch --gpus-per-node=8 --time=48:00:00 papermill_runs/slurm.sh ...      options here win over those below
#   sbatch --nodes=2 papermill_runs/slurm.sh ...                              several nodes
#
# The run name is what counts: a job with the same name resumes from the last checkpoint in
# papermill_runs/my-run, be it after the time limit, a preemption or a failed node; a finished
# run is left as it is. Make the environment once, on a login node: make setup

#SBATCH --job-name=detrlib
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=papermill_runs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120

set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: sbatch papermill_runs/slurm.sh CONFIG RUN_NAME [section.setting=value ...]" >&2
    exit 2
fi
config=$1 name=$2
shift 2
overrides=()
for override in "$@"; do overrides+=(--set "$override"); done

cd "${SLURM_SUBMIT_DIR:-.}"
python=.venv/bin/python
[ -x "$python" ] || python=python # an activated conda environment
gpus=${SLURM_GPUS_ON_NODE:-1}

# Two minutes before the time limit the job puts itself back in the queue.
trap 'echo "time limit near, requeueing"; scontrol requeue "$SLURM_JOB_ID"; exit 0' USR1

if [ "${SLURM_NNODES:-1}" -eq 1 ]; then
    "$python" -m detrlib train "$config" --name "$name" --gpus "$gpus" ${overrides[@]+"${overrides[@]}"} &
else
    # One torchrun per node; they meet on the first. The run folder is made once, before any of them starts.
    "$python" -m detrlib prepare "$config" --name "$name" ${overrides[@]+"${overrides[@]}"}
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "$python" -m torch.distributed.run \
        --nnodes "$SLURM_NNODES" --nproc-per-node "$gpus" \
        --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:$((20000 + SLURM_JOB_ID % 20000))" \
        -m detrlib.engine.loop "$name" &
fi
wait $!
