"""This package holds the operations that have a fast form for GPUs beside their plain form in PyTorch.

The rule of the package:

- NAME.py holds the plain form. It runs on every device and defines what the operation computes.
- NAME_kernel.py beside it holds a kernel written in Triton. A test holds the two equal in values and gradients.
- One function of NAME.py chooses between them by `dispatch.use_kernels`, and by conditions of its own.
- Code outside the package calls this function and knows neither kernels nor Triton.

An operation that PyTorch computes fast enough has a plain form alone.

    attention      attention weights with relative positions under chunk masks; weighted sums of values
    balance        the gradient of a balancer, which keeps each channel's statistics within limits
    bias_norm      BiasNorm, the normalisation of the Zipformer
    depthwise      depthwise convolutions over time, in chunks and over images; the front end's first convolution
    gates          x·activation(gate); weighted sums whose weights may be made even
    joiner_terms   log-probabilities of blank and next symbol from the joiner, without its full output
    lattice        the sum over all alignments of a transducer lattice, and how probable each arc is
    limit          the gradient of a parameter that is kept near an interval
    linear         linear layers and small convolutions, with a faster gradient of the bias
    mamba_block    causal convolution with SiLU, and gated RMS norm, around Mamba-2's state-space operation
    penalty        a gradient that pushes large numbers down
    resample       weighted downsampling and repeating upsampling of frames
    residual       bypass, masked residual connections, and forks whose gradients are added up at once
    scaled_adam    the passes of the ScaledAdam optimiser over all parameters
    ssd            Mamba-2's state-space operation: recurrent, in blocks, and by kernels
    sum_joint      log-probabilities of the simple joiner, a sum of two projections
    swoosh         the Swoosh activations, with balancer and dropout
    whiten         the gradient of a whitener, which makes channels less correlated

The other modules help these: `dispatch` says whether kernels run, `devices` finds devices and copies without waiting,
`numbers` has the types of numbers that change with the batch, `pieces` cuts large work into pieces, and `precision`
picks floating-point types. Several kernels share `sums_kernel` and `products_kernel`.
"""
