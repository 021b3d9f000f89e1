"""Mistakes in the Triton kernels that the parity checks must notice.

Not collected by itself: `test_triton_mutants.py` runs it in a process of its own, with Triton's
interpreter. Each mistake is made in a copy of the kernels' file, which then takes their place.
"""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import attention_cases
import block_cases
import pytest
import qkv_cases
import torch
from attention_cases import Problem
from qkv_cases import Case
from step_cases import assert_same_bits, parameters, set_gradients
from triton.runtime.errors import InterpreterError

from ca3d_kernels import PreParamSGD, use_backend
from ca3d_kernels.local_attention import triton as attention
from ca3d_kernels.preparam_step import triton as step
from ca3d_kernels.qkv_attention import triton as qkv
from ca3d_kernels.temporal_block import triton as block

HALF = torch.float16
# Where a launcher finds its kernels.
ATTENTION = (attention, "triton_kernels")
ROLLING = (attention, "triton_rolling_kernels")
QKV = (qkv, "triton_kernels")
TABLE = (qkv, "triton_table_kernels")
STEP = (step, "triton_kernels")
BLOCK = (block, "triton_kernels")

PLAIN = Problem(frames=7, heads=3, lead=(5,), dtype=HALF)
ONE_HEAD = Problem(frames=7, heads=1, lead=(5,), dtype=HALF)
DILATED = Problem(frames=11, dilation=3, kernel_size=3, edge="shift", heads=1, dtype=HALF)
HALVES = Problem(frames=40, heads=1, lead=(1,), dtype=HALF)
LONG = Problem(frames=70, heads=1, lead=(1,), dtype=HALF)
LONG_DILATED = Problem(frames=70, dilation=3, heads=1, lead=(1,), dtype=HALF)
ZERO = Problem(edge="zero", heads=1, dtype=HALF)
PUBLISHED = Problem(edge="zero", table="published", dtype=HALF)
# A key's bias cancels in the softmax, unless zeros take part in it.
FUSED = Case(frames=7, head_dim=16, positions=3, edge="zero")
FUSED_LONG = Case(frames=20, head_dim=16, heads=1, positions=2)
FUSED_TABLE = Case(frames=7, head_dim=16, heads=4, edge="zero", table="published")
# Several positions in a tile.
TEMPORAL = block_cases.Case(frames=5, head_dim=16, heads=1, positions=3, batch=1)


class Step(NamedTuple):
    """A step of two tensors, and whether a flag forbids it."""

    rounding: str = "nearest"
    forbidden: bool = False


class Mutant(NamedTuple):
    """The right text, which occurs once, the mistake, and what notices it."""

    file: tuple[ModuleType, str]
    right: str
    wrong: str
    problem: Problem | Case | Step | block_cases.Case


