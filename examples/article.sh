#!/usr/bin/env bash
# From a checkpoint to a server, with Arena's commands: upload, convert, compare, deploy, ask.
#
#     examples/article.sh
#
# runs on this machine with the demo model, in about a minute on two cores. On a cluster, for example:
#
#     export HASTEN_CLUSTER=kubernetes NAMESPACE=default-group IMAGE=registry.example.com/hasten:cuda GPUS=2 TYPE=fp16
#     export MODEL=bloom-7b1 DATASET=lambada_test.jsonl SAMPLES=5153 PROMPT='deepspeed is'
#     export STORE=oss://bucket UPLOAD='ossutil cp -r' HASTEN_ACCESS_KEY_SECRET=...
#     export VOLUME_OPTIONS='--oss-bucket bucket --oss-url ENDPOINT --oss-fuse ossfs --access-key-id ID'
#     examples/article.sh
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
scratch=$(mktemp -d)

MODEL=${MODEL:-$here/demo-model}              # a Hugging Face folder
DATASET=${DATASET:-$here/stories/test.jsonl}  # JSON lines, each with "text"
SAMPLES=${SAMPLES:-128}                       # number of them to compare
PROMPT=${PROMPT:-That year the spring came early.}
NAMESPACE=${NAMESPACE:-default-group}
IMAGE=${IMAGE:-}                              # of jobs and server; none on this machine
GPUS=${GPUS:-0}                               # of each comparing job, and of the server: 0 or 2
TYPE=${TYPE:-fp32}                            # data type to compute in
STORE=${STORE:-$scratch/store}                # folder or bucket that becomes the volume
UPLOAD=${UPLOAD:-copy}                        # command that copies a folder into STORE
VOLUME_OPTIONS=${VOLUME_OPTIONS:-}            # options of `data create`; none for a folder
DATA_OPTIONS=${DATA_OPTIONS:-}                # --map-paths, if this machine's kernel forbids mounts
SERVER_OPTIONS=${SERVER_OPTIONS:-}            # such as --grpc-port 18001
PYTHON=${PYTHON:-python3}                     # has tritonclient and transformers, for the client

server=ft-triton-bloom
volume=bloom-pvc
original=/mnt/model/bloom-7b1
converted=/mnt/model/bloom-7b1-ft-fp16
jobs=()
forward=

arena() {
    hasten cluster "$@"
}

copy() {
    mkdir -p "$2"
    cp -r "$1/." "$2"
}

say() {
    printf '\n== %s\n' "$*"
}

clean_up() {
    local status=$?
    trap - EXIT
    set +e
    say "Clean up"
    if [ -n "$forward" ]; then kill "$forward"; fi
    if [ -n "$(server_field 1)" ]; then arena serve delete -n "$NAMESPACE" "$server"; fi
    if [ "${#jobs[@]}" -gt 0 ]; then arena delete -n "$NAMESPACE" "${jobs[@]}"; fi
    arena data delete -n "$NAMESPACE" "$volume"
    rm -rf "$scratch"
    exit "$status"
}

# A job: its name, its GPUs, and the command.
submit() {
    arena submit pytorchjob --gpus="$2" ${IMAGE:+--image "$IMAGE"} --name "$1" --workers 1 --namespace "$NAMESPACE" \
        --data "$volume:/mnt" $DATA_OPTIONS "$3"
    jobs+=("$1")
}

status_of() {
    arena get -n "$NAMESPACE" "$1" | awk '$1 == "Status:" { print $2 }'
}

# Prints a job's log until it ends; fails if the job does.
wait_for() {
    local status
    while status=$(status_of "$1") && [[ $status = PENDING || $status = QUEUING ]]; do sleep 0.5; done
    arena logs -n "$NAMESPACE" -f "$1"
    while status=$(status_of "$1") && [ "$status" = RUNNING ]; do sleep 0.5; done
    if [ "$status" != SUCCEEDED ]; then
        arena get -n "$NAMESPACE" -e "$1" >&2
        return 1
    fi
}

# A column of the server's line in `serve list`; nothing if there is no such server.
server_field() {
    arena serve list -n "$NAMESPACE" | awk -v name="$server" -v column="$1" '$1 == name { print $column }'
}

wait_for_server() {
    for _ in $(seq 900); do
        if [ "$(server_field 5)" = 1 ]; then return; fi
        sleep 1
    done
    arena serve get -n "$NAMESPACE" -e "$server" >&2
    return 1
}

say "Upload"
mkdir "$scratch/lambada"
head -n "$SAMPLES" "$DATASET" > "$scratch/lambada/lambada_test.jsonl"
$UPLOAD "$MODEL" "$STORE/model/bloom-7b1"
$UPLOAD "$scratch/lambada" "$STORE/data/lambada"
read -ra source <<< "$VOLUME_OPTIONS"
if [ "${#source[@]}" = 0 ]; then source=(--path "$STORE"); fi
arena data create "$volume" -n "$NAMESPACE" "${source[@]}" --description "a model and its data"
trap clean_up EXIT
arena data list -n "$NAMESPACE"

say "Convert"
submit convert-bloom "$((GPUS > 0))" "hasten convert -i $original -o $converted -tp 2 -dt fp16 -p 2 -v"
wait_for convert-bloom
arena list -n "$NAMESPACE"

say "Compare"
lambada="hasten bench lambada --tokenizer-path $original --dataset-path /mnt/data/lambada/lambada_test.jsonl \
--batch-size 16 -dt $TYPE"
submit compare-hf "$GPUS" "$lambada --test-hf"
wait_for compare-hf
submit compare-hasten "$GPUS" "$lambada --checkpoint-path $converted/2-gpu --tensor-para-size 2"
wait_for compare-hasten
for job in compare-hf compare-hasten; do
    printf '%s  %s\n' "$job" "$(arena logs -n "$NAMESPACE" "$job" | grep '^Accuracy: ')"
done

say "Deploy"
submit create-repository 0 "hasten repository create $converted/2-gpu /mnt/triton_repo --tokenizer-path $original \
--tensor-para-size 2 -dt $TYPE"
wait_for create-repository
arena serve triton --namespace="$NAMESPACE" --version=1 --data="$volume:/mnt" --name="$server" --allow-metrics \
    --gpus="$GPUS" --replicas=1 ${IMAGE:+--image="$IMAGE"} --model-repository=/mnt/triton_repo \
    $DATA_OPTIONS $SERVER_OPTIONS
wait_for_server
arena serve list -n "$NAMESPACE"

say "Ask"
grpc=$(server_field 7 | sed 's/.*GRPC:\([0-9]*\).*/\1/')
url=$(server_field 6):$grpc
if [ "${HASTEN_CLUSTER:-local}" = kubernetes ]; then
    kubectl -n "$NAMESPACE" port-forward "svc/$server-1-tritoninferenceserver" "$grpc:$grpc" > /dev/null &
    forward=$!
    url=localhost:$grpc
    sleep 3
fi
"$PYTHON" "$here/client.py" --url "$url" --tokenizer "$MODEL" --prompt "$PROMPT"
