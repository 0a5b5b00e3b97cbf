"""Norms, rotary and cross-entropy, compiled for GPUs that are not there: no spills, and they fit.

The library's own launchers start the kernels, on tensors of the meta device, so that what is
compiled is what a GPU would get: the widest row, a width that is no power of 2, and float32.
"""

import functools

import pytest
import torch
import triton_compile

pytest.importorskip("triton")


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def norm(d, dtype, centred):
    """A norm with residual, weight and bias, and its backward pass."""
    from course_lib.ops.norm import triton_norm

    x, weight = empty(4096, d, dtype=dtype), empty(d, dtype=torch.float32)
    bias = weight if centred else None
    y, total, mean, inverse = triton_norm.launch_forward(x, x, weight, bias, 1e-5, centred)
    triton_norm.launch_backward(y, y, total, weight, mean, inverse, centred, centred)


def rotary(interleaved):
    from course_lib.ops.rotary import triton_rotary

    x, table = empty(2, 16, 4096, 128), empty(4096, 64, dtype=torch.float32)
    triton_rotary.launch(x, table, table, interleaved, back=False)


def cross_entropy(dtype, smoothing):
    from course_lib.ops.cross_entropy import triton_cross_entropy

    logits, targets = empty(4096, 128_256, dtype=dtype), empty(4096, dtype=torch.int64)
    loss, log_sum = triton_cross_entropy.losses(logits, targets, -100, smoothing)
    triton_cross_entropy.gradient(loss, logits, targets, log_sum, -100, smoothing)


LAUNCHES = {
    "layer norm, d 768": functools.partial(norm, 768, torch.bfloat16, True),
    "layer norm, d 8192": functools.partial(norm, 8_192, torch.float32, True),
    "RMS norm, d 4096": functools.partial(norm, 4096, torch.bfloat16, False),
    "rotary, neighbours": functools.partial(rotary, True),
    "rotary, halves": functools.partial(rotary, False),
    "cross-entropy": functools.partial(cross_entropy, torch.bfloat16, 0.1),
}


@pytest.fixture(scope="module")
def compiled():
    return triton_compile.report("test_triton_compile_small", 80, 90)


def test_every_kernel_is_compiled_for_both_gpus(compiled):
    found = {(one.name, one.kernel, one.capability) for one in compiled}
    kernels = {"forward_kernel", "backward_kernel", "rotary_kernel"}
    assert {kernel for _, kernel, _ in found} == kernels
    assert len(found) == len(compiled) == 2 * (2 * len(LAUNCHES) - 2)  # rotary has one kernel


def test_no_registers_spill(compiled):
    assert {one.name: one.stack for one in compiled if one.stack} == {}


def test_two_programs_fit_beside_one_another(compiled):
    """These kernels wait for memory: a second program must be there to compute meanwhile."""
    for one in compiled:
        threads, registers = 32 * one.warps, 65_536
        assert 2 * one.shared <= triton_compile.SHARED_MEMORY[one.capability], one
        wide = one.name == "layer norm, d 8192"  # half a row of registers each way
        assert threads * one.registers * (1 if wide else 2) <= registers, one
