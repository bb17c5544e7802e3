# Holds what the recipes share: their options, and the stages from cuts to error rates. A run.sh sets $here to its own
# directory and does
#
#   source "$here/../../recipes_lib/asr_stages.sh"
#   asr_recipe "Prepares a corpus, ..." "what --corpus takes" "what --config is by default"
#   option colour red COLOUR "an option of its own"
#   asr_parse_options "$@"
#   asr_set_up
#
# It then has the corpus in $corpus ("" if it is to be made) and an environment to work in. It sets $name, the name of
# the data, and $config, calls asr_configs, runs stages 1 (data) and 2 (manifests, into "$data/manifests"), and calls
# asr_stages. recipe.sh explains options and stages.

root="$(cd "$here/../.." && pwd)"
start_dir="$PWD"
source "$root/recipes_lib/recipe.sh"
source "$root/tools/environment.sh"

perturb=()        # these options of prepare features are for training cuts
report_options=() # report gets these options
note=""           # this line stands above the table of results

# asr_recipe DESCRIPTION CORPUS_HELP CONFIG_HELP: declares the options.
asr_recipe() {
    recipe "$1

Without --corpus a small corpus of made speech is used: a smoke test on a CPU.
Stages: 1 data, 2 manifests, 3 features, 4 tokens, 5 noise, 6 train, 7 average, 8 decode, 9 stream, 10 export,
11 compare, 12 long form, 13 report. A stage is skipped if its outputs are complete and its inputs have not changed." 13
    option corpus "" DIR "$2"
    option config "" FILE "what to train (default: $3)"
    list set A.B=VALUE "change a field of the configuration; repeatable"
    option exp_dir "" DIR "experiment directory (default: exp/CORPUS-CONFIG)"
    option compare_with "" FILE "train this configuration too, and compare both over chunk widths"
    option musan "" DIR "MUSAN; without it, noises are made from the training speech"
    flag store_features "store features (115 MB an hour of audio), which are otherwise computed from audio while training"
    option gpus 1 N "train on N GPUs of this machine through torchrun"
    option env "${SSM_ASR_ENV:-venv}" KIND \
        "venv (.venv, where packages are installed) or current (that of the caller, only checked)"
    option jobs 2 N "processes that read the corpus and compute features"
    option stream_limit 500 N "utterances a test set to stream chunk by chunk; 0 is all"
    flag long_form "recognise the test sets joined, too, up to 30 utterances at a time with pauses"
    flag ci "a still smaller run, which fails if less than half of the text is right"
}

