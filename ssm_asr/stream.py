"""`python -m ssm_asr.stream` is `ssm-asr stream`."""

from ssm_asr.cli import start

if __name__ == "__main__":
    start("stream")
