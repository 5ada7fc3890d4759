#!/bin/bash
# Train one run on a Slurm cluster, or let it do any other command of detrlib:
#
#   sbatch papermill_runs/slurm.sh papermill_runs/configs/detr-r50.yaml my-run
#   sbatch papermill_runs/slurm.sh papermill_runs/configs/detr-r50.yaml my-run train.epochs=50 train.lr=2e-4
#   sbatch --gpus-per-node=8 --time=48:00:00 papermill_runs/slurm.sh ...      options here win over those below
#   sbatch --nodes=2 papermill_runs/slurm.sh ...                              several nodes
#   sbatch --gpus-per-node=0 --cpus-per-task=4 papermill_runs/slurm.sh ...    none but the CPU
#   sbatch papermill_runs/slurm.sh explain my-run --images 500                another command
#
# Sweeps are submitted by `detrlib sweep FILE --slurm [options of sbatch]`, as an array of this script.
#
# It may be submitted from any folder; the log, detrlib-JOB.out, lies in that one, paths in the command start at the
# project. The run name is what counts: a job of the same name goes on where the last one was saved; a finished run is
# left as it is, and that is success. Two minutes before the time limit, and at a preemption, training saves and the
# job is put back in the queue, as long as each start makes a step. Make the environment once, on a login node:
# make setup

#SBATCH --job-name=detrlib
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120

set -euo pipefail
set -m # so that what is started in the background does not ignore interrupts

case ${1:-} in
*.yaml | *.yml)
    config=$1 name=${2:?"usage: sbatch papermill_runs/slurm.sh CONFIG RUN_NAME [section.setting=value ...]"}
    command=(train "$config" --name "$name" --job)
    for setting in "${@:3}"; do command+=(--set "$setting"); done
    ;;
?*) command=("$@") ;;
*)
    echo "usage: sbatch papermill_runs/slurm.sh CONFIG RUN_NAME [section.setting=value ...], or a command of detrlib"
    exit 2
    ;;
esac
job=$SLURM_JOB_ID
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    command+=(--run "$SLURM_ARRAY_TASK_ID")
fi

# Slurm runs a copy of this script; the project is where the original lies.
project=$(scontrol show job "$job" | sed -n 's|^ *Command=\(.*\)$|\1|p') || true
project=${project%%/papermill_runs/*}
[ -d "$project/detrlib" ] || project=${SLURM_SUBMIT_DIR:-.}
cd "$project"
python=.venv/bin/python
[ -x "$python" ] || python=python # an activated conda environment
echo "job $job on ${SLURM_JOB_NODELIST:-this machine}, start $((${SLURM_RESTART_COUNT:-0} + 1))"

# Signals reach this shell alone; it hands them on and waits until everything is saved.
trap 'kill -USR1 "${child:-}" || true' USR1 # the time limit is near
trap 'kill -TERM "${child:-}" || true' TERM # a preemption, or scancel
"$python" -m detrlib "${command[@]}" &
child=$!
while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
code=0
wait "$child" || code=$?

# 75: saved, start again. Where Slurm is ending the job it does so itself, or somebody has cancelled it.
if [ "$code" -eq 75 ] && [ "$(squeue --noheader --format=%T --jobs="$job" || echo RUNNING)" = RUNNING ]; then
    scontrol requeue "$job" && sleep 60 # which ends this script
    echo "error: job $job cannot be put back in the queue; submit it again to go on"
fi
if [ "$code" -eq 138 ] || [ "$code" -eq 143 ]; then # of the signal itself
    echo "error: job $job was ended by a signal with nothing saved; submit it again, and give it more --time"
fi
exit "$code"
