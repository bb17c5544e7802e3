"""`python -m ssm_asr.describe` is `ssm-asr describe`."""

from ssm_asr.cli import start

if __name__ == "__main__":
    start("describe")
