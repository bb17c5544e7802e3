"""This package holds the state-space models S4D and Mamba-2, and tools to train and to analyse them."""
