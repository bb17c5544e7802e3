#!/usr/bin/env bash
# LibriSpeech from audio to word error rate; `bash run.sh --help` lists the options.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
start_dir="$PWD"
source "$root/tools/recipe.sh"

recipe "Prepares LibriSpeech, trains a streaming transducer, and reports its word error rate.

Without --corpus a small corpus of made speech is used: a smoke test of a quarter of an hour on a CPU.
Stages: 1 data, 2 manifests, 3 features, 4 tokens, 5 noise, 6 train, 7 average, 8 decode, 9 stream, 10 report.
A stage is skipped when its outputs are complete and its inputs have not changed." 10
option corpus "" DIR "LibriSpeech or mini LibriSpeech, whichever parts are there"
option small digits SIZE "the corpus to make without --corpus: digits, or sentences (larger, for a GPU)"
option config "" FILE "what to train (default: conf/zipformer_tiny.yaml; with sentences zipformer_s, with --corpus zipformer_m)"
list set A.B=VALUE "change a field of the configuration; repeatable"
option exp_dir "" DIR "experiment directory (default: exp/CORPUS-CONFIG)"
option musan "" DIR "MUSAN; without it, noises are made from the training speech"
flag on_the_fly "compute features while training instead of storing them"
option gpus 1 N "train on N GPUs of this machine through torchrun"
option jobs 2 N "processes that compute features"
option stream_limit 500 N "utterances a test set to stream chunk by chunk; 0 is all"
flag ci "a still smaller run, which fails if less than half of the words are right"
parse_options "$@"

