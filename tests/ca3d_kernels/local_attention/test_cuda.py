"""The CUDA kernels of local attention, run on the host by the emulation, and their plans."""

import itertools
import math
from types import ModuleType

import pytest
import torch
from attention_cases import (
    DTYPES,
    NAMED,
    PARAMETERS,
    Problem,
    allowed,
    assert_rounded,
    check,
    compare,
    errors,
    run,
    vary,
)
from cuda_emulation import ORDERS
from exhaustive import often
from pairwise import pairwise_cases

from ca3d_kernels import UnsupportedInputError, local_temporal_attention, use_backend
from ca3d_kernels.local_attention.op import EDGES

MOST = 128  # of head_dim
# The random key table of one head may read one and the same frame at all slots: the gradient of q
# is 0 then, but rounding noise in float64, which is no truth to compare with.
COVERING = [
    Problem(**case)
    for case in pairwise_cases(
        PARAMETERS,
        lambda case: allowed(case) and (case["table"] != "random" or case["heads"] > 1),
        seed=3,
    )
]
assert len(COVERING) <= 300

# kernel_size, dilation, causal, edge
WINDOW = (5, 1, 0, 0)


@pytest.mark.parametrize(("number", "problem"), list(enumerate(COVERING)), ids=str)
def test_every_pair_of_options(number: int, problem: Problem, emulated_cuda: ModuleType) -> None:
    emulated_cuda.set_order(number % len(ORDERS))
    with use_backend("cuda", fallback=False):
        check(problem, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", NAMED.values(), ids=NAMED.keys())
def test_edge_cases(problem: Problem, dtype: torch.dtype, emulated_cuda: ModuleType) -> None:
    problem = vary(problem, dtype=dtype)
    with use_backend("cuda", fallback=False):
        if problem.head_dim > MOST:
            with pytest.raises(UnsupportedInputError, match="head_dim 160 is above 128"):
                run(problem, "cuda")
        else:
            check(problem, "cuda")


LONG = {
    "long clip, a tile of it at a time": Problem(frames=300, heads=1, head_dim=64, lead=(1,)),
    "long causal clip": Problem(frames=200, heads=1, head_dim=128, lead=(1,), causal=True),
    "long shifted clip": Problem(
        frames=190, heads=1, head_dim=128, kernel_size=6, lead=(1,), edge="shift"
    ),
    "long dilated clip": Problem(frames=333, heads=1, head_dim=128, dilation=2, lead=(1,)),
    "rows that don't fit": Problem(frames=64, heads=2, head_dim=128, kernel_size=40, lead=(1,)),
    "key table over a long clip": Problem(
        frames=70, heads=4, head_dim=64, lead=(1,), edge="zero", table="random"
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", LONG.values(), ids=LONG.keys())
def test_long_clips(problem: Problem, dtype: torch.dtype, emulated_cuda: ModuleType) -> None:
    with use_backend("cuda", fallback=False):
        check(vary(problem, dtype=dtype), "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_in_any_order_of_threads(dtype: torch.dtype, emulated_cuda: ModuleType) -> None:
    results = []
    for order in range(len(ORDERS)):
        emulated_cuda.set_order(order)
        torch.manual_seed(1)
        results.append(run(Problem(lead=(3, 7), dtype=dtype, layout="channels-last"), "cuda")[0])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_operands_are_not_written_and_infinities_do_not_leak(emulated_cuda: ModuleType) -> None:
    q, k, v = torch.randn(3, 1, 1, 9, 16)
    v[..., 8, :] = math.inf
    before = [x.clone() for x in (q, k, v)]
    output = local_temporal_attention(q, k, v, kernel_size=3, backend="cuda")
    clean = local_temporal_attention(q, k, v.nan_to_num(posinf=0), kernel_size=3)
    torch.testing.assert_close(output[..., :7, :], clean[..., :7, :])
    assert not torch.isfinite(output[..., 8, :]).any()
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


def test_large_logits_do_not_overflow(emulated_cuda: ModuleType) -> None:
    q = torch.full((1, 2, 6, 64), 100.0, dtype=torch.float16)
    v = torch.arange(6.0, dtype=torch.float16).view(1, 1, 6, 1).expand(1, 2, 6, 64)
    output = local_temporal_attention(q, q, v, kernel_size=3, scale=1.0, backend="cuda")
    assert output[0, 1, :, 7].tolist() == [0.5, 1, 2, 3, 4, 4.5]


def test_refusals_fall_back_with_one_warning(emulated_cuda: ModuleType) -> None:
    q = torch.randn(2, 2, 4, 136)
    with pytest.warns(RuntimeWarning, match="head_dim 136 is above 128.*using cpu"):
        output = local_temporal_attention(q, q, q, backend="cuda")
    assert torch.equal(output, local_temporal_attention(q, q, q, backend="cpu"))


# ---- plans, which need no memory behind an address ----


def launch(
    module: ModuleType,
    sizes: tuple[int, ...],
    dtype: str = "float16",
    window: tuple[int, ...] = WINDOW,
    operands: int = 4,
    address: int = 1 << 20,
    table: list[int] | None = None,
) -> dict:
    """How contiguous operands of some size are launched."""
    _, inner, heads, frames, head_dim = sizes
    frame, head = head_dim, head_dim * frames
    rows = (address, head * heads * inner, head * heads, head, frame)
    (plan,) = module.local_attention_launches(
        dtype, sizes, window, 1.0, table or [], [rows] * operands
    )
    return plan


def field(plan: dict, name: str) -> int:
    """An integer of a kernel's argument."""
    (parameter,) = plan["parameters"]
    (found,) = [x for x in parameter["fields"] if x["name"] == name]
    size = {"uint32_t": 4, "int32_t": 4, "int64_t": 8}.get(found["type"], 8)
    at = found["offset"]
    return int.from_bytes(parameter["bytes"][at : at + size], "little", signed=True)


def test_ordinary_problems_are_staged(emulated_library: ModuleType) -> None:
    for heads, frames in ((4, 8), (8, 4), (4, 16), (4, 64)):
        for operands, direction in ((4, "forward"), (7, "backward")):
            plan = launch(emulated_library, (20, 196, heads, frames, 64), operands=operands)
            assert plan["entry"] == f"ca3d_local_attention_{direction}_float16_staged"
            assert field(plan, "tiles.divisor") == 1
            assert plan["shared"] <= 48 * 1024
            blocks = math.ceil(20 * 196 * heads / field(plan, "units_per_block"))
            assert plan["grid"] == (blocks, 1, 1)


@pytest.mark.parametrize("dilation", [1, 2, 3, 7, 8, 9, 2**40 - 1])
@pytest.mark.parametrize("frames", [1, 2, 8, 9, 63])
def test_lengths_of_the_sequences(frames: int, dilation: int, emulated_library: ModuleType) -> None:
    plan = launch(emulated_library, (1, 2, 2, frames, 64), window=(3, dilation, 0, 0))
    phases = field(plan, "phases.divisor")
    longest, full = field(plan, "longest"), field(plan, "full_phases")
    lengths = [longest - (phase >= full) for phase in range(phases)]
    assert lengths == [len(range(phase, frames, dilation)) for phase in range(phases)]
    assert sum(lengths) == frames


@pytest.mark.parametrize("head_dim", [1, 3, 8, 16, 20, 33, 64, 128])
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_lanes_are_a_power_of_two(dtype: str, head_dim: int, emulated_library: ModuleType) -> None:
    plan = launch(emulated_library, (1, 2, 2, 4, head_dim), dtype=dtype)
    lanes = field(plan, "lanes")
    assert lanes == 1 << field(plan, "lane_shift")
    assert lanes <= 32


def test_large_problems_need_only_grid_x(emulated_library: ModuleType) -> None:
    # Beyond 2^31 elements, and 80,000 sequences of length 16.
    plan = launch(emulated_library, (1, 80_000, 8, 16, 128))
    assert plan["grid"][1:] == (1, 1)
    assert plan["grid"][0] > 65_535
    assert field(plan, "q.outer") == 80_000 * 8 * 16 * 128
    huge = launch(emulated_library, (40, 1_000_000, 8, 16, 64))
    assert field(huge, "q.outer") == 1_000_000 * 8 * 16 * 64 > 2**31
    assert field(huge, "units") == 320_000_000


def test_alignment_decides_the_access(emulated_library: ModuleType) -> None:
    def access(**changes: object) -> str:
        arguments = {"sizes": (2, 3, 4, 8, 64), **changes}
        return launch(emulated_library, **arguments)["entry"].rsplit("_", 1)[1]

    assert access() == "staged"
    assert access(address=(1 << 20) + 2) == "scalars"
    assert access(sizes=(2, 3, 4, 8, 20)) == "scalars"
    assert access(sizes=(2, 3, 4, 8, 20), dtype="float32") == "staged"
    assert access(sizes=(2, 3, 4, 64, 128), dtype="float64", window=(40, 1, 0, 0)) == "vectors"
    # Nothing but the output's rows is written: no clip is too long.
    assert access(sizes=(2, 3, 4, 20000, 64), window=(20000, 1, 0, 0)) == "vectors"


def test_a_block_computes_most_of_its_probabilities_for_its_own_frames(
    emulated_library: ModuleType,
) -> None:
    def tile(kernel_size: int) -> tuple[str, int]:
        arguments = {"sizes": (2, 3, 4, 128, 64), "window": (kernel_size, 1, 0, 0), "operands": 7}
        plan = launch(emulated_library, **arguments)
        return plan["entry"].rsplit("_", 1)[1], field(plan, "tile")

    assert tile(5)[0] == "staged"
    access, frames = tile(41)
    assert access == "vectors"
    assert frames > 40


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sizes": (2, 3, 4, 8, 136)}, "head_dim 136 is above 128"),
        ({"sizes": (2, 3, 4, 2**31, 8)}, "T 2147483648 is above 2147483647"),
        ({"sizes": (2**20, 2**10, 4, 8, 8)}, "more than 2147483647 sequences"),
        (
            {"sizes": (2, 3, 40, 8, 64), "window": (7, 1, 0, 1), "table": [0, 0] * 280},
            "heads \\* kernel_size of a key_table, 280 is above 256",
        ),
        (
            {"sizes": (2, 3, 4, 999, 64), "window": (500, 1, 0, 0), "operands": 7},
            "a window of 500 frames of float16 needs more than 49152 bytes of shared memory",
        ),
    ],
)
def test_limits_are_named(arguments: dict, words: str, emulated_library: ModuleType) -> None:
    with pytest.raises(emulated_library.UnsupportedError, match=words):
        launch(emulated_library, **arguments)


def test_bad_arguments_raise_before_anything_runs(emulated_library: ModuleType) -> None:
    good = {"sizes": (2, 3, 4, 8, 64)}
    for change, words in (
        ({"sizes": (2, 3, 0, 8, 64)}, "heads must be at least 1, got 0"),
        ({"window": (0, 1, 0, 0)}, "kernel_size must be at least 1, got 0"),
        ({"dtype": "int8"}, "dtype 'int8' is not supported"),
        ({"operands": 5}, "operands must be"),
    ):
        with pytest.raises(ValueError, match=words):
            launch(emulated_library, **{**good, **change})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kernel_size", often(zip(range(1, 10)), lambda kernel_size: kernel_size in (4, 5))
)
def test_full_sweep_of_windows(
    kernel_size: int, dtype: torch.dtype, emulated_cuda: ModuleType
) -> None:
    """The policy for a whole sweep, as in test_sweep.py."""
    shapes = itertools.cycle(((8, 1), (16, 3), (64, 4), (20, 8)))
    worst: dict[str, float] = {}
    torch_worst: dict[str, float] = {}
    for number, (frames, dilation, causal, edge) in enumerate(
        itertools.product((1, 2, 3, 4, 5, 7, 8, 16, 33, 64), (1, 2, 3), (False, True), EDGES)
    ):
        emulated_cuda.set_order(number % len(ORDERS))
        head_dim, heads = next(shapes)
        problem = Problem(
            frames=frames, kernel_size=kernel_size, dilation=dilation, causal=causal, edge=edge,
            heads=heads, head_dim=head_dim, dtype=dtype, lead=(2,),
        )  # fmt: skip
        with use_backend("cuda", fallback=False):
            for name, ours, same_dtype, exact in compare(problem, "cuda"):
                error, torch_error, largest = errors(ours, same_dtype, exact)
                if largest == 0:
                    assert error == 0, f"{problem}: {name}"
                    continue
                worst[name] = max(worst.get(name, 0), error / largest)
                torch_worst[name] = max(torch_worst.get(name, 0), torch_error / largest)
                if dtype in (torch.float16, torch.bfloat16):
                    assert_rounded(f"{problem}: {name}", ours, exact)
    for name, error in worst.items():
        assert error <= 2 * torch_worst[name] + 2 * torch.finfo(dtype).eps, name
