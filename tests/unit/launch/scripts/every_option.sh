#!/bin/bash
# Stage distilled (distill), written by `minitron launch`. Slurm keeps a copy of what was
# submitted: changing this file changes nothing. All that the job reads lies in the folder of its run.
#SBATCH --job-name=minitron-distilled
#SBATCH --output=04_distilled-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks=16
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --partition=gpu,long
#SBATCH --account="a b"
#SBATCH --qos=high
#SBATCH --constraint="h100&ib"
#SBATCH --reservation=mine
#SBATCH --time=1-00:00:00
#SBATCH --signal=USR1@120
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --mail-type=FAIL
#SBATCH "--comment=it's \"ours\""

set -uo pipefail

run='/runs/it'"'"'s $HOME'
stage=04_distilled
restart=${SLURM_RESTART_COUNT:-0}
log=$run/logs/$stage-$SLURM_JOB_ID-r$restart
# The id of an array's last task by itself means all of the array.
job=$SLURM_JOB_ID
mkdir -p "$run/logs"

say() { printf '%s: %s\n' "$(date +%FT%T)" "$*"; }
put() { printf '%s\n' "$2" > "$run/launch/.$stage.$1" && mv "$run/launch/.$stage.$1" "$run/launch/$stage.$1"; }
become() { put state "$1 $SLURM_JOB_ID $restart"; }
fail() { say "$1"; become failed; exit "${2:-1}"; }
field() { scontrol --oneliner show job "$job" | sed -n "s/.* $1=\([^ ]*\).*/\1/p"; }

if [[ -e $run/launch/$stage.done ]]; then
    say "done already"
    exit 0
fi

# Seconds of all starts so far.
spent() { echo $(( $(cat "$run/launch/$stage.spent" 2> /dev/null || echo 0) + SECONDS )); }

requeue() {
    become requeued
    put spent "$(spent)"
    # Slurm's controller may be away for a while.
    for _ in {1..20}; do
        scontrol requeue "$job" && return 0
        sleep 15
    done
    return 1
}

again() {
    # Restarts in a row from one and the same checkpoint.
    local count=0 last='' here=''
    [[ ! -e $run/launch/$stage.restarts ]] || read -r count last < "$run/launch/$stage.restarts"
    here=$(cat "$run/launch/$stage.output/checkpoints/latest_checkpointed_iteration.txt" 2> /dev/null)
    [[ $here == "$last" ]] || count=0
    (( count < 7 )) || fail "$1, and has come no further in $count restarts: giving up"
    put restarts "$((count + 1)) $here"
    say "$1: back into the queue"
    requeue || fail "Slurm does not put the job back: launch it again"
    exit 1  # to be ended by Slurm first
}

# Slurm ends a job whose time is up in the same way as one that was cancelled.
ended() {
    trap '' TERM
    [[ $(field Reason) != TimeLimit ]] || again "the time is up"
    say "ended by Slurm"
    become ended
    exit 1
}
trap ended TERM
# Waits in a way that lets the trap work at once.
step() { srun "$@" & wait $!; }

become running
cd '/work dir' || fail "cannot go to the folder that it was launched from"
set +u  # which what is not ours may not bear
module load cuda/12.8 nccl || fail "cannot load the modules"
source '/opt/my env/bin/activate' || fail "cannot activate the virtual environment"
set -u
python=python
# Steps have the job's environment, whatever sbatch was told of its own.
export SLURM_EXPORT_ENV=ALL
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1} PYTHONUNBUFFERED=1
# One queue of kernels, so that communication starts in the order in which Megatron-Core issues it.
export CUDA_DEVICE_MAX_CONNECTIONS=1
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((12000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

checks=$run/launch/preflight/$stage-$SLURM_JOB_ID-r$restart
mkdir -p "$checks"
step --kill-on-bad-exit=0 --wait=60 --ntasks=2 --ntasks-per-node=1 \
    "$python" -m minitron_megatron.launch.preflight "$checks" "$run" 0123456789abcdef 8
status=$?
if (( status )); then
    # Nodes that have found something; if none has, those that have said nothing.
    bad=$(find "$checks" -name '*.bad' -printf '%f\n' | sed 's/\.bad$//' | sort | paste -sd ,)
    [[ -n $bad ]] || (( status < 128 )) || again "the preflight was ended from outside"
    [[ -n $bad ]] || bad=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | while read -r node; do
        [[ -e $checks/$node.ok ]] || printf '%s\n' "$node"
    done | paste -sd ,)
    say "preflight failed: ${bad:-the nodes do not reach each other}"
    # What several nodes have in common, all of them, is not mended by others.
    num_bad=$(tr ',' '\n' <<< "$bad" | wc -l)
    if [[ -n $bad ]] && (( num_bad < 2 && restart < 7 )); then
        excluded=$(field ExcNodeList)
        [[ $excluded == "(null)" || -z $excluded ]] || bad=$excluded,$bad
        # A job takes another list while it waits, which it does from the moment it is put back.
        trap '' TERM
        requeue && scontrol update JobId="$job" ExcNodeList="$bad" && exit 1
    fi
    fail "no ranks were started"
fi

# Every rank has a log of its own.
own_log='exec "$@" > "$0-${RANK:-$SLURM_PROCID}.log" 2>&1'
# Where a rank says why it ends: srun ends the others, and knows no more than how those ended.
export TORCHELASTIC_ERROR_FILE=$log.error
command=("$python" -m minitron_megatron.cli distill --config "$run/launch/$stage.yaml")
step --kill-on-bad-exit=1 --wait=0 --ntasks=16 --ntasks-per-node=8 --cpus-per-task=12 \
    bash -c "$own_log" "$log" "${command[@]}"
status=$?
[[ ! -s $TORCHELASTIC_ERROR_FILE ]] ||
    status=$(sed 's/.*"exit_status": \([0-9]*\).*/\1/' "$TORCHELASTIC_ERROR_FILE" | grep -Ex '[0-9]+' || echo "$status")

case $status in
0)
    put done "$(spent)"
    become done
    ;;
2)
    tail -n 20 "$log-0.log"
    fail "this takes a change of settings: see $log-*.log" 2
    ;;
75) again "saved and stopped, as a signal asked" ;;
*)
    tail -n 20 "$log-0.log"
    again "ended with status $status, see $log-*.log"
    ;;
esac
