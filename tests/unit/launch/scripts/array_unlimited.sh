#!/bin/bash
# Stage teacher (import), written by `minitron launch`. Slurm keeps a copy of what was
# submitted: changing this file changes nothing. All that the job reads lies in the folder of its run.
#SBATCH --job-name=minitron-teacher
#SBATCH --output=01_teacher-%j.log
#SBATCH --open-mode=append
#SBATCH --array=0-2
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=4:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue

set -uo pipefail

run='/runs/it'"'"'s $HOME'"/$SLURM_ARRAY_TASK_ID"
stage=01_teacher
restart=${SLURM_RESTART_COUNT:-0}
log=$run/logs/$stage-$SLURM_JOB_ID-r$restart
mkdir -p "$run/logs"

say() { printf '%s: %s\n' "$(date +%FT%T)" "$*"; }
become() { printf '%s %s %s\n' "$1" "$SLURM_JOB_ID" "$restart" > "$run/launch/$stage.state"; }

if [[ -e $run/launch/$stage.done ]]; then
    say "done already"
    exit 0
fi

again() {
    if (( restart >= 3 )); then
        say "$1, after $restart restarts: giving up"
        become failed
        exit 1
    fi
    say "$1: back into the queue"
    become requeued
    scontrol requeue "$SLURM_JOB_ID"
    exit 1  # to be ended by Slurm first
}

become running
cd '/work dir' || exit 1
python=python3
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1} PYTHONUNBUFFERED=1
# One queue of kernels, so that communication starts in the order in which Megatron-Core issues it.
export CUDA_DEVICE_MAX_CONNECTIONS=1

# Every rank has a log of its own.
own_log='exec "$@" > "$0-${RANK:-$SLURM_PROCID}.log" 2>&1'
command=("$python" -m minitron_megatron.cli import --config "$run/launch/$stage.yaml")
# Where a rank says why it ends, as under torchrun: srun ends the others, and knows no more than how those ended.
export TORCHELASTIC_ERROR_FILE=$log.error
srun --kill-on-bad-exit=1 --ntasks=1 --ntasks-per-node=1 \
    bash -c "$own_log" "$log" "${command[@]}"
status=$?
[[ ! -s $TORCHELASTIC_ERROR_FILE ]] || status=$(sed 's/.*"exit_status": \([0-9]*\).*/\1/' "$TORCHELASTIC_ERROR_FILE")

case $status in
0)
    : > "$run/launch/$stage.done"
    become done
    ;;
2)
    tail -n 20 "$log-0.log"
    say "this takes a change of settings: see $log-*.log"
    become failed
    exit 2
    ;;
75) again "saved and stopped, as a signal asked" ;;
*)
    tail -n 20 "$log-0.log"
    again "ended with status $status, see $log-*.log"
    ;;
esac
