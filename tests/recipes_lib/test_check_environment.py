"""What is missing from an environment, or too old, is said in one line each; other versions are noted in one line."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TESTED = dict(
    line.lower().replace("_", "-").split("==")
    for line in (ROOT / "tools" / "constraints.txt").read_text().splitlines()
    if "==" in line
)
CORE = re.findall(
    r'"([\w-]+)(?:>=[\d.]+)?"', (ROOT / "setup.py").read_text().split("install_requires=[")[1].split("]")[0]
)


def make_site(directory: Path, versions: dict[str, str]) -> Path:
    """Makes a directory in which these packages are installed, as far as their metadata says."""
    for name, version in versions.items():
        info = directory / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return directory


def check(site: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs the check with the packages of this directory alone."""
    command = [sys.executable, "-S", str(ROOT / "tools" / "check_environment.py"), *options]
    environment = {"PYTHONPATH": str(site)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_tested_versions(tmp_path: Path) -> None:
    assert len(CORE) > 10 and "torch" in CORE
    done = check(make_site(tmp_path, {name: TESTED[name] for name in CORE}))
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"environment: \S+ is used as it is \(Python 3\.\d+\.\d+\)\n", done.stdout)


def test_missing_and_old_packages(tmp_path: Path) -> None:
    versions = {name: TESTED[name] for name in CORE} | {"torch": "2.4.0+cu121", "scipy": "1.99"}
    del versions["lhotse"]
    done = check(make_site(tmp_path, versions))
    assert done.returncode == 2
    assert done.stdout == f"environment: versions other than the tested ones: scipy 1.99 ({TESTED['scipy']})\n"
    assert done.stderr.splitlines() == [
        "environment: error: torch 2.4.0+cu121 is too old, 2.11 or later is needed: choose the build for your CUDA at "
        "https://pytorch.org/get-started/locally",
        f"environment: error: lhotse 1.33 or later is missing: python -m pip install lhotse=={TESTED['lhotse']}",
    ]


def test_extras(tmp_path: Path) -> None:
    site = make_site(tmp_path, {name: TESTED[name] for name in (*CORE, "onnx")} | {"torch": "2.13.0a0+git1234"})
    (site / "onnxruntime.py").touch()  # the module of another package, onnxruntime-gpu
    assert check(site).returncode == 0
    done = check(site, "--extras", "export")
    assert done.returncode == 2
    assert done.stdout.endswith(f", onnxruntime of unknown version ({TESTED['onnxruntime']})\n")
    (line,) = done.stderr.splitlines()
    assert (
        line
        == f"environment: error: sherpa-onnx is missing: python -m pip install sherpa-onnx=={TESTED['sherpa-onnx']}"
    )
    done = check(site, "--extras", "exports")
    assert done.returncode == 2 and "--extras exports: give some of corpus, export, dev" in done.stderr
