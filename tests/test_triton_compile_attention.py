"""The attention kernels, compiled for GPUs that are not there: no spills, and they fit."""

import pytest
import torch
import triton_compile

from course_lib import masks
from course_lib.ops.attention import triton_settings
from course_lib.ops.attention.triton_plan import make_plan

pytest.importorskip("triton")


def launch(d, dtype, biased=False, n=1024):
    """A causal call and its gradients, on tensors that hold nothing.

    One with a bias also looks for broken keys.
    """

    def plan(how):
        return make_plan(masks.causal(), n, n, (how.block_q, how.block_k), torch.device("cpu"))

    def start():
        from course_lib.ops.attention.triton_backward import launch_key, launch_query
        from course_lib.ops.attention.triton_forward import launch_forward

        q, k, v = (torch.empty(2, 16, n, d, dtype=dtype, device="meta") for _ in range(3))
        bias = torch.empty(2, 16, n, n, device="meta") if biased else None
        broken = torch.empty(2, 16, n, dtype=torch.uint8, device="meta") if biased else None
        how = triton_settings.forward_launch(q, v)
        walk = plan(how)
        out, lse, _ = launch_forward(
            q, k, v, bias, broken, walk.by_query, walk.patterns, 0.125, how
        )  # fmt: skip
        how = triton_settings.query_launch(q, v)
        walk = plan(how)
        _, _, delta = launch_query(
            out, lse, q, k, v, bias, out, lse, walk.by_query, walk.patterns, 0.125, biased, how
        )  # fmt: skip
        how = triton_settings.key_launch(q, v)
        walk = plan(how)
        launch_key(out, q, k, v, bias, lse, delta, walk.by_key, walk.patterns, 0.125, how)

    return start


LAUNCHES = {
    "d 64": launch(64, torch.bfloat16),
    "d 128": launch(128, torch.bfloat16),
    "d 128, biased": launch(128, torch.bfloat16, biased=True),
    "d 64, float32": launch(64, torch.float32),
}


@pytest.fixture(scope="module")
def compiled():
    found = triton_compile.report("test_triton_compile_attention", 80, 90)
    assert len(found) == 2 * 3 * len(LAUNCHES)
    return found


def test_every_kernel_fits_the_shared_memory(compiled):
    assert [found for found in compiled if not found.fits] == []


def test_no_register_spills(compiled):
    # With a bias a few words that do not change are parked before the loop.
    assert [
        found for found in compiled if found.stack > (16 if "biased" in found.name else 0)
    ] == []


def test_half_precision_multiplies_on_tensor_cores_and_float32_keeps_its_digits(compiled):
    for found in compiled:
        assert (found.tensor_cores > 0) == ("float32" not in found.name), found


def test_keys_are_loaded_ahead(compiled):
    """But where tiles are so large that two do not fit the registers."""
    for found in compiled:
        if found.kernel != "backward_key_kernel":
            assert found.async_copies > 0 or "float32" in found.name, found
