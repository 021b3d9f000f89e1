"""SGD that trains pre-parameters and writes the weights in the same pass."""

import warnings
from collections.abc import Callable, Iterable
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ca3d_kernels import backends, cuda
from ca3d_kernels.preparam_step import op
from ca3d_kernels.preparam_step.checks import check_options, check_param, scalar
from ca3d_kernels.preparam_step.mapping import LinearMapping, PreParamMapping
from ca3d_kernels.preparam_step.philox import Draws
from ca3d_kernels.preparam_step.plan import (
    GRAD_SCALE,
    TENSOR_NUMBERS,
    Part,
    Plan,
    Seen,
    options,
    seen,
)
from ca3d_kernels.preparam_step.reference import Hyperparameters, Stepped


class PreParamSGD(Optimizer):
    """SGD on pre-parameters (section "pre-parameters" of arXiv 2505.19928).

    Each weight w has a pre-parameter theta (equation 1: w = w(theta)), which is stepped with the
    mapped gradient G (equation 2) and a momentum m of its own:

        d = G + weight_decay theta;  m = momentum m + (1 - dampening) d  (m = d in the first step);
        theta = theta - lr (d + momentum m with Nesterov momentum, else m);  w = w(theta).

    theta and m are stored in the dtype of w, so that float16 training keeps nothing wider. All
    tensors are stepped together by compiled kernels that write theta, m and w in one pass (linear
    maps; other maps and rounding="published" run in torch operations). theta is
    derived from w at the first step. If w is changed outside afterwards (load_state_dict,
    averaging, `.to()`), theta is derived again, with a warning. Inside `torch.compile` a step runs
    eagerly. Tensor results are the same, bit for bit, for any number of threads.

    Args:
        params: parameters, or dicts of groups which may set every option but `skip_nonfinite` and
            `backend`; float16, bfloat16, float32 or float64.
        lr: learning rate, >= 0. It acts on theta; with a linear map the steps of w are those of SGD
            on w with the same lr. It, `momentum` and `weight_decay` may be tensors with one
            element. Kernels on a GPU read one on a GPU when they run (its value is not checked),
            so that the replay of a CUDA graph takes what it holds then.
        momentum: >= 0; the number 0 stores no momentum.
        dampening: of the momentum.
        weight_decay: >= 0.
        nesterov: Nesterov momentum; needs momentum > 0 and dampening 0.
        mapping: the map; None is `LinearMapping(128.0)`.
        rounding: all but "published" compute in float32 (float64 for float64) and round each stored
            value once; what a float16 or bfloat16 theta would lose thereby,

            - "nearest" loses: updates below half an ulp of theta vanish;
            - "stochastic" keeps in the mean: theta and m are rounded up or down at random, with
              probabilities that make up for it. The numbers depend on the seed, the step, the
              parameter's place in the optimizer and the element's place in memory only;
            - "compensated" keeps in another tensor of theta's dtype, 2 bytes a parameter
              (Kahan's summation). m is rounded to nearest.

            With a float32 or float64 theta the three are the same. "published" rounds every
            operation to the dtype of theta, as the code published with the paper does.
        seed: of stochastic rounding, at least 0 and below 2^63. It is part of the state_dict, as is
            the number of steps, so that a resumed run goes on with the same numbers.
        skip_nonfinite: skip the step, and write nothing, if a gradient is not finite or a value
            that would be stored is not. Skipped steps are counted in `skipped_steps`.
        pre_param_dtype: dtype of theta and momentum; None is that of w. It may be wider than w's:
            float32 with float16 weights are the classic master weights.
        backend: "cuda", "triton", "cpu", "reference" or None for the fastest; see
            `ca3d_kernels.use_backend`.

    Raises:
        TypeError: an argument or parameter is of a wrong type or dtype.
        ValueError: an argument is out of range.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = PreParamSGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> model(torch.ones(3, 4)).square().sum().backward()
        >>> optimizer.step()
        >>> theta = optimizer.state[model.weight]["pre_parameter"]
        >>> bool((theta / 128 == model.weight).all())
        True

        Updates that are too small for float16, one by one:

        >>> for rounding in ("nearest", "compensated"):
        ...     w = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
        ...     optimizer = PreParamSGD([w], lr=2.0**-13, rounding=rounding)
        ...     for _ in range(16):
        ...         w.grad = torch.ones_like(w)
        ...         optimizer.step()
        ...     print(rounding, (1 - w[0]).item())
        nearest 0.0
        compensated 0.001953125
    """

    # torch.amp.GradScaler then leaves unscaling and skipping to `step`.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float | Tensor = 0.0,
        dampening: float = 0.0,
        weight_decay: float | Tensor = 0.0,
        nesterov: bool = False,
        *,
        mapping: PreParamMapping | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        skip_nonfinite: bool = False,
        pre_param_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an integer, got {seed!r}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be at least 0 and below 2**63, got {seed}")
        if not isinstance(skip_nonfinite, bool):
            raise TypeError(f"skip_nonfinite must be True or False, got {skip_nonfinite!r}")
        backends.requested(backend)
        self.skip_nonfinite = skip_nonfinite
        self.backend = backend
        self.seed = seed
        # Calls of `step`. Skipped ones count: whether a GPU skips one, the CPU doesn't know.
        self._steps = 0
        self._skipped = 0
        # Steps that kernels have skipped since the last look: the CPU doesn't know yet. Always the
        # same tensor, so that replays of a CUDA graph count, too.
        self._skipped_on_device: Tensor | None = None
        # What replays of CUDA graphs still read.
        self._captured: list[Tensor] = []
        # Whether a step was ever captured in a CUDA graph.
        self._has_graph = False
        self._plans: dict[int, Plan] = {}
        self._states: list[Any] = []
        self._seen: dict[Tensor, Seen] = {}
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "mapping": LinearMapping() if mapping is None else mapping,
            "rounding": rounding,
            "pre_param_dtype": pre_param_dtype,
        }
        check_options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, as `torch.optim.Optimizer.add_param_group`.

        Args:
            param_group: "params" and any options of the group.

        Raises:
            TypeError: an option or parameter is of a wrong type or dtype.
            ValueError: an option is out of range.

        Example:
            >>> optimizer = PreParamSGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
            >>> optimizer.add_param_group({"params": torch.nn.Parameter(torch.ones(2)), "lr": 1.0})
            >>> [group["lr"] for group in optimizer.param_groups]
            [0.1, 1.0]
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_options(group)
            for i, param in enumerate(group["params"]):
                check_param(i, param, group["pre_param_dtype"])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped because of a value that isn't finite.

        With kernels on a GPU, asking for it waits for them.
        """
        if self._skipped_on_device is not None:
            self._skipped += int(self._skipped_on_device)
            self._skipped_on_device.zero_()
        return self._skipped

    # Not torch.compiler.disable, which imports the whole compiler when this module is imported.
    @torch._disable_dynamo
    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        found_inf: Tensor | None = None,
        grad_scale: Tensor | None = None,
    ) -> Any:
        """Steps every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.
            found_inf: a tensor with one element; if it isn't 0 the step is skipped and counted. The
                optimizer then makes no check of its own.
            grad_scale: a tensor with one element that gradients are divided by; kernels on a GPU
                read it when they run.

        Returns:
            The closure's result, or None.

        Raises:
            RuntimeError: a gradient is sparse, or stochastic rounding is captured in a CUDA graph.
            TypeError: `found_inf` or `grad_scale` is not a tensor.
            ValueError: an option of a group has become invalid, `found_inf` or `grad_scale` has
                more than one element, a weight's pre-parameter isn't finite (which the
                published rounding allows), or the demanded backend can't run here.

        Example:
            >>> w = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = PreParamSGD([w], lr=0.5, skip_nonfinite=True)
            >>> w.grad = torch.tensor([1.0, torch.inf])
            >>> optimizer.step()
            >>> w.tolist(), optimizer.skipped_steps
            ([1.0, 1.0], 1)
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = scalar(getattr(self, "found_inf", None) if found_inf is None else found_inf)
        grad_scale = scalar(getattr(self, "grad_scale", None) if grad_scale is None else grad_scale)
        plans = self._prepare(grad_scale)
        self._steps += 1
        try:
            if self._step(plans, found_inf):
                self._skipped += 1
        finally:
            for plan in plans:
                plan.release()
        return loss

    def _step(self, plans: list[Plan], found_inf: Tensor | None) -> bool:
        """Steps everything; returns whether that was not done because of a flag or an overflow."""
        parts = [part for plan in plans for part in plan.parts]
        singles = [single for plan in plans for single in plan.singles]
        devices = {part.batch.params[0].device for part in parts}
        if len(devices) == 1 and all(plan.is_asynchronous() for plan in plans):
            self._step_on_device(parts, found_inf)
            return False
        results: list[Stepped] | None = None
        if found_inf is not None:
            if bool(found_inf):
                return True
        elif self.skip_nonfinite:
            results = [single.stepped() for single in singles]
            if any(bool(op.overflows(part.batch)) for part in parts) or any(
                not bool(single.grad.isfinite().all()) or not result.is_finite()
                for single, result in zip(singles, results, strict=True)
            ):
                return True
        for part in parts:
            op.step(part.batch)
            part.written()
        for i, single in enumerate(singles):
            single.write(single.stepped() if results is None else results[i])
            self._seen[single.param] = seen(single.param)
        return False

    def _step_on_device(self, parts: list[Part], found_inf: Tensor | None) -> None:
        """Steps everything unless a flag on the device says otherwise; the CPU doesn't wait."""
        self._has_graph |= cuda.is_capturing(parts[0].batch.params[0].device)
        if self._has_graph:
            for part in parts:
                part.may_be_replayed()
        if found_inf is None and self.skip_nonfinite:
            flags = [op.overflows(part.batch) for part in parts]
            found_inf = flags[0] if len(flags) == 1 else torch.stack(flags).amax()
        elif found_inf is not None:
            found_inf = found_inf.to(parts[0].batch.params[0].device, torch.float32)
        for part in parts:
            op.step(part.batch, found_inf)
            part.written()
        if found_inf is not None:
            counter = self._skipped_on_device
            if counter is None or counter.device != found_inf.device:
                self._skipped = self.skipped_steps
                counter = torch.zeros((), dtype=torch.int64, device=found_inf.device)
                self._skipped_on_device = counter
            counter += found_inf.reshape(()) != 0

    def _prepare(self, grad_scale: Tensor | None) -> list[Plan]:
        """Plans of all groups, with the gradients and numbers of this step."""
        backend = backends.requested(self.backend)
        plans = []
        rederived = 0
        draws = Draws(self.seed, self._steps, 0)
        same_states = len(self._states) == len(self.state) and all(
            map(is_, self.state.values(), self._states)
        )
        for i, group in enumerate(self.param_groups):
            check_options(group)
            tensors = {x: group[x] for x in TENSOR_NUMBERS if isinstance(group[x], Tensor)}
            known = {**group, **dict.fromkeys(tensors, 0.0)}
            hyper = Hyperparameters(
                float(known["lr"]),
                float(known["momentum"]),
                float(known["dampening"]),
                float(known["weight_decay"]),
                group["nesterov"],
            )
            if grad_scale is not None:
                tensors[GRAD_SCALE] = grad_scale
            plan = self._plans.get(i)
            if plan is None or not (same_states and plan.accepts(group, backend)):
                if plan is not None:
                    self._take_over(plan, options(group, backend))
                plan = Plan.make(group, backend, self.state, self._seen, hyper, draws)
                rederived += plan.rederived
                self._plans[i] = plan
            plan.prepare(hyper, tensors, draws)
            plans.append(plan)
            draws = draws._replace(tensor=draws.tensor + len(group["params"]))
        self._states = list(self.state.values())
        if rederived:
            warnings.warn(
                f"{rederived} parameters were changed outside PreParamSGD: their pre-parameters "
                "are derived from the weights again (momentum is kept)",
                RuntimeWarning,
                stacklevel=4,
            )
        return plans

    def _take_over(self, old: Plan, new_options: tuple[Any, ...]) -> None:
        """Remembers when theta was last in step with the weights of a plan that is given up."""
        for part in old.parts:
            self._seen.update(part.seen())
            self._captured += part.uploads.captured
        if new_options != old.options:
            # Another map, say: theta is to be compared with the weights.
            for param in old.params:
                self._seen.pop(param, None)

    def state_dict(self) -> dict[str, Any]:
        """State as `torch.optim.Optimizer.state_dict`, for `torch.save` and `torch.load`.

        Returns:
            "state" (by index of the parameter: "pre_parameter", "momentum_buffer" and, where
            rounding is compensated, "compensation"), "param_groups" (each map by its repr),
            "skipped_steps", "seed" and "steps" (how often `step` was called).

        Example:
            >>> optimizer = PreParamSGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
            >>> optimizer.state_dict()["param_groups"][0]["mapping"]
            'LinearMapping(scale=128.0, loss_factor=1.0)'
        """
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            group["mapping"] = repr(group["mapping"])
        state_dict.update(skipped_steps=self.skipped_steps, seed=self.seed, steps=self._steps)
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned. Each state tensor keeps its dtype.

        Args:
            state_dict: copied, not kept.

        Raises:
            ValueError: it is of another optimizer, another map, or other parameters. Nothing has
                been loaded then.

        Example:
            >>> optimizer = PreParamSGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
            >>> optimizer.load_state_dict(optimizer.state_dict())
        """
        loaded: dict[str, Any] = {}
        mappings = [group["mapping"] for group in self.param_groups]

        def check(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            # The last of the pre-hooks: it sees what the user's hooks made of the argument.
            loaded.update(self._checked(state_dict))
            return loaded

        def restore(optimizer: Optimizer) -> None:
            # torch has copied the maps and cast the state to the dtypes of the parameters: take
            # this optimizer's own maps, and the state as it was saved.
            for group, mapping in zip(self.param_groups, mappings, strict=True):
                group["mapping"] = mapping
            saved = [i for group in loaded["param_groups"] for i in group["params"]]
            params = [param for group in self.param_groups for param in group["params"]]
            for i, param in zip(saved, params, strict=True):
                for name, value in loaded["state"].get(i, {}).items():
                    if isinstance(value, Tensor):
                        self.state[param][name] = value.to(device=param.device, copy=True)

        handles = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()
        self.seed = int(loaded.get("seed", self.seed))
        self._steps = int(loaded.get("steps", 0))
        self._skipped = int(loaded.get("skipped_steps", 0))
        if self._skipped_on_device is not None:
            self._skipped_on_device.zero_()

    def _checked(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state_dict with this optimizer's maps, after checking that it fits."""
        groups = []
        for i, (group, saved) in enumerate(
            zip(self.param_groups, state_dict["param_groups"], strict=False)
        ):
            if "mapping" not in saved:
                raise ValueError(f"state_dict is not one of PreParamSGD: group {i} has no mapping")
            if saved["mapping"] != repr(group["mapping"]):
                raise ValueError(
                    f"state_dict holds pre-parameters of {saved['mapping']} in group {i}, "
                    f"this optimizer has {group['mapping']!r}"
                )
            if saved["pre_param_dtype"] != group["pre_param_dtype"]:
                raise ValueError(
                    f"state_dict holds pre-parameters of dtype {saved['pre_param_dtype']} in group "
                    f"{i}, this optimizer has {group['pre_param_dtype']}"
                )
            groups.append({**saved, "mapping": group["mapping"]})
            for key, param in zip(saved["params"], group["params"], strict=False):
                for name, value in state_dict["state"].get(key, {}).items():
                    if isinstance(value, Tensor) and value.shape != param.shape:
                        raise ValueError(
                            f"{name} of parameter {key} has shape {tuple(value.shape)}, "
                            f"expected {tuple(param.shape)}"
                        )
        groups.extend(state_dict["param_groups"][len(groups) :])
        return {**state_dict, "param_groups": groups}

    def __getstate__(self) -> dict[str, Any]:
        own = {
            "skip_nonfinite": self.skip_nonfinite,
            "backend": self.backend,
            "seed": self.seed,
            "_steps": self._steps,
            "_skipped": self.skipped_steps,
        }
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._skipped_on_device = None
        self._captured = []
        self._has_graph = False
        self._plans = {}
        self._states = []
        self._seen = {}