from_start_dir() { # an absolute path for what the user gave relative to where the recipe was called
    case "$1" in /* | "") echo "$1" ;; *) echo "$start_dir/$1" ;; esac
}
corpus="$(from_start_dir "$corpus")" musan="$(from_start_dir "$musan")" exp_dir="$(from_start_dir "$exp_dir")"
if [ -n "$config" ] && [ ! -f "$(from_start_dir "$config")" ] && [ -f "$here/$config" ]; then
    config="$here/$config"
fi
config="$(from_start_dir "$config")"

# What can be wrong is found before anything is installed.
[ -z "$corpus" ] || [ -d "$corpus" ] || _recipe_fail "--corpus $corpus: no such directory"
[ -z "$musan" ] || [ -d "$musan" ] || _recipe_fail "--musan $musan: no such directory"
[ -z "$config" ] || [ -f "$config" ] || _recipe_fail "--config $config: no such file"
[[ "$small" =~ ^(digits|sentences)$ ]] || _recipe_fail "--small $small: give digits or sentences"
for name in gpus jobs stream_limit; do
    [[ "${!name}" =~ ^[0-9]+$ ]] || _recipe_fail "--${name/_/-} ${!name}: give a number"
done

bash "$root/tools/setup.sh" --extras "$([ -n "$corpus" ] || echo corpus)"
source "$root/.venv/bin/activate"
cd "$here"
# Threads that wait should sleep: spinning, they hold one another up as soon as other programs run.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

perturb=()
report_options=()
note=""
if [ -n "$corpus" ]; then
    name="$(basename "$corpus")"
    perturb=(--speed-perturb)
    : "${config:=conf/zipformer_m.yaml}"
else
    name="small-$small"
    make_options=(--size "$small")
    if [ "$small" = sentences ]; then
        : "${config:=conf/zipformer_s.yaml}"
    fi
    : "${config:=conf/zipformer_tiny.yaml}"
    note="The speech is made (synthetic): these figures say that the recipe works, not how good a model is."
    if "$ci"; then
        name+="-ci"
        make_options+=(--minutes 15)
        set+=(train.num_epochs=12)
        report_options+=(--at-most 50)
    fi
    corpus="data/$name/corpus"
    run_stage 1 data --inputs local/make_corpus.py local/texts.py --outputs "$corpus/LibriSpeech" -- \
        python local/make_corpus.py "${make_options[@]}" --out "$corpus"
fi
data="data/$name"
: "${exp_dir:=exp/$name-$(basename "$config" .yaml)}"

run_stage 2 manifests --inputs "$corpus" --outputs "$data/manifests" -- \
    python local/manifests.py --corpus "$corpus" --out "$data/manifests"
run_stage 2 check --inputs "$data/manifests" --outputs "$data/cuts" -- \
    python -m ssm_asr.prepare check --manifests "$data/manifests" --out "$data/cuts" --jobs "$jobs"

features=(python -m ssm_asr.prepare features --out "$data/features" --jobs "$jobs")
if "$on_the_fly"; then
    features+=(--on-the-fly)
fi
tests=()
for cuts in "$data"/cuts/cuts_*.jsonl.gz; do
    part="$(basename "$cuts" .jsonl.gz)"
    case "$part" in
        cuts_train) options=(--shuffle "${perturb[@]}") ;;
        cuts_test*) options=() tests+=("${part#cuts_}") ;;
        *) options=() ;;
    esac
    run_stage 3 "features ${part#cuts_}" --inputs "$cuts" --outputs "$data/features/$part.jsonl.gz" -- \
        "${features[@]}" --cuts "$cuts" "${options[@]}"
done

overrides=("${set[@]/#/--set=}")
tokens="$data/tokens-$(basename "$config" .yaml)"
run_stage 4 tokens --inputs "$data/cuts/cuts_train.jsonl.gz" "$config" --outputs "$tokens/tokens.txt" -- \
    python -m ssm_asr.prepare tokens --config "$config" "${overrides[@]}" \
    --cuts "$data/cuts/cuts_train.jsonl.gz" --out "$tokens"

if [ -n "$musan" ]; then
    source_of_noise=(--musan "$musan")
else
    source_of_noise=(--cuts "$data/cuts/cuts_train.jsonl.gz")
fi
run_stage 5 noise --inputs "${source_of_noise[1]}" --outputs "$data/noise/cuts_noise.jsonl.gz" -- \
    python -m ssm_asr.prepare noise "${source_of_noise[@]}" --out "$data/noise"

train=(python -m ssm_asr.train)
if [ "$gpus" -gt 1 ]; then
    train=(torchrun --standalone --nproc-per-node "$gpus" -m ssm_asr.train)
fi
train_inputs=("$data"/features/cuts_{train,dev}.jsonl.gz "$tokens/tokens.txt" "$data/noise/cuts_noise.jsonl.gz")
run_stage 6 train --inputs "$config" "${train_inputs[@]}" --outputs "$exp_dir/trained.json" -- \
    "${train[@]}" --config "$config" "${overrides[@]}" --exp-dir "$exp_dir" --tokens "$tokens" \
    --train-cuts "${train_inputs[0]}" --valid-cuts "${train_inputs[1]}" --noise-cuts "${train_inputs[3]}"

model="$exp_dir/averaged.pt"
run_stage 7 average --inputs "$exp_dir/trained.json" --outputs "$model" -- \
    python -m ssm_asr.average --exp-dir "$exp_dir" --out "$model"

for part in "${tests[@]}"; do
    cuts="$data/features/cuts_$part.jsonl.gz"
    run_stage 8 "decode $part" --inputs "$model" "$cuts" --outputs "$exp_dir/decode-$part/summary.json" -- \
        python -m ssm_asr.decode --checkpoint "$model" --cuts "$cuts" --out "$exp_dir/decode-$part"
    run_stage 9 "stream $part" --inputs "$model" "$cuts" --outputs "$exp_dir/stream-$part/summary.json" -- \
        python -m ssm_asr.stream --checkpoint "$model" --cuts "$cuts" --out "$exp_dir/stream-$part" \
        --limit "$stream_limit"
done

if [ "$stage" -le 10 ] && [ "$stop_stage" -ge 10 ]; then
    python -m ssm_asr.report --exp-dir "$exp_dir" --note "$note" "${report_options[@]}"
fi
