"""ScaledAdam and the Eden learning-rate schedule (Yao et al., ICLR 2024, arXiv 2310.11230, section 3.5).

Shapes: T tensors of a parameter group, laid out in C rows of R elements; P steps between two size updates.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ssm_asr.ops.scaled_adam import Rows, add_step, row_dots

ROW_ELEMENTS = 1024
NORM_HISTORY_STEPS = 100  # the clipping threshold follows the median norm of this many steps
EARLY_THRESHOLD_STEPS = (10, 20, 40)  # the threshold is estimated more often while training starts
MIN_RMS = 1e-5
MAX_RMS = 3.0
MAX_SIZE_STEP = 0.1
MAX_SCALAR = 10.0


class _FlatGroup:
    """The tensors of one parameter group laid end to end, each starting a new row of ROW_ELEMENTS elements.

    A kernel over the rows serves all tensors at once, where a loop would launch one for each, and a quantity
    of a tensor (its rms, say) is one number for each of its rows. Unused ends of rows stay zero throughout.
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
        self.delta_CR = torch.zeros_like(self.param_CR)  # the momentum: what the next step adds
        self.exp_avg_sq_CR = torch.zeros_like(self.param_CR)
        self.size_grads_PT = self.param_CR.new_zeros(period, len(params))
        self.size_exp_avg_sq_T = self.param_CR.new_zeros(len(params))
        self._param_views = self._views(self.param_CR)
        self._grad_views = self._views(self.grad_CR)

        # A one-element tensor has a fixed "rms": it scales the learning rate and the norm, as an rms would.
        self.rms_T = self.param_CR.new_full((len(params),), scalar_lr_scale)
        torch._foreach_copy_(self._param_views, self.params)
        self.refresh_rms()

    def _views(self, flat_CR: Tensor) -> list[Tensor]:
        """Each tensor's part of flat_CR, with the tensor's own strides, so that foreach stays fast."""
        flat = flat_CR.view(-1)
        return [
            flat[row * ROW_ELEMENTS :][: p.numel()].as_strided(p.size(), p.stride())
            for row, p in zip(self._first_rows, self.params, strict=True)
        ]

    def _dot_T(self, x_CR: Tensor, y_CR: Tensor) -> Tensor:
        """The dot products of the tensors of one with those of the other."""
        dots_C = row_dots(x_CR, y_CR)
        # unsafe skips a check of the lengths that would wait for the device
        return torch.segment_reduce(dots_C, "sum", lengths=self._rows_T, unsafe=True)

    def _rows(self, x_T: Tensor) -> Tensor:
        """One number a tensor -> (C, 1), to be broadcast over the rows."""
        return x_T[self._tensor_of_row_C, None]

    def gather(self) -> None:
        """Read parameters and gradients; a gradient of None counts as zero."""
        torch._foreach_copy_(self._param_views, self.params)
        have_grad = [p.grad is not None for p in self.params]
        if not all(have_grad):
            self.grad_CR.zero_()
        if any(have_grad):
            views = [v for v, have in zip(self._grad_views, have_grad, strict=True) if have]
            torch._foreach_copy_(views, [p.grad for p in self.params if p.grad is not None])

    def scatter(self) -> None:
        """Write the parameters back."""
        torch._foreach_copy_(self.params, self._param_views)
        if self.scalars:
            torch._foreach_clamp_min_(self.scalars, -MAX_SCALAR)
            torch._foreach_clamp_max_(self.scalars, MAX_SCALAR)

    def scaled_grad_norm(self) -> Tensor:
        """Norm of the gradients, each multiplied by its parameter's rms."""
        return (self._dot_T(self.grad_CR, self.grad_CR) * self.rms_T.square()).sum().sqrt()

    def refresh_rms(self) -> None:
        rms_T = (self._dot_T(self.param_CR, self.param_CR) / self._numel_T).sqrt()
        self.rms_T = torch.where(self._is_scalar_T, self.rms_T, rms_T)

    def store_size_grads(self, slot: int, factor: Tensor) -> None:
        """Store the gradient, times the factor, with respect to the log of each tensor's size."""
        # a factor of zero leaves NaN where the gradient was not finite
        self.size_grads_PT[slot] = (self._dot_T(self.param_CR, self.grad_CR) * factor).nan_to_num_(nan=0.0)

    def size_step(self, updates: int, lr: float, beta2: float, eps: float) -> Tensor:
        """How much each tensor grows, relative to itself, at size update number `updates` (from 1): (T,)."""
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
        """Bring the moments up to date, and add the step that follows from them to the parameters.

        Args:
            scale_T: of Adam's step, for each tensor.
            growth_T: how much each tensor grows as a whole, relative to itself.
            factor, finite: of `ScaledAdam._clipping_factor`.
            correction: of the mean squared gradient's bias.
        """
        rows = Rows(self.param_CR, self.grad_CR, self.delta_CR, self.exp_avg_sq_CR, self._tensor_of_row_C)
        add_step(rows, scale_T, growth_T, factor, finite, betas, correction, eps)

    def state(self) -> list[dict[str, Tensor]]:
        """The state of each parameter: views, not copies."""
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
        for i, (mine, loaded) in enumerate(zip(self.state(), states, strict=True)):
            for name, tensor in mine.items():
                if tensor.shape != loaded[name].shape:
                    raise ValueError(
                        f"optimizer state of parameter {i}: {name} has shape {tuple(loaded[name].shape)}, "
                        f"not {tuple(tensor.shape)}: load the state of the same model and settings"
                    )
                tensor.copy_(loaded[name])