# _from_start_dir PATH: prints the absolute path of what the user gave relative to where the recipe was called.
_from_start_dir() {
    case "$1" in /* | "") echo "$1" ;; *) echo "$start_dir/$1" ;; esac
}

# _find_config PATH: prints the absolute path of a configuration, which may also be given relative to the recipe.
_find_config() {
    if [ -n "$1" ] && [ ! -f "$(_from_start_dir "$1")" ] && [ -f "$here/$1" ]; then
        echo "$here/$1"
    else
        _from_start_dir "$1"
    fi
}

# asr_parse_options "$@": sets the options, and finds what is wrong with them before anything is installed.
asr_parse_options() {
    local option
    parse_options "$@"
    for option in corpus musan exp_dir; do
        printf -v "$option" '%s' "$(_from_start_dir "${!option}")"
    done
    for option in config compare_with; do
        printf -v "$option" '%s' "$(_find_config "${!option}")"
        [ -z "${!option}" ] || [ -f "${!option}" ] || _recipe_fail "--${option/_/-} ${!option}: no such file"
    done
    for option in corpus musan; do
        [ -z "${!option}" ] || [ -d "${!option}" ] || _recipe_fail "--$option ${!option}: no such directory"
    done
    asr_choice env venv current
    for option in gpus jobs stream_limit; do
        [[ "${!option}" =~ ^[0-9]+$ ]] || _recipe_fail "--${option/_/-} ${!option}: give a number"
        [ "$option" = stream_limit ] || [ "${!option}" -gt 0 ] || _recipe_fail "--$option ${!option}: give 1 or more"
    done
}

# asr_choice NAME CHOICES...: ends the recipe unless the option has one of these values.
asr_choice() {
    local option="$1" choice
    shift
    for choice in "$@"; do
        if [ "${!option}" = "$choice" ]; then
            return
        fi
    done
    choice="$(printf ', %s' "$@")"
    _recipe_fail "--${option/_/-} ${!option}: give one of ${choice#, }"
}

# _runs STAGE: tells whether this stage is asked for.
_runs() {
    [ "$stage" -le "$1" ] && [ "$stop_stage" -ge "$1" ]
}

# asr_set_up: enters an environment with the packages that the stages need, and the directory of the recipe.
asr_set_up() {
    local extras=()
    if [ -z "$corpus" ] && _runs 1; then
        extras+=(corpus)
    fi
    if _runs 10; then
        extras+=(export)
    fi
    enter_environment "$env" "$(IFS=,; echo "${extras[*]}")"
    cd "$here"
    # Threads that wait should sleep, since spinning threads hold one another up as soon as other programs run.
    export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
    overrides=("${set[@]/#/--set=}")
    if [ -z "$corpus" ]; then
        note="The speech is made (synthetic): these figures say that the recipe works, not how good a model is."
        store_features=true # they are few, and a CPU trains on each many times
        # A second thread makes the training of tiny models slower, and results would depend on the number of cores.
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
        if "$ci"; then
            report_options=(--at-most 50)
        fi
    fi
}

# _whole_config CONFIG: writes a configuration with every field, as --set changes them, to $data/configs under its own
# name, and prints its path.
_whole_config() {
    local whole
    whole="$data/configs/$(basename "$1")"
    mkdir -p "$data/configs"
    python -m ssm_asr.describe --config "$1" "${overrides[@]}" --yaml >"$whole.new"
    mv "$whole.new" "$whole"
    echo "$whole"
}

# asr_configs: replaces the configurations by whole ones, which the stages read, so that a mistake in one is found before
# any work.
asr_configs() {
    data="data/$name"
    : "${exp_dir:=exp/$name-$(basename "$config" .yaml)}"
    if [ "$(basename "$compare_with")" = "$(basename "$config")" ]; then
        _recipe_fail "--compare-with $compare_with: has the name of what it is compared with; give a file of another name"
    elif [ -n "$compare_with" ] && [ "$(realpath -m "$(_other_exp_dir)")" = "$(realpath -m "$exp_dir")" ]; then
        _recipe_fail "--compare-with $compare_with: would train in $exp_dir, too; give another --exp-dir"
    fi
    config="$(_whole_config "$config")"
    if [ -n "$compare_with" ]; then
        compare_with="$(_whole_config "$compare_with")"
    fi
}

# asr_anew DIR COMMAND...: runs a command after removing its output directory, so that no file of an earlier run stays.
asr_anew() {
    rm -rf "$1"
    "${@:2}"
}

# _prepare_cuts: makes cuts, and their features if they are to be stored, and sets $tests, the names of the test sets.
_prepare_cuts() {
    local features cuts part train="$data/cuts/cuts_train.jsonl.gz" others=() made=()
    run_stage 2 check --inputs "$data/manifests" --outputs "$data/cuts" -- \
        asr_anew "$data/cuts" \
        python -m ssm_asr.prepare check --manifests "$data/manifests" --out "$data/cuts" --jobs "$jobs"
    features=(python -m ssm_asr.prepare features --out "$data/features" --jobs "$jobs")
    if [ "$store_features" = false ]; then
        features+=(--on-the-fly)
    fi
    tests=()
    for cuts in "$data"/cuts/cuts_*.jsonl.gz; do
        part="$(basename "$cuts" .jsonl.gz)"
        if [ "$cuts" != "$train" ]; then
            others+=("$cuts")
            made+=("$data/features/$part.jsonl.gz")
        fi
        if [[ "$part" = cuts_test* ]]; then
            tests+=("${part#cuts_}")
        fi
    done
    run_stage 3 "features dev, test" --inputs "${others[@]}" --outputs "${made[@]}" -- \
        "${features[@]}" --cuts "${others[@]}"
    run_stage 3 "features train" --inputs "$train" --outputs "$data/features/cuts_train.jsonl.gz" -- \
        "${features[@]}" --cuts "$train" --shuffle "${perturb[@]}"
}

# _make_tokens STAGE CONFIG: makes the tokens of a configuration.
_make_tokens() {
    local tokens
    tokens="$data/tokens-$(basename "$2" .yaml)"
    run_stage "$1" tokens --inputs "$data/cuts/cuts_train.jsonl.gz" "$2" --outputs "$tokens/tokens.txt" -- \
        python -m ssm_asr.prepare tokens --config "$2" --cuts "$data/cuts/cuts_train.jsonl.gz" --out "$tokens"
}

# _make_noise: makes cuts of noise, of MUSAN or of made noises.
_make_noise() {
    local source_of_noise=(--cuts "$data/cuts/cuts_train.jsonl.gz")
    if [ -n "$musan" ]; then
        source_of_noise=(--musan "$musan")
    fi
    run_stage 5 noise --inputs "${source_of_noise[1]}" --outputs "$data/noise/cuts_noise.jsonl.gz" -- \
        python -m ssm_asr.prepare noise "${source_of_noise[@]}" --out "$data/noise" --jobs "$jobs"
}

# _train_and_average TRAIN_STAGE AVERAGE_STAGE CONFIG EXP_DIR: trains a model and averages its weights.
_train_and_average() {
    local tokens inputs train=(python -m ssm_asr.train)
    if [ "$gpus" -gt 1 ]; then
        train=(python -m torch.distributed.run --standalone --nproc-per-node "$gpus" -m ssm_asr.train) # torchrun
    fi
    tokens="$data/tokens-$(basename "$3" .yaml)"
    inputs=("$data"/features/cuts_{train,dev}.jsonl.gz "$tokens/tokens.txt" "$data/noise/cuts_noise.jsonl.gz")
    run_stage "$1" train --inputs "$3" "${inputs[@]}" --outputs "$4/trained.json" -- \
        "${train[@]}" --config "$3" --exp-dir "$4" --tokens "$tokens" \
        --train-cuts "${inputs[0]}" --valid-cuts "${inputs[1]}" --noise-cuts "${inputs[3]}"
    run_stage "$2" average --inputs "$3" "$4/trained.json" --outputs "$4/averaged.pt" -- \
        python -m ssm_asr.average --exp-dir "$4" --out "$4/averaged.pt" --config "$3"
}

# _decode_and_stream: recognises each test set in both ways.
_decode_and_stream() {
    local part cuts model="$exp_dir/averaged.pt"
    for part in "${tests[@]}"; do
        cuts="$data/features/cuts_$part.jsonl.gz"
        run_stage 8 "decode $part" --inputs "$model" "$cuts" --outputs "$exp_dir/decode-$part/summary.json" -- \
            python -m ssm_asr.decode --checkpoint "$model" --cuts "$cuts" --out "$exp_dir/decode-$part"
        run_stage 9 "stream $part" --inputs "$model" "$cuts" --outputs "$exp_dir/stream-$part/summary.json" -- \
            python -m ssm_asr.stream --checkpoint "$model" --cuts "$cuts" --out "$exp_dir/stream-$part" \
            --limit "$stream_limit"
    done
}

# _kept FILE COMMAND...: shows what the command prints, and keeps it in the file if the command succeeds.
_kept() {
    local file="$1"
    shift
    "$@" | tee "$file.new"
    mv "$file.new" "$file"
}

# _export: exports the model for sherpa-onnx, which must then recognise what the model recognises.
_export() {
    local part cuts model="$exp_dir/averaged.pt" sherpa="$exp_dir/sherpa"
    run_stage 10 export --inputs "$model" --outputs "$sherpa" -- \
        python -m ssm_asr.export --checkpoint "$model" --format sherpa --precision fp32 int8 --out "$sherpa"
    for part in "${tests[@]}"; do
        cuts="$data/features/cuts_$part.jsonl.gz"
        run_stage 10 "sherpa $part" --inputs "$model" "$sherpa" "$cuts" --outputs "$exp_dir/sherpa-$part.txt" -- \
            _kept "$exp_dir/sherpa-$part.txt" python -m ssm_asr check-export --checkpoint "$model" \
            --export "$sherpa" --cuts "$cuts" --precision fp32 int8 --limit "$stream_limit"
    done
}

# _other_exp_dir: prints the experiment directory of the configuration to compare with.
_other_exp_dir() {
    echo "exp/$name-$(basename "$compare_with" .yaml)"
}

# _compare: trains the other model with the overrides of the first, and compares the two.
_compare() {
    local models=("$exp_dir/averaged.pt" "$(_other_exp_dir)/averaged.pt")
    local cuts=("${tests[@]/#/$data/features/cuts_}")
    cuts=("${cuts[@]/%/.jsonl.gz}")
    _make_tokens 11 "$compare_with"
    _train_and_average 11 11 "$compare_with" "$(dirname "${models[1]}")"
    run_stage 11 compare --inputs "${models[@]}" "${cuts[@]}" --outputs "$exp_dir/compare/results.json" -- \
        python -m ssm_asr.compare --checkpoints "${models[@]}" --chunks 160ms,320ms,640ms,1280ms,2560ms --left 1280ms,2560ms \
        --cuts "${cuts[@]}" --limit "$stream_limit" --jobs "$jobs" --note "$note" --out "$exp_dir/compare"
}

# _long_form: recognises the joined utterances of each test set.
_long_form() {
    local part cuts model="$exp_dir/averaged.pt"
    for part in "${tests[@]}"; do
        cuts="$data/features/cuts_$part.jsonl.gz"
        run_stage 12 "long form $part" --inputs "$model" "$cuts" --outputs "$exp_dir/long-form-$part.md" -- \
            _kept "$exp_dir/long-form-$part.md" python -m ssm_asr long-form --checkpoint "$model" --cuts "$cuts"
    done
}

# asr_stages: runs all stages after the manifests in "$data/manifests".
asr_stages() {
    _prepare_cuts
    _make_tokens 4 "$config"
    _make_noise
    _train_and_average 6 7 "$config" "$exp_dir"
    _decode_and_stream
    _export
    if [ -n "$compare_with" ]; then
        _compare
    fi
    if "$long_form"; then
        _long_form
    fi
    if _runs 13; then
        python -m ssm_asr.report --exp-dir "$exp_dir" --note "$note" "${report_options[@]}"
        if [ "$env" = current ]; then
            echo "where the package is not installed, first: export PYTHONPATH=$root"
        fi
    fi
}
