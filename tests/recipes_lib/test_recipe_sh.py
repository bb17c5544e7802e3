"""The stages and options of recipes work, on toy stages that log each of their runs."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[2] / "recipes_lib" / "recipe.sh"

# Stage 1 copies the raw text; stage 2 joins it with a word of the options.
RECIPE = f"""
source "{LIBRARY}"
recipe "Copies and joins." 2
option word "hello" WORD "the word to join"
option corpus "" DIR "where the text is"
flag on_the_fly "do it later"
list set A.B=C "override a value"
parse_options "$@"

copy() {{
    echo copy >>log
    cp "$1" "$2.part"
    [ ! -e fail ] || false  # the function fails in its middle
    mv "$2.part" "$2"
}}
join() {{
    echo join >>log
    echo "$1 $(cat "$2")" >"$3"
}}
raw="my corpus/raw.txt" copied="my data/copy.txt" joined=exp/joined.txt
run_stage 1 copy --inputs "$raw" --outputs "$copied" -- copy "$raw" "$copied"
run_stage 2 join --inputs "$copied" --outputs "$joined" -- join "$word" "$copied" "$joined"
"""


class Recipe:
    """Holds a recipe in a directory of its own."""

    def __init__(self, directory: Path, script: str = RECIPE) -> None:
        self.directory = directory
        (directory / "run.sh").write_text(script)
        (directory / "my corpus").mkdir()
        self.raw = directory / "my corpus" / "raw.txt"
        self.raw.write_text("world")

    def run(self, *args: str, status: int = 0) -> tuple[list[str], str]:
        """Runs the recipe, and returns which commands ran and what was printed."""
        log = self.directory / "log"
        log.write_text("")
        done = subprocess.run(["bash", "run.sh", *args], cwd=self.directory, capture_output=True, text=True, timeout=30)
        assert done.returncode == status, done.stdout + done.stderr
        return log.read_text().split(), done.stdout + done.stderr

    def result(self) -> str:
        return (self.directory / "exp" / "joined.txt").read_text().strip()


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe(tmp_path)


def test_runs_once(recipe: Recipe) -> None:
    ran, out = recipe.run()
    assert ran == ["copy", "join"]
    assert recipe.result() == "hello world"
    assert re.search(r"\[stage 1/2 copy\] running\n\[stage 1/2 copy\] done in \d+ s\n", out)
    ran, out = recipe.run()
    assert ran == []
    assert out == "[stage 1/2 copy] up to date\n[stage 2/2 join] up to date\n"


def test_redone_when_an_input_changes(recipe: Recipe) -> None:
    recipe.run()
    os.utime(recipe.raw, (1, 1))  # a small file counts by its content, so this changes nothing
    assert recipe.run()[0] == []
    recipe.raw.write_text("moon")
    assert recipe.run()[0] == ["copy", "join"]
    assert recipe.result() == "hello moon"


def test_redone_only_where_it_matters(recipe: Recipe) -> None:
    recipe.run()
    (recipe.directory / "my data" / "copy.txt").unlink()  # an output is gone, but an equal one is made
    assert recipe.run()[0] == ["copy"]


def test_redone_when_the_command_changes(recipe: Recipe) -> None:
    recipe.run()
    assert recipe.run("--word", "good  bye")[0] == ["join"]
    assert recipe.result() == "good  bye world"


def test_directories_and_large_files_count_by_size_and_time(tmp_path: Path) -> None:
    script = f"""
