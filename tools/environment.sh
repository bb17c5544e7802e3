# Enters the environment in which recipes and tests run: `source tools/environment.sh`, then call enter_environment.

# is_recent PYTHON: tells whether this Python is 3.11 or later, as setup.py requires.
is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# version_of PYTHON: prints its version.
version_of() { "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null || echo "none"; }

# enter_environment KIND EXTRAS: EXTRAS are extras of setup.py, with commas between them. KIND is
#   venv      .venv at the root of the repository; tools/setup.sh makes it and installs what it lacks
#   current   the environment of the caller; it is checked and not changed, and the package need not be installed in it
enter_environment() {
    local root
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    case "$1" in
        venv)
            bash "$root/tools/setup.sh" --extras "$2"
            source "$root/.venv/bin/activate"
            ;;
        current)
            if ! command -v python >/dev/null; then
                echo "environment: error: there is no 'python' on the PATH; activate an environment that has one" >&2
                return 2
            elif ! is_recent python; then
                echo "environment: error: $(command -v python) is version $(version_of python);" \
                    "activate an environment with Python 3.11 or later" >&2
                return 2
            fi
            export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
            python "$root/tools/check_environment.py" --extras "$2"
            ;;
        *)
            echo "environment: error: '$1' is no environment; give venv or current" >&2
            return 2
            ;;
    esac
}