class ScaledAdam(torch.optim.Optimizer):
    """Adam whose steps are proportional to each tensor's size, and which learns that size explicitly.

    The step of a tensor is Adam's times the tensor's rms; every `size_update_period` steps the tensor is also
    scaled as a whole, along the gradient with respect to the log of its size. Tensors of one element get
    Adam's step with a learning rate of `scalar_lr_scale * lr` and stay within ±10.

    Gradients are clipped by their norm, each weighted by its parameter's rms, at `clipping_scale` times the
    median of the latest 100 norms (re-estimated every 100 steps, and at steps 10, 20 and 40 with twice
    that). A step whose norm is not finite leaves all parameters as they are. A parameter whose gradient is
    None counts as having a zero gradient.

    A step on a GPU never waits for the device and launches a number of kernels that hardly depends on the
    number of tensors.

    Args:
        params: parameters or parameter groups; a group may set lr_scale, a factor on the learning rate.
        lr: learning rate, relative to the size of the tensors.
        betas: decay of the momentum and of the squared gradients.
        clipping_scale: threshold of the gradient norm relative to its median; None does not clip.
        scalar_lr_scale: factor on the learning rate of one-element tensors and of the tensors' sizes.
        size_update_period: steps between two updates of the tensors' sizes.
        eps: added to the root of the mean squared gradient.
    """

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
        self._size_update_period = size_update_period
        self._step = 0
        self._groups: list[_FlatGroup] = []  # made at the first step, when the parameters are in their place
        self._clipping: dict[str, Tensor] = {}

    def _make_groups(self) -> None:
        self._groups = [
            _FlatGroup(group["params"], self._size_update_period, self._scalar_lr_scale) for group in self.param_groups
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
        """Update the parameters from their gradients. Closures are not supported."""
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
        """The factor on all gradients, 0 if their norm is not finite, and whether it is finite (0 or 1)."""
        norm = torch.stack([flat.scaled_grad_norm().float() for flat in self._groups]).norm()
        finite = norm.isfinite()
        history, step = self._clipping, self._step
        if step > 0:  # the very first norm, of untrained weights, says nothing of the later ones
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
        """How much each tensor grows as a whole; None where that is not yet to be changed again."""
        step, period = self._step + 1, self._size_update_period
        flat.store_size_grads(self._step % period, factor)
        if step % period:
            return None
        flat.refresh_rms()
        return flat.size_step(step // period, self._scalar_lr_scale * lr, beta2, eps)

    def statistics(self) -> dict[str, float]:
        """Figures of the latest steps, for logging: the only place that waits for the device.

        Returns:
            grad_norm: norm of the latest gradient, weighted by the parameters' rms, before clipping;
            clipping_threshold: its present limit (inf if there is none);
            clipped_fraction: share of the latest 100 steps that were clipped;
            nonfinite_steps: number of steps skipped so far.
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
        """Everything that a resumed run needs; the tensors are the live ones, as in other optimizers."""
        packed = super().state_dict()
        packed["state"] = dict(enumerate(state for flat in self._groups for state in flat.state()))
        packed["clipping"] = dict(self._clipping)
        packed["step"] = self._step
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`; the parameters must be on their final device.

        Raises:
            ValueError: if the state is of other parameters than these.
        """
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
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


class Eden:
    """Learning-rate schedule that decays with both the batch and the epoch count, after a linear warm-up.

        lr = base · ((b² + B²) / B²)^-¼ · ((e² + E²) / E²)^-¼ · w

    for b batches, e epochs (from 0), B = lr_batches, E = lr_epochs; w rises from warmup_start to 1 over
    warmup_batches. It keeps no state of its own: the base rate, the one that each parameter group has when
    it is first scheduled, is stored in the group as initial_lr, and so in the optimizer's state.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        lr_batches: float,
        lr_epochs: float,
        warmup_batches: int = 500,
        warmup_start: float = 0.1,
    ) -> None:
        self._optimizer = optimizer
        self._lr_batches = lr_batches
        self._lr_epochs = lr_epochs
        self._warmup_batches = warmup_batches
        self._warmup_start = warmup_start
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def factor(self, batch: int, epoch: float) -> float:
        """The learning rate relative to the base rate, after `batch` batches and `epoch` epochs."""
        warmup = 1.0
        if batch < self._warmup_batches:
            warmup = self._warmup_start + (1 - self._warmup_start) * batch / self._warmup_batches
        decay = (1 + (batch / self._lr_batches) ** 2) * (1 + (epoch / self._lr_epochs) ** 2)
        return decay**-0.25 * warmup

    def step(self, batch: int, epoch: float) -> float:
        """Set the learning rate for the batch that follows `batch` batches and `epoch` epochs; return it."""
        factor = self.factor(batch, epoch)
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        return float(self._optimizer.param_groups[0]["lr"])
