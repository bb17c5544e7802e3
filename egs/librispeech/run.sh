#!/usr/bin/env bash
# LibriSpeech from audio to word error rate; `bash run.sh --help` lists the options.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/../../recipes_lib/asr_stages.sh"

asr_recipe "Prepares LibriSpeech, trains a streaming transducer, and reports its word error rate." \
    "LibriSpeech or mini LibriSpeech, whichever parts are there" \
    "conf/zipformer_tiny.yaml; with sentences zipformer_s, with --corpus zipformer_m"
option small digits SIZE "the corpus to make without --corpus: digits, or sentences (larger, for a GPU)"
asr_parse_options "$@"
asr_choice small digits sentences
asr_set_up

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
    if "$ci"; then
        name+="-ci"
        make_options+=(--minutes 15)
        overrides=(--set=train.num_epochs=12 "${overrides[@]}")
    fi
fi
asr_configs

if [ -z "$corpus" ]; then
    corpus="$data/corpus"
    run_stage 1 data --inputs local/make_corpus.py local/texts.py --outputs "$corpus/LibriSpeech" -- \
        python local/make_corpus.py "${make_options[@]}" --out "$corpus"
fi
run_stage 2 manifests --inputs "$corpus" --outputs "$data/manifests" -- \
    asr_anew "$data/manifests" python local/manifests.py --corpus "$corpus" --out "$data/manifests"
asr_stages