MUTANTS = {
    "window one slot too long": Mutant(
        ATTENTION,
        "return (meets & (slot >= 0) & (slot < kernel_size))",
        "return (meets & (slot >= 0) & (slot <= kernel_size))",
        PLAIN,
    ),
    "window one slot too short": Mutant(
        ATTENTION,
        "return (meets & (slot >= 0) & (slot < kernel_size))",
        "return (meets & (slot > 0) & (slot < kernel_size))",
        PLAIN,
    ),
    "no mask between positions": Mutant(
        ATTENTION,
        "meets = queries & keys & (position == key_position)",
        "meets = queries & keys",
        ONE_HEAD,
    ),
    "no mask between heads": Mutant(
        ATTENTION, "meets &= (head == key_head) & (t %", "meets &= (t %", PLAIN
    ),
    "no mask at the end of the clip": Mutant(
        ATTENTION, "exists = (frame >= 0) & (frame < frames)", "exists = frame >= 0", PLAIN
    ),
    "no mask behind the last sequence": Mutant(
        ATTENTION, "exists &= sequence < sequences", "exists &= sequence <= sequences", PLAIN
    ),
    "no mask between dilation classes": Mutant(
        ATTENTION, " & (t % dilation == s % dilation)", "", DILATED
    ),
    "dilation classes of equal length": Mutant(
        ATTENTION,
        "length = (frames - t % dilation + dilation - 1) // dilation",
        "length = frames // dilation",
        DILATED,
    ),
    "shifted at the first edge only": Mutant(
        ATTENTION,
        "start = tl.minimum(tl.maximum(start, 0), tl.maximum(length - kernel_size, 0))",
        "start = tl.maximum(start, 0)",
        DILATED,
    ),
    "no zeros outside of the clip": Mutant(
        ATTENTION, "absent = zeros * (kernel", "absent = 0.0 * (kernel", ZERO
    ),
    "zeros left out of the gradient's sum": Mutant(
        ATTENTION, "total = tl.sum(weights, -1) + absent", "total = tl.sum(weights, -1)", ZERO
    ),
    "weights in half precision": Mutant(
        ATTENTION, "tl.static_range(PARTS - 1)", "tl.static_range(0)", PLAIN
    ),
    "key table one slot late": Mutant(
        ATTENTION, "slot = s - t + before\n", "slot = s - t + before - 1\n", PUBLISHED
    ),
    "key table read for the other head": Mutant(
        ATTENTION, "(head * heads + key_head)", "(key_head * heads + head)", PUBLISHED
    ),
    "the second half of the keys forgotten": Mutant(
        ATTENTION, "lower += weighted_sum(right, x,", "upper += weighted_sum(right, x,", HALVES
    ),
    "rolling: the first queries forgotten": Mutant(
        ROLLING,
        "begin = stretch * stretch_tiles - (stretch == 0).to(tl.int32)",
        "begin = stretch * stretch_tiles",
        LONG,
    ),
    "rolling: windows of the tile's frames, not of its queries": Mutant(
        ROLLING, "_rows(row, first + back, clip", "_rows(row, first, clip", LONG
    ),
    "rolling: the new tile before the old one": Mutant(
        ROLLING, "first + column % 2 * FRAMES", "first + (1 - column % 2) * FRAMES", LONG
    ),
    "rolling: what a tile's first queries gave to its keys forgotten": Mutant(
        ROLLING, "old_dv += weighted_sum", "old_dv = weighted_sum", LONG
    ),
    "rolling: the sums of the new tile are the old one's": Mutant(
        ROLLING, "weighted_sum(tl.trans(new_ds), b_q", "weighted_sum(tl.trans(old_ds), b_q", LONG
    ),
    "rolling: dilation classes of equal length": Mutant(
        ROLLING, "(frames - start + dilation - 1) // dilation", "frames // dilation", LONG_DILATED
    ),
    "fused: bias of the queries for the keys": Mutant(
        QKV, "b_k = tl.load(at + HEAD_DIM).to", "b_k = tl.load(at).to", FUSED
    ),
    "fused: one bias for all frames": Mutant(
        QKV,
        "head * bias_head + frame * bias_frame",
        "head * bias_head + 0 * frame",
        Case(frames=7, head_dim=16, positions=3, bias="frame"),
    ),
    "fused: gradients of the halo counted twice": Mutant(
        QKV, "tl.where(kept, gradient, 0.0)", "gradient", FUSED_LONG
    ),
    "fused: halves of the weight's gradient": Mutant(
        QKV, "out = half * (HEAD_DIM // 2)", "out = (1 - half) * (HEAD_DIM // 2)", FUSED
    ),
    "fused, key table: window one slot too long": Mutant(
        TABLE, "(slot < kernel_size)", "(slot <= kernel_size)", FUSED_TABLE
    ),
    "fused, key table: heads not moved": Mutant(TABLE, ".permute(1, 0, 2, 3)", "", FUSED_TABLE),
    "fused, key table: no mask behind the last position": Mutant(
        TABLE,
        "kept = (head < heads) & (position < positions)",
        "kept = (head < heads)",
        FUSED_TABLE,
    ),
    "step: the last elements forgotten": Mutant(
        STEP,
        "    if bulk < count:\n        last = bulk + tl.arange(0, _STEP)\n        last_words",
        "    if bulk > count:\n        last = bulk + tl.arange(0, _STEP)\n        last_words",
        Step(),
    ),
    "step: a flag passed over": Mutant(
        STEP, "if tl.load(found_inf) != 0:", "if tl.load(found_inf) == 2:", Step(forbidden=True)
    ),
    "step: the same draw for theta and momentum": Mutant(
        STEP, "high = (words >> 16)", "high = (words & 0xFFFF)", Step("stochastic")
    ),
    "step: what was lost is not added": Mutant(
        STEP, "total = b_theta + b_r", "total = b_theta", Step("compensated")
    ),
    "temporal half: no zeros behind the clip": Mutant(
        BLOCK, "has_after = exists & (frame + 1 < frames)", "has_after = exists", TEMPORAL
    ),
    "temporal half: no zeros in front of the clip": Mutant(
        BLOCK, "has_before = exists & (frame > 0)", "has_before = exists", TEMPORAL
    ),
    "temporal half: the next frame for the previous one": Mutant(
        BLOCK, "_frame_at(x, row, -1, before", "_frame_at(x, row, 1, before", TEMPORAL
    ),
    "temporal half: residual forgotten": Mutant(BLOCK, "y += _step(", "y = _step(", TEMPORAL),
    "temporal half: ReLU forgotten": Mutant(
        BLOCK, "tl.where(y < 0, 0.0, y)", "tl.where(y < 0, y, y)", TEMPORAL
    ),
    "temporal half: one shift for all frames": Mutant(
        BLOCK,
        "(head * frames + frame) * HEAD_DIM",
        "(head * frames + 0 * frame) * HEAD_DIM",
        TEMPORAL,
    ),
    "temporal half: filters of the first convolution for the second": Mutant(
        BLOCK, "place + heads * HEAD_DIM", "place", TEMPORAL
    ),
}


