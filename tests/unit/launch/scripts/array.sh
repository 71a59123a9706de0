#!/bin/bash
# Stage distilled (distill), written by `minitron launch`. Slurm keeps a copy of what was
# submitted: changing this file changes nothing. All that the job reads lies in the folder of its run.
#SBATCH --job-name=minitron-distilled
#SBATCH --output=04_distilled-%j.log
#SBATCH --open-mode=append
#SBATCH --array=0-3%2
#SBATCH --nodes=2
#SBATCH --ntasks=16
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=4:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue

set -uo pipefail

run='/runs/it'"'"'s $HOME'"/$SLURM_ARRAY_TASK_ID"
stage=04_distilled
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
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((12000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

checks=$run/launch/preflight/$stage-$SLURM_JOB_ID-r$restart
mkdir -p "$checks"
# Nodes that wait for one that has left end soon after it.
if ! srun --wait=30 --ntasks=2 --ntasks-per-node=1 \
    "$python" -m minitron_megatron.launch.preflight "$checks" "$run" 0123456789abcdef 8; then
    bad=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | while read -r node; do
        [[ -e $checks/$node.ok ]] || printf '%s\n' "$node"
    done | paste -sd ,)
    say "preflight failed: ${bad:-the nodes do not reach each other}"
    become failed
    exit 1
fi

# Every rank has a log of its own.
own_log='exec "$@" > "$0-${RANK:-$SLURM_PROCID}.log" 2>&1'
command=("$python" -m minitron_megatron.cli distill --config "$run/launch/$stage.yaml")
# Where a rank says why it ends, as under torchrun: srun ends the others, and knows no more than how those ended.
export TORCHELASTIC_ERROR_FILE=$log.error
srun --kill-on-bad-exit=1 --ntasks=16 --ntasks-per-node=8 \
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
