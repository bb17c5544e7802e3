"""`python -m ssm_asr VERB` is `ssm-asr VERB`, also where the package was not installed."""

from ssm_asr.cli import main

if __name__ == "__main__":
    main()
