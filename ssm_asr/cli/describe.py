"""Describe a model: ssm-asr describe --config FILE --vocab-size V [--chunk TIME --left TIME] [--json]

Prints parameters by part, the streaming state that each stream costs, frame rates and look-ahead. No weights are made.
With --yaml instead of --vocab-size, prints the whole configuration: every field, also those that have their defaults.
"""

import argparse
import json
import sys

from ssm_asr.cli.arguments import chunk_arguments
from ssm_asr.config import load_experiment, to_yaml
from ssm_asr.evaluation.describe import as_text, describe


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of the experiment")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="change one field")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--vocab-size", type=int, help="tokens, blank included")
    asked.add_argument("--yaml", action="store_true", help="print the whole configuration, and nothing of the model")
    chunk_arguments(parser, default="the configuration's")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    try:
        experiment = load_experiment(options.config, options.set)
        if options.yaml:
            print(to_yaml(experiment), end="")
            return 0
        if options.vocab_size < 1:
            raise ValueError(f"--vocab-size {options.vocab_size}: give 1 or more")
        chunk = experiment.decode.chunk_frames if options.chunk is None else options.chunk
        left = experiment.decode.left_context_frames if options.left is None else options.left
        facts = describe(experiment, options.vocab_size, chunk, left)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(facts, indent=2) if options.json else as_text(facts))
    return 0
