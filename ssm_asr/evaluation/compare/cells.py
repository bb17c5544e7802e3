"""The cells of a comparison, model × test set × chunk width × left context, are planned, decoded and kept.

A finished cell is a directory that is there whole or not at all, and is named by what it depends on. So a run that was
stopped goes on where it was, and a cell is decoded anew when its checkpoint, its cuts or its settings are others.
"""

import hashlib
import json
import multiprocessing
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from lhotse import CutSet
from tqdm import tqdm

from ssm_asr import config, units
from ssm_asr.checkpoint import Loaded, load_model
from ssm_asr.data.parallel import ignore_interrupt
from ssm_asr.evaluation.results import SUMMARY, write_results
from ssm_asr.evaluation.streaming import stream_cuts
from ssm_asr.evaluation.test_sets import read_test_cuts, read_test_sets, scoring_unit
from ssm_asr.ops.devices import find_device
from ssm_asr.search.encoding import streaming_context
from ssm_asr.search.recognizer import StreamingRecognizer

Row = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """What a comparison must know about a checkpoint."""

    name: str
    checkpoint: Path
    digest: str  # SHA-256 of the file
    experiment: config.Experiment
    unit: str

    @property
    def keeps_left_context(self) -> bool:
        """Whether the model was trained with any left context."""
        return any(self.experiment.model.encoder.left_context_frames)


@dataclass(frozen=True)
class TestSet:
    """The first `utterances` utterances of a manifest, which are recognised."""

    name: str
    path: Path
    digest: str  # SHA-256 of the file
    utterances: int


@dataclass(frozen=True)
class Cell:
    """One decoding.

    Attributes:
        chunk: in frames of 20 ms.
        left: the left context that chunks really see, in frames of 20 ms.
        asked_lefts: the left contexts that come to `left`, since chunks see whole chunks.
    """

    model: Model
    test_set: TestSet
    chunk: int
    left: int
    asked_lefts: tuple[int, ...]
    device: str

    @property
    def directory(self) -> str:
        """The name of the cell's directory, which tells apart all that the result depends on."""
        decode = self.model.experiment.decode
        settings = [self.chunk, self.left, self.model.unit, decode.method, decode.beam, self.device]
        inputs = [self.model.digest, self.test_set.digest, self.test_set.utterances, *settings]
        digest = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]
        return f"{self.test_set.name}-chunk{self.chunk}-left{self.left}-{digest}"


def load_models(checkpoints: list[Path], names: list[str] | None, unit: str | None) -> list[Model]:
    """Reads the models to compare.

    Args:
        names: what to call them, by default the names of their directories.
        unit: word or char; by default what suits the tokens.

    Raises:
        ValueError: if a checkpoint cannot be read, the names are not one for each model, or models are scored in
            different units.
    """
    if names is None:
        folders = [path.resolve().parent.name for path in checkpoints]
        names = folders if len(set(folders)) == len(folders) else [f"{path.parent}/{path.stem}" for path in checkpoints]
    if len(names) != len(checkpoints) or len(set(names)) != len(names):
        raise ValueError(
            f"{len(checkpoints)} checkpoints named {', '.join(names)}: give --names, one each, no two alike"
        )
    models = []
    for path, name in zip(checkpoints, names, strict=True):
        loaded = load_model(path)
        models.append(Model(name, path, _digest(path), loaded.experiment, scoring_unit(loaded, unit)))
    if len({model.unit for model in models}) > 1:
        raise ValueError("some of the models are scored in words, some in characters: give --unit word or --unit char")
    return models


def load_test_sets(manifests: list[Path], limit: int) -> list[TestSet]:
    """Reads the test sets.

    Args:
        limit: the number of utterances to take of each; 0 takes all.

    Raises:
        ValueError: if cuts cannot be read or scored, or two manifests have one name.
    """
    sets = read_test_sets(manifests, from_audio=True, limit=limit)
    return [
        TestSet(name, path, _digest(path), len(cuts))
        for (name, cuts), path in zip(sets.items(), manifests, strict=True)
    ]


