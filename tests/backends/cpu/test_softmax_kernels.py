"""The CPU kernels against fp64 on rows with masks, growing exponents, and in parts on several threads."""

import math
import os
import re
import subprocess
import sys
import threading

import pytest
import torch

numba = pytest.importorskip("numba")

import graphopt  # noqa: E402
from graphopt import registry  # noqa: E402
from graphopt.backends.cpu import launch, register  # noqa: E402  # imports numba
from graphopt.backends.cpu import softmax as compiled  # noqa: E402
from graphopt.ops import kernels, online_softmax, two_pass_softmax, unified_max_softmax  # noqa: E402

ALGORITHMS = {
    "two_pass": launch.TWO_PASS,
    "two_pass_recomputed": launch.TWO_PASS_RECOMPUTED,
    "online": launch.ONLINE,
    "three_pass": launch.THREE_PASS,
    "unified_max": launch.unified_max(0.0, -60.0, 60.0),
}
OPERATORS = {"two_pass": two_pass_softmax, "online": online_softmax, "unified_max": unified_max_softmax}
INF, NAN = math.inf, math.nan
LOWEST = torch.finfo(torch.float32).min
BLOCK = compiled.BLOCK

# Of the row's largest entry: a lane adds up to 64 terms in fp32, and those of equal entries are all rounded one way.
UNITS = 16 * 2.0**-24
# Of an entry far below: x - max is rounded by up to half a unit of a number below 104, and e^x passes that on.
SHIFTED = 2.0**-17


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    before = torch.get_num_threads()
    for name in ("GRAIN", "PART"):  # so that small tensors are spread as well
        monkeypatch.setattr(launch, name, 1 << 13)
    yield
    torch.set_num_threads(before)


def softmax(x, name):
    y = torch.full_like(x, 7.0)
    launch.softmax(x.numpy(), y.numpy(), ALGORITHMS[name])
    return y


def right(x):
    """Softmax in fp64 with the defined values: zeros for -inf alone, NaN throughout with NaN or +inf."""
    y = x.double().softmax(-1)
    y[(x == -INF).all(-1)] = 0
    return y


def check(x, name):
    expected = right(x)
    largest = expected.nan_to_num(0).amax(-1, keepdim=True).clamp(min=1e-30)
    y = softmax(x, name)
    torch.testing.assert_close(y / largest, expected / largest, rtol=0, atol=UNITS, equal_nan=True, check_dtype=False)
    rtol = UNITS if name.startswith("two_pass") else SHIFTED
    torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=2.0**-39, equal_nan=True)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize(
    "length", [1, 2, 15, 16, 17, 63, 64, 65, 197, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7]
)
def test_odd_lengths(name, length):
    generator = torch.Generator().manual_seed(length)
    scales = torch.tensor([1e-30, 1e-3, 1.0, 10.0, 1e3, 1e5])[:, None]
    check(torch.randn(6, length, generator=generator) * scales, name)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("place", [0, 1, BLOCK, 2 * BLOCK + 5])
@pytest.mark.parametrize(
    "entries",
    [
        (-INF, -INF),
        (-INF, 3.0),
        (-INF, NAN),
        (-INF, -NAN),
        (-INF, INF),
        (LOWEST, LOWEST),
        (LOWEST, -1e30),
        (-1e30, 2.0),
        (0.0, NAN),
        (0.0, -NAN),
        (0.0, INF),
        (0.0, -INF),
        (1e30, 2e30),
        (-1e6, -1e6 + 1),
        (1e6, 1e6 + 1),
        (3e38, -3e38),
        (-59.0, -61.0),
        (59.0, 61.0),
    ],
)
def test_one_entry_unlike_the_others(name, place, entries):
    """Wherever it stands: in the first block, where the exponents start, or in a later one, which has to move them."""
    x = torch.full((1, 2 * BLOCK + 6), entries[0])
    x[0, place] = entries[1]
    check(x, name)
    torch.set_num_threads(3)
    long = torch.cat([x, torch.full((1, 4 * launch.GRAIN), entries[0])], -1)
    check(long, name)
    check(long.flip(-1), name)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("steps", [1.0, 30.0, 100.0, 2000.0])