source "{LIBRARY}"
recipe "Counts." 1
parse_options "$@"
count() {{ echo count >>log; mkdir -p out; touch out/done; }}
run_stage 1 count --inputs tree big --outputs out -- count
"""
    recipe = Recipe(tmp_path, script)
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    leaf = tmp_path / "tree" / "sub" / "a b"
    leaf.write_text("x")
    big = tmp_path / "big"
    big.write_bytes(bytes(2**20 + 1))
    assert recipe.run()[0] == ["count"]
    assert recipe.run()[0] == []
    for path in (leaf, big):
        os.utime(path, (1, 1))
        assert recipe.run()[0] == ["count"], path
        assert recipe.run()[0] == []
    leaf.rename(leaf.with_name("c"))
    assert recipe.run()[0] == ["count"]


def test_resumes_after_failure(recipe: Recipe) -> None:
    (recipe.directory / "fail").touch()
    ran, out = recipe.run(status=1)
    assert ran == ["copy"]
    assert re.search(r"\[stage 1/2 copy\] stopped after \d+ s \(status 1\); the same command goes on from here", out)
    (recipe.directory / "fail").unlink()
    assert recipe.run()[0] == ["copy", "join"]


def test_failed_redo_is_not_up_to_date(recipe: Recipe) -> None:
    """The outputs of the earlier run, which had other inputs, must not count as those of the failed one."""
    recipe.run()
    recipe.raw.write_text("moon")
    (recipe.directory / "fail").touch()
    recipe.run(status=1)
    recipe.raw.write_text("world")
    (recipe.directory / "fail").unlink()
    assert recipe.run()[0][0] == "copy"


def test_interrupted_stage_is_not_done(tmp_path: Path) -> None:
    """Ctrl-C stops the recipe even if the command tidies up and ends without error."""
    script = f"""
source "{LIBRARY}"
recipe "Sleeps." 2
parse_options "$@"
polite() {{
    bash -c 'trap "exit 0" INT; touch out; echo ready >>log; for i in {{1..100}}; do sleep 0.1; done'
}}
run_stage 1 sleep --outputs out -- polite
run_stage 2 after --outputs never -- touch never
"""
    Recipe(tmp_path, script)
    process = subprocess.Popen(
        ["bash", "run.sh"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        # Tests that a shell has put into the background ignore SIGINT, which no trap can change.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = tmp_path / "log"
    while not log.exists():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # a terminal, too, sends it to all processes of the group
    out = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 130
    assert "[stage 1/2 sleep] stopped after" in out
    assert not (tmp_path / "never").exists()
    assert not list((tmp_path / ".stages").iterdir())


def test_stage_range(recipe: Recipe) -> None:
    _, out = recipe.run("--stage", "2", status=2)
    assert "[stage 2/2 join] needs my data/copy.txt, which is missing: stage 1 makes it" in out
    assert recipe.run("--stop-stage", "1")[0] == ["copy"]
    assert recipe.run("--stage", "2")[0] == ["join"]


def test_missing_input_and_missing_output(recipe: Recipe) -> None:
    recipe.raw.unlink()
    assert "needs my corpus/raw.txt, which is missing\n" in recipe.run(status=2)[1]
    recipe.raw.write_text("x")
    run_sh = recipe.directory / "run.sh"
    run_sh.write_text(RECIPE.replace('>"$3"', ">elsewhere"))
    assert "ended without making all of: exp/joined.txt" in recipe.run(status=2)[1]


def test_options(tmp_path: Path) -> None:
    script = RECIPE.split("copy() {")[0]
    show = 'printf "<%s>" "$stage" "$stop_stage" "$word" "$corpus" "$on_the_fly" "${set[@]}"'
    recipe = Recipe(tmp_path, script + show)
    assert recipe.run()[1] == "<1><2><hello><><false>"
    args = [
        "--set",
        "a.b=c d",
        "--corpus",
        "/data/my corpus",
        "--on-the-fly",
        "--set",
        "e=*",
        "--stop-stage",
        "1",
    ]
    assert recipe.run(*args)[1] == "<1><1><hello></data/my corpus><true><a.b=c d><e=*>"


def test_help_and_bad_options(recipe: Recipe) -> None:
    ran, out = recipe.run("--help")
    assert ran == []
    assert out.startswith("Usage: bash run.sh [options]\n\nCopies and joins.\n\n")
    assert "  --stop-stage N         last stage to run (default: 2)\n" in out
    assert "  --set A.B=C            override a value\n" in out
    for args, message in (
        (["--wrod", "x"], "unknown option --wrod (see --help)"),
        (["--path", "x"], "unknown option --path (see --help)"),  # an option cannot set just any variable of the shell
        (["word"], "unexpected argument 'word' (see --help)"),
        (["--word"], "--word needs a value (see --help)"),
        (["--stage", "two"], "--stage two: give a number up to 2"),
        (["--stop-stage", "3"], "--stop-stage 3: give a number up to 2"),
    ):
        ran, out = recipe.run(*args, status=2)
        assert ran == []
        assert out == f"run.sh: error: {message}\n"