def plan(models: list[Model], sets: list[TestSet], chunks: list[int], lefts: list[int], device: str) -> list[Cell]:
    """Returns every decoding that is needed, in the order of the tables.

    A model without left context has one cell for each chunk width. Left contexts that come to one number of whole
    chunks share a cell.

    Args:
        chunks, lefts: in frames of 20 ms.

    Raises:
        ValueError: if a model cannot do a chunk or left context.
    """
    cells = []
    for test_set in sets:
        for model in models:
            for chunk in chunks:
                asked: dict[int, list[int]] = {}
                for left in lefts if model.keeps_left_context else [0]:
                    try:
                        visible = streaming_context(model.experiment.model.encoder, chunk, left)
                    except ValueError as error:
                        raise ValueError(f"{model.checkpoint} at {units.chunk_ms(chunk)} ms: {error}") from None
                    asked.setdefault(visible, []).append(left)
                cells += [Cell(model, test_set, chunk, left, tuple(those), device) for left, those in asked.items()]
    return cells


def run(cells: list[Cell], out: Path, jobs: int) -> None:
    """Decodes the cells that are not in the directory `out` yet, in `jobs` processes of one thread each."""
    named = {cell.directory: cell for cell in cells}  # equal files of two models make one
    missing = [cell for name, cell in named.items() if not (out / name).exists()]
    print(f"{len(named)} cells, {len(named) - len(missing)} of them finished before")
    out.mkdir(parents=True, exist_ok=True)
    work = partial(decode_cell, out=out, commit=current_commit())
    total = sum(cell.test_set.utterances for cell in missing)
    with tqdm(total=total, desc="compare", unit="utt", disable=not missing) as bar:
        if jobs == 1:
            for cell in missing:
                work(cell, advance=bar.update)
        else:
            with multiprocessing.get_context("spawn").Pool(jobs, initializer=ignore_interrupt) as pool:
                for utterances in pool.imap_unordered(work, missing):
                    bar.update(utterances)


def decode_cell(cell: Cell, out: Path, commit: str, advance: Callable[[], Any] = lambda: None) -> int:
    """Streams the utterances of a cell, writes its directory into `out`, and returns their number.

    Args:
        commit: the commit of this program, for the summary.
        advance: is called after every utterance.
    """
    torch.set_num_threads(1)
    recognizer = StreamingRecognizer(_loaded(cell.model.checkpoint, cell.device), cell.chunk, cell.left)
    refs, hyps, facts = stream_cuts(recognizer, _cuts(cell.test_set.path, cell.test_set.utterances), advance)
    facts |= {
        "cuts": cell.test_set.name,
        "parameters": sum(p.numel() for p in recognizer.model.parameters()),
        "checkpoint": str(cell.model.checkpoint),
        "commit": commit,
    }
    part = out / f".{cell.directory}.part"
    write_results(part, refs, hyps, cell.model.unit, facts)
    part.rename(out / cell.directory)
    return len(refs)


def read_row(cell: Cell, out: Path) -> Row:
    """Reads the row of a finished cell for tables and figures. Rates are fractions."""
    summary = json.loads((out / cell.directory / SUMMARY).read_text(encoding="utf-8"))
    low, high = summary["interval"] or (None, None)
    return {
        "model": cell.model.name,
        "cuts": cell.test_set.name,
        "chunk_ms": units.chunk_ms(cell.chunk),
        "left_frames": cell.left,
        "asked_left_frames": list(cell.asked_lefts),
        "unit": summary["unit"],
        "error_rate": summary["error_rate"],
        "interval_low": low,
        "interval_high": high,
        **{key: summary[key] for key in ("errors", "substitutions", "deletions", "insertions")},
        "length": summary["reference_length"],
        **{key: summary[key] for key in ("utterances", "state_bytes", "real_time_factor", "lag_ms", "parameters")},
        "streams": summary.get("streams", 1),  # cells of earlier versions do not say
        **{key: summary[key] for key in ("method", "device", "commit")},
        "checkpoint": str(cell.model.checkpoint),
        "directory": cell.directory,
    }


def current_commit() -> str:
    """Returns the commit of this program, with "-dirty" if files were changed since; "unknown" outside a checkout."""
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=9", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=1)  # cells of one model follow one another
def _loaded(checkpoint: Path, device: str) -> Loaded:
    return load_model(checkpoint, find_device(device))


@lru_cache(maxsize=1)
def _cuts(path: Path, utterances: int) -> CutSet:
    return read_test_cuts(path, from_audio=True, limit=utterances)
