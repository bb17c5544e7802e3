"""BiasNorm normalises channels by their root mean square after subtracting a learned bias.

Source: Yao et al., "Zipformer" (arXiv 2310.11230), equation 4. Shapes: D channels (last dimension).
"""

from torch import Tensor

from ssm_asr.ops import dispatch
from ssm_asr.ops.limit import limit
from ssm_asr.ops.numbers import Numbers, known_zero, on_device


def bias_norm(x: Tensor, bias_D: Tensor, log_scale: Tensor, limits: Numbers | None = None) -> Tensor:
    """Returns x · exp(log_scale) / rms(x - bias) in the type of x, with the rms taken over channels.

    Args:
        x: (…, D).
        bias_D, log_scale: the learned bias and the learned scalar, in float32 or float64.
        limits: the numbers of `ssm_asr.ops.limit.limit` for log_scale; None does not limit it.
    """
    if dispatch.use_kernels(x):
        from ssm_asr.ops import bias_norm_kernel  # only where Triton is installed

        if limits is not None:
            limits = None if known_zero(limits[0]) else on_device(limits, x.device)
        return bias_norm_kernel.bias_norm(x, bias_D, log_scale, limits)
    log_scale = limit(log_scale, limits)
    # Under autocast x may be in float16 or bfloat16, but the bias is not: so the mean square has the bias's precision.
    mean_square = (x - bias_D).square().mean(dim=-1, keepdim=True)
    return x * (mean_square.rsqrt() * log_scale.exp()).to(x.dtype)
