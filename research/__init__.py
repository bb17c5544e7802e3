"""Programs for single studies, and the modules that they are made of; `--help` of each says what it does."""
