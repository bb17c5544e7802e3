"""The optimiser ScaledAdam of the Zipformer (Yao et al., ICLR 2024, arXiv 2310.11230, section 3.5).

Shapes: T tensors of a parameter group, laid out in C rows of R elements; P steps between two size updates.
"""

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ssm_asr.ops.scaled_adam import Rows, add_step, row_dots

ROW_ELEMENTS = 1024
NORM_HISTORY_STEPS = 100  # The clipping threshold follows the median norm of this many steps.
EARLY_THRESHOLD_STEPS = (10, 20, 40)  # Before it has that many, the threshold is estimated at these steps.
MIN_RMS = 1e-5
MAX_RMS = 3.0
MAX_SIZE_STEP = 0.1
MAX_SCALAR = 10.0


class _FlatGroup:
    """Lays the tensors of one parameter group end to end; each starts a new row of ROW_ELEMENTS elements.

    One operation on the rows serves all tensors at once, where a loop would launch one for each. A quantity of a
    tensor, for example its rms, is one number for each of its rows. The unused ends of rows are always zero.

    Args:
        params: parameters of one type on one device.
        period: number of steps between two updates of the tensors' sizes.
        scalar_lr_scale: factor on the learning rate of one-element tensors.

    Raises:
        ValueError: if the parameters differ in type or device.
    """

    def __init__(self, params: list[Tensor], period: int, scalar_lr_scale: float) -> None:
        if len({(p.dtype, p.device) for p in params}) != 1:
            kinds = sorted({f"{p.dtype} on {p.device}" for p in params})
            raise ValueError(f"a parameter group mixes {', '.join(kinds)}: give each its own group")
        self.params = params
        self.device = params[0].device
        rows = [math.ceil(p.numel() / ROW_ELEMENTS) for p in params]
        self._first_rows = [sum(rows[:i]) for i in range(len(rows))]
        self._rows_T = torch.tensor(rows, device=self.device)
        self._tensor_of_row_C = torch.repeat_interleave(self._rows_T)
        self._numel_T = torch.tensor([p.numel() for p in params], device=self.device)
        self._is_scalar_T = self._numel_T == 1
        self.scalars = [p for p in params if p.numel() == 1]

        self.param_CR = params[0].new_zeros(sum(rows), ROW_ELEMENTS)
        self.grad_CR = torch.zeros_like(self.param_CR)
        self.delta_CR = torch.zeros_like(self.param_CR)  # The next step adds this momentum.
        self.exp_avg_sq_CR = torch.zeros_like(self.param_CR)
        self.size_grads_PT = self.param_CR.new_zeros(period, len(params))
        self.size_exp_avg_sq_T = self.param_CR.new_zeros(len(params))
        self._param_views = self._views(self.param_CR)
        self._grad_views = self._views(self.grad_CR)

        # A one-element tensor has a fixed "rms", which scales its learning rate and its part of the norm.
        self.rms_T = self.param_CR.new_full((len(params),), scalar_lr_scale)
        torch._foreach_copy_(self._param_views, self.params)
        self.refresh_rms()

    def _views(self, flat_CR: Tensor) -> list[Tensor]:
        """Returns the part of each tensor in flat_CR, with the strides of the tensor, so that foreach stays fast."""
        flat = flat_CR.view(-1)
        return [
            flat[row * ROW_ELEMENTS :][: p.numel()].as_strided(p.size(), p.stride())
            for row, p in zip(self._first_rows, self.params, strict=True)
        ]

    def _dot_T(self, x_CR: Tensor, y_CR: Tensor) -> Tensor:
        """Returns the dot product of each tensor in x_CR with its counterpart in y_CR."""
        dots_C = row_dots(x_CR, y_CR)
        # "unsafe" skips a check of the lengths, for which the host would wait for the device.
        return torch.segment_reduce(dots_C, "sum", lengths=self._rows_T, unsafe=True)

    def gather(self) -> None:
        """Reads parameters and gradients; a gradient of None counts as zero."""
        torch._foreach_copy_(self._param_views, self.params)
        have_grad = [p.grad is not None for p in self.params]
        if not all(have_grad):
            self.grad_CR.zero_()
        if any(have_grad):
            views = [v for v, have in zip(self._grad_views, have_grad, strict=True) if have]
            torch._foreach_copy_(views, [p.grad for p in self.params if p.grad is not None])

    def scatter(self) -> None:
        """Writes the parameters back, and limits one-element tensors to ±MAX_SCALAR."""
        torch._foreach_copy_(self.params, self._param_views)
        if self.scalars:
            torch._foreach_clamp_min_(self.scalars, -MAX_SCALAR)
            torch._foreach_clamp_max_(self.scalars, MAX_SCALAR)

    def scaled_grad_norm(self) -> Tensor:
        """Returns the norm of the gradients, each multiplied by the rms of its parameter."""
        return (self._dot_T(self.grad_CR, self.grad_CR) * self.rms_T.square()).sum().sqrt()

    def refresh_rms(self) -> None:
        """Computes the rms of the parameters as they are now."""
        rms_T = (self._dot_T(self.param_CR, self.param_CR) / self._numel_T).sqrt()
        self.rms_T = torch.where(self._is_scalar_T, self.rms_T, rms_T)

    def store_size_grads(self, slot: int, factor: Tensor) -> None:
        """Stores the gradient with respect to the log of each tensor's size, times the factor."""
        # Where the gradient was not finite, a factor of zero leaves NaN.
        self.size_grads_PT[slot] = (self._dot_T(self.param_CR, self.grad_CR) * factor).nan_to_num_(nan=0.0)

    def size_step(self, updates: int, lr: float, beta2: float, eps: float) -> Tensor:
        """Returns the growth of each tensor relative to itself, at size update number `updates` (from 1): (T,)."""
        beta2 **= len(self.size_grads_PT)
        self.size_exp_avg_sq_T.mul_(beta2).add_(self.size_grads_PT.square().mean(0), alpha=1 - beta2)
        step_T = self.size_grads_PT.sum(0) / (self.size_exp_avg_sq_T.sqrt() + eps)
        step_T *= -lr * math.sqrt(1 - beta2**updates)
        step_T.clamp_(-MAX_SIZE_STEP, MAX_SIZE_STEP)
        step_T = torch.minimum(step_T, (MAX_RMS - self.rms_T) / self.rms_T)
        return step_T.masked_fill_(self._is_scalar_T | (self.rms_T < MIN_RMS), 0.0)

    def add_step(
        self,
        scale_T: Tensor,
        growth_T: Tensor | None,
        factor: Tensor,
        finite: Tensor,
        betas: tuple[float, float],
        correction: float,
        eps: float,
    ) -> None:
        """Brings the moments up to date, and adds the step that follows from them to the parameters.

        Args:
            scale_T: factor on Adam's step, for each tensor.
            growth_T: growth of each tensor as a whole, relative to itself; None stands for no growth.
            factor, finite: what `ScaledAdam._clipping_factor` returns.
            betas, eps: as in `ScaledAdam`.
            correction: divisor that corrects the bias of the mean squared gradient.
        """
        rows = Rows(self.param_CR, self.grad_CR, self.delta_CR, self.exp_avg_sq_CR, self._tensor_of_row_C)
        add_step(rows, scale_T, growth_T, factor, finite, betas, correction, eps)

    def state(self) -> list[dict[str, Tensor]]:
        """Returns the state of each parameter, as views."""
        deltas, exp_avg_sqs = self._views(self.delta_CR), self._views(self.exp_avg_sq_CR)
        return [
            {
                "delta": deltas[i],
                "exp_avg_sq": exp_avg_sqs[i],
                "size_exp_avg_sq": self.size_exp_avg_sq_T[i],
                "size_grads": self.size_grads_PT[:, i],
                "rms": self.rms_T[i],
            }
            for i in range(len(self.params))
        ]

    def load_state(self, states: list[dict[str, Tensor]]) -> None:
        """Copies the state of each parameter.

        Raises:
            ValueError: if a shape differs.
        """
        for i, (own, loaded) in enumerate(zip(self.state(), states, strict=True)):
            for name, tensor in own.items():
                if tensor.shape != loaded[name].shape:
                    raise ValueError(
                        f"optimizer state of parameter {i}: {name} has shape {tuple(loaded[name].shape)}, "
                        f"not {tuple(tensor.shape)}: load the state of the same model and settings"
                    )
                tensor.copy_(loaded[name])


