#!/usr/bin/env bash
# A SLURM cluster inside one machine, for tests: a head and some nodes, each with its own network, host name, processes,
# /etc/hosts and /dev/shm, joined by a bridge. Several may run at once; nothing outside of the folder is changed.
#
#   cluster.sh up FOLDER [NODES]          start one (2 nodes); everything it writes is in FOLDER
#   cluster.sh run FOLDER COMMAND...      on the head: sbatch, squeue, scontrol
#   cluster.sh on FOLDER NODE COMMAND...  on a node
#   cluster.sh kill FOLDER NODE           the node loses power
#   cluster.sh start FOLDER NODE          and gets it back
#   cluster.sh cut|mend FOLDER NODE       its network cable
#   cluster.sh slow FOLDER NODE RATE      its network, at most RATE as tc writes it (20mbit)
#   cluster.sh down FOLDER                end what is left of it
#
# Needs root, network namespaces, and Debian's slurmctld, slurmd, slurm-client, munge, iproute2, procps.
# Partitions: batch (the default; preempted by requeueing, 30 s after SIGTERM) and urgent (preempts). Two GPUs per node
# that are /dev/null under another name. SLURMD_TIMEOUT=10 at `up`: after so many seconds SLURM counts a silent node as dead.
set -euo pipefail

readonly SUBNET=10.213.7 PORT=6817 CPUS=4 GPUS=2
export SLURM_CONF

usage() {
    sed -n '2,/^set/{/^#/!d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2
    exit 2
}

nodes() { seq -f 'node%g' "$(<"$folder/nodes")"; }

namespace() { echo "$(<"$folder/name")-$1"; }

within() { # SECONDS COMMAND...: until it succeeds
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        if ((SECONDS >= end)); then
            echo "cluster.sh: not within the limit: $*" >&2
            return 1
        fi
        sleep 0.1
    done
}

write_configuration() {
    local number node
    mkdir -p "$folder"/{etc,munge,state,spool,log,pids,gpus}
    chmod 755 "$folder"/munge
    (umask 077 && head -c 128 /dev/urandom >"$folder/munge/key")
    for ((number = 0; number < GPUS; number++)); do
        mknod "$folder/gpus/gpu$number" c 1 3
    done
    {
        printf '127.0.0.1 localhost\n%s.1 head\n' "$SUBNET"
        for node in $(nodes); do
            echo "$SUBNET.$((10 + ${node#node})) $node"
        done
    } >"$folder/etc/hosts"
    # No cgroups: they may belong to whatever this machine itself runs in. The file is read although they are not used.
    printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' >"$folder/etc/cgroup.conf"
    echo "Name=gpu File=$folder/gpus/gpu[0-$((GPUS - 1))]" >"$folder/etc/gres.conf"
    local all
    all="node[1-$(<"$folder/nodes")]"
    # Short limits, so that a dead node is noticed and a requeued job starts again within seconds (cred_expire is what
    # SLURM waits before that).
    cat >"$folder/etc/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=head($SUBNET.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=5
SlurmctldPort=$PORT
SlurmdPort=$((PORT + 1))
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/pids/slurmctld
SlurmdPidFile=$folder/pids/slurmd-%n
SlurmctldLogFile=$folder/log/slurmctld
SlurmdLogFile=$folder/log/slurmd-%n
SlurmctldTimeout=10
SlurmdTimeout=${SLURMD_TIMEOUT:-10}
MessageTimeout=5
KillWait=5
ReturnToService=2
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$folder/log/jobs
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=$all CPUs=$CPUS RealMemory=4000 Gres=gpu:$GPUS State=UNKNOWN
PartitionName=batch Nodes=$all Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=$all MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
CONF
}

# Everything of the host is below one process, which is the first of its process namespace: with it the host is gone.
start_host() { # NAME COMMAND...
    local name=$1
    shift
    # shellcheck disable=SC2016  # expanded by the shell inside
    setsid nsenter --net="/run/netns/$(namespace "$name")" \
        unshare --mount --uts --pid --fork --kill-child --mount-proc --propagation private \
        bash -c 'hostname "$1" && mount --bind "$2" /etc/hosts && mount -t tmpfs tmpfs /dev/shm && shift 2 && exec "$@"' \
        - "$name" "$folder/etc/hosts" "$@" </dev/null >>"$folder/log/$name" 2>&1 &
    echo $! >"$folder/pids/$name"
}

