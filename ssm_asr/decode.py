"""`python -m ssm_asr.decode` is `ssm-asr decode`."""

from ssm_asr.cli import start

if __name__ == "__main__":
    start("decode")
