"""BiasNorm (Yao et al., arXiv 2310.11230, equation 4). Shapes: D channels (last dimension)."""

from torch import Tensor

from ssm_asr.ops import dispatch
from ssm_asr.ops.limit import limit
from ssm_asr.ops.numbers import Numbers, known_zero, on_device


def bias_norm(x: Tensor, bias_D: Tensor, log_scale: Tensor, limits: Numbers | None = None) -> Tensor:
    """x · exp(log_scale) / rms(x - bias), the rms over channels, in the type of x.

    Args:
        x: (…, D).
        bias_D, log_scale: the learned bias and the learned scalar.
        limits: how the gradient of log_scale is limited; see ssm_asr.ops.limit.
    """
    if dispatch.use_kernels(x):
        from ssm_asr.ops import bias_norm_kernel  # only where Triton is installed

        if limits is not None:
            limits = None if known_zero(limits[0]) else on_device(limits, x.device)
        return bias_norm_kernel.bias_norm(x, bias_D, log_scale, limits)
    log_scale = limit(log_scale, limits)
    # x is float16 or bfloat16 under autocast, the bias never: the mean square is taken in the bias's precision.
    mean_square = (x - bias_D).square().mean(dim=-1, keepdim=True)
    return x * (mean_square.rsqrt() * log_scale.exp()).to(x.dtype)