class ScaledAdam(torch.optim.Optimizer):
    """Adam with steps in proportion to the size of each tensor, which it learns explicitly as well.

    The step of a tensor is Adam's step times the rms of the tensor. Every `size_update_period` steps the tensor is
    also scaled as a whole, along the gradient with respect to the log of its size. Tensors of one element get Adam's
    step with a learning rate of `scalar_lr_scale * lr`, and stay within ±10.

    Gradients are clipped by their norm, in which each is weighted by the rms of its parameter. The threshold is
    `clipping_scale` times the median of the latest 100 norms; it is estimated every 100 steps, and at steps 10, 20
    and 40, then twice as high. A step whose norm is not finite leaves all parameters as they are. A gradient of None
    counts as zero.

    A step on a GPU does not wait for the device, and launches a number of kernels that hardly depends on the number
    of tensors.

    Args:
        params: parameters or parameter groups; a group may set lr_scale, a factor on the learning rate.
        lr: learning rate, relative to the size of the tensors.
        betas: decay of the momentum and of the squared gradients.
        clipping_scale: threshold of the gradient norm relative to its median; with None gradients are not clipped.
        scalar_lr_scale: factor on the learning rate of one-element tensors and of the tensors' sizes.
        size_update_period: number of steps between two updates of the tensors' sizes.
        eps: a small number that is added to the root of the mean squared gradient.
    """

    # PyTorch wraps its optimiser's methods against its compiler, which is imported for that, for one to three seconds.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.045,
        betas: tuple[float, float] = (0.9, 0.98),
        clipping_scale: float | None = 2.0,
        scalar_lr_scale: float = 0.1,
        size_update_period: int = 4,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "lr_scale": 1.0, "betas": betas, "eps": eps})
        self._clipping_scale = clipping_scale
        self._scalar_lr_scale = scalar_lr_scale
        self.size_update_period = size_update_period
        self._step = 0
        self._groups: list[_FlatGroup] = []  # They are made at the first step, when the parameters are on their device.
        self._clipping: dict[str, Tensor] = {}

    def _make_groups(self) -> None:
        self._groups = [
            _FlatGroup(group["params"], self.size_update_period, self._scalar_lr_scale) for group in self.param_groups
        ]
        device = self._groups[0].device
        self._clipping = {
            "norms": torch.zeros(NORM_HISTORY_STEPS, device=device),
            "factors": torch.ones(NORM_HISTORY_STEPS, device=device),
            "threshold": torch.tensor(math.inf, device=device),
            "nonfinite_steps": torch.tensor(0, device=device),
        }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates the parameters from their gradients; closures are not supported."""
        if not self._groups:
            self._make_groups()
        for flat in self._groups:
            flat.gather()
        factor, finite = self._clipping_factor()
        for group, flat in zip(self.param_groups, self._groups, strict=True):
            lr, (_, beta2), eps = group["lr"] * group["lr_scale"], group["betas"], group["eps"]
            growth_T = self._growth(flat, factor, lr, beta2, eps)
            scale_T = flat.rms_T.clamp(min=MIN_RMS) * -lr
            flat.add_step(scale_T, growth_T, factor, finite, group["betas"], 1 - beta2 ** (self._step + 1), eps)
            flat.scatter()
        self._step += 1

    def _clipping_factor(self) -> tuple[Tensor, Tensor]:
        """Returns the factor on all gradients, 0 if their norm is not finite, and whether it is finite (0 or 1)."""
        norm = torch.stack([flat.scaled_grad_norm().float() for flat in self._groups]).norm()
        finite = norm.isfinite()
        history, step = self._clipping, self._step
        if step > 0:  # The norm of untrained weights says nothing about later norms.
            history["norms"][step % NORM_HISTORY_STEPS] = torch.where(finite, norm, math.inf)
        early = step in EARLY_THRESHOLD_STEPS
        if self._clipping_scale is not None and (early or (step > 0 and step % NORM_HISTORY_STEPS == 0)):
            recent = history["norms"][1 : step + 1] if early else history["norms"]
            median = recent.sort().values[2 * (len(recent) // 4)]
            history["threshold"] = median * self._clipping_scale * (2.0 if early else 1.0)
        factor = torch.where(finite, (history["threshold"] / (norm + 1e-20)).clamp(max=1.0), 0.0)
        history["factors"][step % NORM_HISTORY_STEPS] = factor
        history["nonfinite_steps"] += ~finite
        history["norm"] = norm
        return factor, finite.float()

    def _growth(self, flat: _FlatGroup, factor: Tensor, lr: float, beta2: float, eps: float) -> Tensor | None:
        """Returns the growth of each tensor as a whole; None between the updates of the sizes."""
        step, period = self._step + 1, self.size_update_period
        flat.store_size_grads(self._step % period, factor)
        if step % period:
            return None
        flat.refresh_rms()
        return flat.size_step(step // period, self._scalar_lr_scale * lr, beta2, eps)

    def statistics(self) -> dict[str, float]:
        """Computes figures of the latest steps, for logging. This method alone waits for the device.

        Returns:
            An empty dictionary before the first step, afterwards these entries:
            grad_norm: norm of the latest gradient before clipping, weighted by the rms of the parameters;
            clipping_threshold: present limit of the norm (inf if there is none);
            clipped_fraction: share of the latest 100 steps that were clipped;
            nonfinite_steps: number of steps that were left out because the norm was not finite.
        """
        if self._step == 0:
            return {}
        history = self._clipping
        clipped = ((history["factors"] > 0) & (history["factors"] < 1)).sum()
        values = torch.stack([history["norm"], history["threshold"], clipped, history["nonfinite_steps"]]).tolist()
        return {
            "grad_norm": values[0],
            "clipping_threshold": values[1],
            "clipped_fraction": values[2] / min(self._step, NORM_HISTORY_STEPS),
            "nonfinite_steps": values[3],
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that a resumed run needs; further steps change its tensors, as in other optimisers."""
        packed: dict[str, Any] = inspect.unwrap(torch.optim.Optimizer.state_dict)(self)
        packed["state"] = dict(enumerate(state for flat in self._groups for state in flat.state()))
        packed["clipping"] = dict(self._clipping)
        packed["step"] = self._step
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a copy of `state_dict`; the parameters must be on their final device.

        Raises:
            ValueError: if the state belongs to other parameters than these.
        """
        groups = {"state": {}, "param_groups": state_dict["param_groups"]}
        inspect.unwrap(torch.optim.Optimizer.load_state_dict)(self, groups)
        self._step = state_dict["step"]
        self._groups = []
        if self._step == 0:
            return
        self._make_groups()
        first = 0
        for flat in self._groups:
            indices = range(first, first + len(flat.params))
            flat.load_state([state_dict["state"][i] for i in indices])
            first = indices.stop
        device = self._groups[0].device
        self._clipping = {name: t.to(device, copy=True) for name, t in state_dict["clipping"].items()}
