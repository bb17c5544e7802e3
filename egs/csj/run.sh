#!/usr/bin/env bash
# CSJ, the Corpus of Spontaneous Japanese, from audio to character error rate; `bash run.sh --help` lists the options.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/../../recipes_lib/asr_stages.sh"

asr_recipe "Prepares CSJ, trains a streaming transducer, and reports its character error rate." \
    "CSJ in the layout of its USB edition, with MORPH/ and WAV/; it is only read" \
    "conf/sammo_tiny.yaml; with --corpus sammo_m"
option transcript_mode disfluent MODE "disfluent, fluent, number or symbol"
asr_parse_options "$@"
asr_choice transcript_mode disfluent fluent number symbol
asr_set_up

if [ -n "$corpus" ]; then
    name="$(basename "$corpus")"
    perturb=(--speed-perturb)
    : "${config:=conf/sammo_m.yaml}"
else
    name=small
    : "${config:=conf/sammo_tiny.yaml}"
    make_options=()
    if "$ci"; then
        name+="-ci"
        make_options+=(--minutes 15)
        overrides=(--set=train.num_epochs=13 --set=data.max_duration_s=10 "${overrides[@]}")
    elif [ "$(basename "$config")" = zipformer_tiny.yaml ]; then
        : "${compare_with:=conf/sammo_tiny.yaml}"
    else
        : "${compare_with:=conf/zipformer_tiny.yaml}"
    fi
fi
made="data/$name/corpus" # all modes share the made corpus
if [ "$transcript_mode" != disfluent ]; then
    name+="-$transcript_mode"
fi
asr_configs

if [ -z "$corpus" ]; then
    corpus="$made"
    run_stage 1 data --inputs local/make_corpus.py local/{grammar,talks}.py --outputs "$corpus/CSJ" -- \
        python local/make_corpus.py "${make_options[@]}" --out "$corpus" --jobs "$jobs"
fi
run_stage 2 manifests --inputs "$corpus" local/{manifests,sdb,talks,transcripts}.py --outputs "$data/manifests" -- \
    asr_anew "$data/manifests" python local/manifests.py --corpus "$corpus" --out "$data/manifests" \
    --transcripts "$data/transcripts" --transcript-mode "$transcript_mode" --jobs "$jobs"
asr_stages