start_node() { start_host "$1" /usr/sbin/slurmd -D -N "$1"; }

on_host() { # NAME COMMAND...
    local first
    first=$(pgrep -P "$(<"$folder/pids/$1")" | head -n 1)
    shift
    nsenter --target "$first" --net --uts --mount --pid --wd="$PWD" -- "$@"
}

all_idle() { [[ $(on_host head sinfo --noheader --Node --partition=batch --format=%T | grep -cx idle) == "$(<"$folder/nodes")" ]]; }

up() {
    local node cable
    mkdir -p "$folder"
    echo "${1:-2}" >"$folder/nodes"
    echo "slurm$$" >"$folder/name"
    write_configuration
    # Forced: it wants folders that everyone may enter, and those of tests are private.
    /usr/sbin/munged --force --socket="$folder/munge/socket" --key-file="$folder/munge/key" --pid-file="$folder/munge/pid" \
        --log-file="$folder/munge/log" --seed-file="$folder/munge/seed" --num-threads=2 \
        2>>"$folder/log/munged"
    ip netns add "$(namespace head)"
    ip -n "$(namespace head)" link set lo up
    ip -n "$(namespace head)" link add bridge type bridge
    ip -n "$(namespace head)" addr add "$SUBNET.1/24" dev bridge
    ip -n "$(namespace head)" link set bridge up
    for node in $(nodes); do
        cable=to-$node
        ip netns add "$(namespace "$node")"
        ip -n "$(namespace "$node")" link set lo up
        ip -n "$(namespace head)" link add "$cable" type veth peer name eth0 netns "$(namespace "$node")"
        ip -n "$(namespace head)" link set "$cable" master bridge up
        ip -n "$(namespace "$node")" addr add "$SUBNET.$((10 + ${node#node}))/24" dev eth0
        ip -n "$(namespace "$node")" link set eth0 up
    done
    start_host head /usr/sbin/slurmctld -D -c
    for node in $(nodes); do
        start_node "$node"
    done
    within 30 all_idle
}

gone() { # PID; also one that nobody has waited for is gone
    [[ ! -e /proc/$1 ]] || grep -q '^State:.Z' "/proc/$1/status"
}

end_host() {
    local pid=$folder/pids/$1
    [[ -e $pid ]] || return 0
    kill -KILL "$(<"$pid")" 2>/dev/null || true
    within 10 gone "$(<"$pid")"
    rm -f "$pid"
}

down() {
    local host
    [[ -e $folder/name ]] || return 0
    for host in $(nodes) head; do
        end_host "$host"
        ip netns delete "$(namespace "$host")" 2>/dev/null || true
    done
    if [[ -s $folder/munge/pid ]]; then
        kill "$(<"$folder/munge/pid")" 2>/dev/null || true
    fi
    rm -f "$folder/name"
}

(($# >= 2)) || usage
command=$1 folder=$(realpath --canonicalize-missing -- "$2")
shift 2
SLURM_CONF=$folder/etc/slurm.conf
case $command in
    up)
        trap down EXIT # of a half-made one, too
        up "$@"
        trap - EXIT
        ;;
    run) on_host head "$@" ;;
    on) on_host "$@" ;;
    kill) end_host "$1" ;;
    start) start_node "$1" ;;
    cut) ip -n "$(namespace head)" link set "to-$1" down ;;
    mend) ip -n "$(namespace head)" link set "to-$1" up ;;
    slow)
        # Both ways: what the node sends, and what the bridge sends to it.
        tc -n "$(namespace "$1")" qdisc replace dev eth0 root tbf rate "$2" burst 64kb latency 50ms
        tc -n "$(namespace head)" qdisc replace dev "to-$1" root tbf rate "$2" burst 64kb latency 50ms
        ;;
    down) down ;;
    *) usage ;;
esac
