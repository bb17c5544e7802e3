"""`python -m ssm_asr.import_icefall` is `ssm-asr import-icefall`."""

from ssm_asr.cli import start

if __name__ == "__main__":
    start("import-icefall")
