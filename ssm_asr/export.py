"""`python -m ssm_asr.export` is `ssm-asr export`."""

from ssm_asr.cli import start

if __name__ == "__main__":
    start("export")