def test_exponents_that_grow_and_fall_from_block_to_block(name, steps):
    x = torch.randn(1, 8 * BLOCK, generator=torch.Generator().manual_seed(0))
    x += (torch.arange(8 * BLOCK) // BLOCK) * steps
    check(x, name)
    check(x.flip(-1).contiguous(), name)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize(("rows", "length"), [(1, 300_003), (2, 150_001), (60, 5000)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads(name, rows, length, count):
    torch.set_num_threads(count)
    x = torch.randn(rows, length, generator=torch.Generator().manual_seed(count)) * 5
    x[0, : length // 2] = -INF
    check(x, name)


def test_a_long_row_keeps_its_digits():
    """Half a million entries: blocks are added in fp64, so the sum is off by no more than one block's."""
    x = torch.randn(1, 2**19 + 5, generator=torch.Generator().manual_seed(0)) * 3
    for name in ALGORITHMS:
        check(x, name)


def test_a_row_that_no_cache_holds_is_recomputed():
    x = torch.randn(1, compiled.IN_CACHE + 1, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(1)
    assert torch.equal(softmax(x, "two_pass"), softmax(x, "two_pass_recomputed"))


@pytest.mark.parametrize("name", OPERATORS)
def test_the_operator_runs_the_kernel(name, monkeypatch):
    calls = []
    monkeypatch.setattr(launch, "softmax", lambda x, y, algorithm: calls.append((x.shape, algorithm)))
    OPERATORS[name](torch.randn(4, 8, 128))
    assert [shape for shape, _ in calls] == [(32, 128)]
    assert calls[0][1].rows is ALGORITHMS[name].rows
    OPERATORS[name](torch.randn(register.SMALLEST - 1))
    OPERATORS[name](torch.randn(register.SMALLEST, dtype=torch.float64))
    assert len(calls) == 1


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_axes_and_types(name, dtype, dim):
    x = (torch.randn(20, 30, 40, generator=torch.Generator().manual_seed(0)) * 4).to(dtype).transpose(0, 2)
    y = OPERATORS[name](x, dim)
    assert y.is_contiguous()
    # The narrow types are rounded once from fp32, by half a unit; fp32 as in `check`.
    eps = SHIFTED if dtype == torch.float32 else torch.finfo(dtype).eps * 0.505
    torch.testing.assert_close(y.double(), x.double().softmax(dim), rtol=eps, atol=torch.finfo(dtype).smallest_normal)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_gradient_of_the_kernel(name):
    x = torch.randn(64, 100, generator=torch.Generator().manual_seed(0), requires_grad=True)
    g = torch.randn(64, 100, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad(OPERATORS[name](x), x, g)
    wide = x.detach().double().requires_grad_(True)
    (expected,) = torch.autograd.grad(wide.softmax(-1), wide, g.double())
    # Sums of 100 products below 1 in fp32.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=100 * 2.0**-24)


@pytest.mark.parametrize("phi", [-1000.0, -61.0, -59.0, 0.0, 59.0, 61.0, 1000.0])
def test_no_constant_is_wrong(phi):
    x = torch.randn(300, 50, generator=torch.Generator().manual_seed(0)) * 3
    x[0] += phi
    torch.testing.assert_close(unified_max_softmax(x, -1, phi).double(), right(x), rtol=SHIFTED, atol=2.0**-39)


def test_several_threads_call_at_once():
    x = torch.randn(3, 100_000, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(2)
    expected, wrong = right(x), []

    def call():
        for _ in range(10):
            if not torch.allclose(two_pass_softmax(x).double(), expected, rtol=1e-5, atol=0):
                wrong.append(1)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


SCRIPT = """
import sys, torch, graphopt.ops as ops
ops.two_pass_softmax(torch.randn(3, 5))
assert sys.modules.get("numba") is None, "numba came with a small tensor"
x = torch.randn(64, 128)
y = ops.two_pass_softmax(x)
torch.testing.assert_close(y, x.softmax(-1), rtol=1e-5, atol=1e-9)
"""


def python(*lines):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    code = "\n".join(lines)
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


FORK = """
import os
assert "numba" in sys.modules
torch.set_num_threads(2)
x = torch.randn(3, 300_000)
ops.two_pass_softmax(x)
child = os.fork() if hasattr(os, "fork") else None
if child == 0:
    ops.two_pass_softmax(x)
    os._exit(0)
assert child is None or os.waitpid(child, 0)[1] == 0
"""


def test_numba_comes_with_the_first_large_tensor_and_a_forked_process_makes_its_own_threads():
    done = python(SCRIPT, FORK)
    assert done.returncode == 0, done.stderr


def test_without_numba_the_reference_runs():
    done = python("import sys; sys.modules['numba'] = None", SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


def test_a_processor_without_fused_multiply_add_takes_the_reference(monkeypatch):
    monkeypatch.setattr("llvmlite.binding.get_host_cpu_features", lambda: {"fma": False})
    register._usable.cache_clear()
    try:
        assert not register.supported(torch.zeros(register.SMALLEST))
    finally:
        monkeypatch.undo()
        register._usable.cache_clear()
    assert register.supported(torch.zeros(register.SMALLEST))


def test_kernels_are_found_by_the_name_of_the_device():
    two_pass_softmax(torch.randn(3))
    assert kernels.registered(two_pass_softmax, "cpu") is not None


def test_the_target_lowers_to_a_module_that_runs_the_kernels(monkeypatch):
    class Model(torch.nn.Module):
        def forward(self, x):
            return two_pass_softmax(x)

    x = torch.randn(64, 128)
    module = registry.backend("cpu").lower(graphopt.load(Model(), (x,)))
    calls = []
    monkeypatch.setattr(launch, "softmax", lambda x, y, algorithm: calls.append(x.shape))
    module(x)
    assert calls == [(64, 128)]


@pytest.mark.parametrize(
    ("function", "signature"),
    [
        (compiled.block_sum, "(float32[::1], float32, float32)"),
        (compiled.block_weights, "(float32[::1], float32[::1], float32)"),
        (compiled.write, "(float32[::1], float32[::1], float32, float32, float64)"),
    ],
)
def test_loops_are_vectorised(function, signature):
    """What the speed rests on: every loop over a row multiplies and adds whole vectors."""
    fresh = numba.njit(fastmath=function.targetoptions.get("fastmath", False))(function.py_func)
    fresh.compile(signature)  # what comes from the cache on disk cannot be inspected
    (assembly,) = fresh.inspect_asm().values()
    if "vfmadd" not in assembly:
        pytest.skip("not an x86 processor")
    assert re.search(r"vfn?madd\d+ps", assembly)  # `ps` is packed; `ss` would be one number at a time
