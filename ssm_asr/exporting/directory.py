"""Export directories, which are written beside their place, checked, and renamed into place only if all is well."""

import contextlib
import math
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ssm_asr.exporting import check, onnx_files
from ssm_asr.exporting.parts import Part

MARK = "# Exported model"  # the first line of every README.md that an export writes


class ExportError(ValueError):
    """An export cannot be made, or does not compute what the model computes. The message is one line."""


@dataclass(frozen=True)
class Written:
    """A file of an export, its size in bytes, and its difference from the model (see `check.worst_difference`)."""

    name: str
    size_bytes: int
    difference: float


@contextlib.contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """Returns a context with a new directory to write in.

    If the block ends well, the directory takes the place of `out`, and an earlier export there is removed. If the block
    raises, the directory is removed and `out` stays as it was.

    Raises:
        ExportError: if `out` exists and is not an export.
    """
    readme = out / "README.md"
    if out.exists() and not (readme.is_file() and readme.read_text(encoding="utf-8").startswith(MARK)):
        raise ExportError(f"{out}: is there and holds no export, so it is not replaced; give another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_onnx_files(parts: list[Part], precisions: list[str], directory: Path) -> list[Written]:
    """Writes every part in every precision as ONNX, and compares each file with the model.

    Args:
        parts: the parts of the export.
        precisions: names from `onnx_files.PRECISIONS`.
        directory: where the files are written.

    Raises:
        ExportError: if a file in float32 differs from the model by more than rounding explains, a file in another
            precision gives inf or NaN, or a file is not what the runtime expects.
    """
    written = []
    for part in parts:
        full = directory / onnx_files.file_name(part.name, "fp32")
        try:
            onnx_files.write_onnx(part, full)
        except ValueError as error:
            raise ExportError(str(error)) from error
        checked = _checked(part, full)
        if "fp32" in precisions:
            written.append(checked)
        for precision in precisions:
            if precision != "fp32":
                path = directory / onnx_files.file_name(part.name, precision)
                onnx_files.convert(full, precision, path)
                onnx_files.validate(part, path)
                difference = check.worst_difference(part, onnx_files.runner(path))
                if not math.isfinite(difference):
                    raise ExportError(f"{path.name}: differs from the model by {difference}; leave out {precision}")
                written.append(Written(path.name, path.stat().st_size, difference))
        if "fp32" not in precisions:
            full.unlink()
    return written


def write_torchscript(parts: list[Part], directory: Path) -> list[Written]:
    """Writes every part as TorchScript, and compares each file with the model.

    Raises:
        ExportError: if a file differs from the model by more than rounding explains.
    """
    written = []
    for part in parts:
        path = directory / f"{part.name}.pt"
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            torch.jit.trace(part.module, part.draw(2), check_trace=False).save(str(path))
            written.append(_checked(part, path))
    return written


def _checked(part: Part, path: Path) -> Written:
    """Compares a file in float32 with the model.

    Raises:
        ExportError: if the difference is more than check.TOLERANCE and more than rounding explains.
    """
    run = torch.jit.load(str(path)) if path.suffix == ".pt" else onnx_files.runner(path)
    difference = check.worst_difference(part, run)
    near = difference <= check.TOLERANCE  # false for NaN
    if not near and not difference <= check.ROUNDING_ERRORS * check.rounding_error(part):
        raise ExportError(f"{path.name}: differs from the model by {difference:.1e}, more than {check.TOLERANCE:g}")
    return Written(path.name, path.stat().st_size, difference)
