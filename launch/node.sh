#!/bin/bash
# launch/node.sh COMMAND...: one process a GPU of this machine, in one world with other machines.
#
# For schedulers that start one command a machine and act on its exit code, such as Kubernetes:
# torchrun and deepspeed end with 1 after a signal, this ends with the code of train.py (75: stopped
# and saved, start me again), also where the signal came before Python listened to it. Signals go to
# all ranks at once. The first rank that fails decides the code, and the others have 30 s to end.
#
#   NODES, NODE_RANK           how many machines, and which one this is, from 0
#   GPUS                       processes on each machine
#   MASTER_ADDR, MASTER_PORT   machine 0
set -euo pipefail
: "${NODES:?how many machines}" "${NODE_RANK:?which machine this is}" "${GPUS:?processes a machine}"
: "${MASTER_ADDR:?name of machine 0}" "${MASTER_PORT:?a free port of machine 0}"
export MASTER_ADDR MASTER_PORT WORLD_SIZE=$((NODES * GPUS))

ranks=()
warned=0
trap 'warned=1; kill -USR1 "${ranks[@]}" 2>/dev/null || true' TERM USR1
for ((local = 0; local < GPUS; local++)); do
  RANK=$((NODE_RANK * GPUS + local)) LOCAL_RANK=$local "$@" &
  ranks+=($!)
done

code=0
while [ ${#ranks[@]} -gt 0 ]; do
  sleep 0.5 # a trap runs when this ends
  for index in "${!ranks[@]}"; do
    kill -0 "${ranks[index]}" 2>/dev/null && continue
    status=0
    wait "${ranks[index]}" || status=$?
    unset "ranks[index]"
    if [ "$status" -ne 0 ] && [ "$code" -eq 0 ]; then
      code=$status
      deadline=$((SECONDS + 30))
      kill -TERM "${ranks[@]}" 2>/dev/null || true
    fi
  done
  if [ "$code" -ne 0 ] && [ "$SECONDS" -ge "$deadline" ]; then
    kill -KILL "${ranks[@]}" 2>/dev/null || true
  fi
done
# While torch is imported the ranks die of the signal (128 + USR1 or TERM); nothing is lost by that.
if [ "$warned" = 1 ] && { [ "$code" -eq 138 ] || [ "$code" -eq 143 ]; }; then
  code=75
fi
exit "$code"
