"""Kernels in Triton for what takes a GPU's time in the encoder beside matrix products.

Each equals a form in plain PyTorch, which is its fallback and its oracle; see ssm_asr.ssm.kernels for the switch.
"""