def check_step(problem: Step) -> None:
    results = []
    for backend in ("triton", "reference"):
        params = parameters(HALF, (37, 4100))
        optimizer = PreParamSGD(
            params, lr=0.1, momentum=0.9, weight_decay=0.5, rounding=problem.rounding,
            backend=backend,
        )  # fmt: skip
        for number in range(3):
            set_gradients(params, seed=number)
            flag = torch.tensor(float(problem.forbidden and number == 1))
            optimizer.step(found_inf=flag)
        results.append([x for w in params for x in (w, *optimizer.state[w].values())])
    for x, y in zip(*results, strict=True):
        assert_same_bits(x, y)


def check(problem: Problem | Case | Step | block_cases.Case) -> None:
    with use_backend("triton", fallback=False):
        if isinstance(problem, Step):
            check_step(problem)
        elif isinstance(problem, block_cases.Case):
            block_cases.check(problem, HALF, "triton")
        elif isinstance(problem, Case):
            qkv_cases.check(problem, HALF, "triton")
        else:
            attention_cases.check(problem, "triton")


@pytest.mark.parametrize("problem", sorted({m.problem for m in MUTANTS.values()}, key=str), ids=str)
def test_the_kernels_are_right(problem: Problem | Case | Step | block_cases.Case) -> None:
    check(problem)


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_noticed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (launcher, attribute), right, wrong, problem = MUTANTS[name]
    original = getattr(launcher, attribute)
    text = Path(original.__file__).read_text()
    assert text.count(right) == 1, f"{name}: the text is no longer there"
    file = tmp_path / "mutant.py"
    file.write_text(text.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(original.__name__, file)
    assert spec is not None
    assert spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    monkeypatch.setattr(launcher, attribute, mutant)
    with pytest.raises(
        (AssertionError, InterpreterError), match=r"error|ulp|finite|out of bounds|differ"
    ):
        check(problem)
