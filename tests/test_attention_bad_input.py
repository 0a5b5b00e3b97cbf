"""`attention`: every bad argument is named, with what came and what was expected."""

import math

import numpy as np
import pytest
import torch
from attention_cases import qkv

from course_lib import attention, explain_backends, masks

pytestmark = pytest.mark.bad_input


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


# Everything fits (batch 2, heads 4 on 2, n_q 5, n_k 7, d_k 4, d_v 3) but what is named here.
BAD = {
    "query: list": ({"query": [[1.0]]}, TypeError, "query.*list"),
    "query: numpy": ({"query": np.zeros((2, 4, 5, 4))}, TypeError, "query.*ndarray"),
    "query: None": ({"query": None}, TypeError, "query.*NoneType"),
    "query: rank 3": ({"query": zeros(2, 5, 4)}, ValueError, r"query.*\(2, 5, 4\)"),
    "query: rank 5": ({"query": zeros(1, 2, 4, 5, 4)}, ValueError, r"query.*\(1, 2, 4, 5, 4\)"),
    "query: int": ({"query": zeros(2, 4, 5, 4).int()}, TypeError, "query.*int32"),
    "query: bool": ({"query": zeros(2, 4, 5, 4).bool()}, TypeError, "query.*bool"),
    "query: complex": ({"query": zeros(2, 4, 5, 4).cfloat()}, TypeError, "query.*complex64"),
    "query: float8": (
        {"query": zeros(2, 4, 5, 4).to(torch.float8_e4m3fn)}, TypeError, "query.*float8"),
    "query: d_head 0": (
        {"query": zeros(2, 4, 5, 0), "key": zeros(2, 2, 7, 0)}, ValueError, "query has d_head 0"),
    "query: other batch": (
        {"query": zeros(3, 4, 5, 4)}, ValueError, r"batch.*\(3, 4, 5, 4\).*\(2, 2, 7, 4\)"),
    "query: heads no multiple": (
        {"query": zeros(2, 3, 5, 4)}, ValueError, r"multiple.*\(2, 3, 5, 4\).*\(2, 2, 7, 4\)"),
    "query: fewer heads than key": (
        {"query": zeros(2, 1, 5, 4)}, ValueError, r"multiple.*\(2, 1, 5, 4\)"),
    "query: other device": ({"query": zeros(2, 4, 5, 4, device="meta")}, ValueError,
                            "key is on cpu but query is on meta"),
    "key: list": ({"key": [1.0]}, TypeError, "key.*list"),
    "key: rank 3": ({"key": zeros(2, 7, 4)}, ValueError, r"key.*\(2, 7, 4\)"),
    "key: other dtype": ({"key": zeros(2, 2, 7, 4).half()}, TypeError, "key.*float16.*float32"),
    "key: int": ({"key": zeros(2, 2, 7, 4).long()}, TypeError, "key.*int64"),
    "key: other device": ({"key": zeros(2, 2, 7, 4, device="meta")}, ValueError, "key.*meta.*cpu"),
    "key: other d_head": (
        {"key": zeros(2, 2, 7, 6)}, ValueError, r"d_head.*\(2, 4, 5, 4\).*\(2, 2, 7, 6\)"),
    "key: other length than value": (
        {"key": zeros(2, 2, 6, 4)}, ValueError, r"key.*\(2, 2, 6, 4\).*value.*\(2, 2, 7, 3\)"),
    "key: no heads": (
        {"key": zeros(2, 0, 7, 4), "value": zeros(2, 0, 7, 3)}, ValueError, "multiple"),
    "value: rank 2": ({"value": zeros(7, 3)}, ValueError, r"value.*\(7, 3\)"),
    "value: other heads": (
        {"value": zeros(2, 4, 7, 3)}, ValueError, r"key.*\(2, 2, 7, 4\).*value.*\(2, 4, 7, 3\)"),
    "value: other batch": ({"value": zeros(1, 2, 7, 3)}, ValueError, r"value.*\(1, 2, 7, 3\)"),
    "value: other dtype": ({"value": zeros(2, 2, 7, 3).double()}, TypeError, "value.*float64"),
    "value: other device": ({"value": zeros(2, 2, 7, 3, device="meta")}, ValueError, "value.*meta"),
    "mask: numpy": ({"mask": np.ones((5, 7), dtype=bool)}, TypeError, "mask.*ndarray"),
    "mask: list": ({"mask": [[True] * 7] * 5}, TypeError, "mask.*list"),
    "mask: word": ({"mask": "causal"}, TypeError, "mask.*str"),
    "mask: bool": ({"mask": True}, TypeError, "mask.*bool"),
    "mask: constructor": ({"mask": masks.causal}, TypeError, "mask.*function"),
    "mask: float": ({"mask": zeros(5, 7)}, TypeError, "mask.*float32.*bias"),
    "mask: int": ({"mask": zeros(5, 7).int()}, TypeError, "mask.*int32"),
    "mask: rank 3": ({"mask": zeros(2, 5, 7).bool()}, ValueError, r"mask.*\(2, 5, 7\)"),
    "mask: rank 1": ({"mask": zeros(7).bool()}, ValueError, r"mask.*\(7,\)"),
    "mask: other n_k": ({"mask": zeros(5, 6).bool()}, ValueError, r"mask.*5, 6\).*n_k = 7|n_q = 5"),
    "mask: transposed": ({"mask": zeros(7, 5).bool()}, ValueError, r"mask.*7, 5\).*n_q = 5"),
    "mask: other batch": (
        {"mask": zeros(3, 1, 5, 7).bool()}, ValueError, r"mask.*batch.* 3.*\(2, 4, 5, 4\)"),
    "mask: other heads": (
        {"mask": zeros(1, 2, 5, 7).bool()}, ValueError, r"mask.*heads 2.*\(2, 4, 5, 4\)"),
    "mask: other device": ({"mask": zeros(5, 7, device="meta").bool()}, ValueError,
                           "mask is on meta but query is on cpu"),
    "mask: padding of other batch": (
        {"mask": masks.padding([1, 2, 3])}, ValueError, r"padding.* 3.*\(2, 4, 5, 4\)"),
    "mask: documents of other length": (
        {"mask": masks.documents([[1, 2], [3, 4]])}, ValueError, r"\(2, 2\).*n_k = 7"),
    "mask: global token outside": (
        {"mask": masks.longformer(1, [7])}, ValueError, r"global_tokens \[7\].*n_k = 7"),
    "mask: bad in the depth of a rule": (
        {"mask": ~(masks.causal() & zeros(5, 6).bool())}, ValueError, r"5, 6\).*n_k = 7"),
    "bias: list": ({"bias": [0.0]}, TypeError, "bias.*list"),
    "bias: number": ({"bias": 1.0}, TypeError, "bias.*float"),
    "bias: bool": ({"bias": zeros(5, 7).bool()}, TypeError, "bias.*bool.*mask"),
    "bias: int": ({"bias": zeros(5, 7).int()}, TypeError, "bias.*int32"),
    "bias: complex": ({"bias": zeros(5, 7).cfloat()}, TypeError, "bias.*complex64"),
    "bias: other n_k": ({"bias": zeros(5, 6)}, ValueError, r"bias.*\(5, 6\).*\(2, 4, 5, 7\)"),
    "bias: other heads": (
        {"bias": zeros(2, 5, 7)}, ValueError, r"bias.*\(2, 5, 7\).*\(2, 4, 5, 7\)"),
    "bias: rank 5": ({"bias": zeros(1, 2, 4, 5, 7)}, ValueError, r"bias.*\(1, 2, 4, 5, 7\)"),
    "bias: other device": ({"bias": zeros(5, 7, device="meta")}, ValueError, "bias.*meta.*cpu"),
    "scale: word": ({"scale": "0.5"}, TypeError, "scale.*str"),
    "scale: bool": ({"scale": True}, TypeError, "scale.*bool"),
    "scale: tensor": ({"scale": torch.tensor(0.5)}, TypeError, "scale.*Tensor"),
    "scale: nan": ({"scale": math.nan}, ValueError, "scale.*nan"),
    "scale: inf": ({"scale": math.inf}, ValueError, "scale.*inf"),
    "dropout_p: 1": ({"dropout_p": 1.0}, ValueError, "dropout_p.*1.0"),
    "dropout_p: negative": ({"dropout_p": -0.1}, ValueError, "dropout_p.*-0.1"),
    "dropout_p: nan": ({"dropout_p": math.nan}, ValueError, "dropout_p.*nan"),
    "dropout_p: word": ({"dropout_p": "a"}, TypeError, "dropout_p.*str"),
    "dropout_p: None": ({"dropout_p": None}, TypeError, "dropout_p.*NoneType"),
    "dropout_p: bool": ({"dropout_p": True}, TypeError, "dropout_p.*bool"),
    "generator: seed": ({"generator": 3}, TypeError, "generator.*int"),
}  # fmt: skip


def arguments(changed):
    good = dict(zip(("query", "key", "value"), qkv(), strict=True))
    return good | changed


@pytest.mark.parametrize("call", [attention, explain_backends])
@pytest.mark.parametrize(("changed", "error", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_argument_is_named_with_what_came_and_what_was_expected(
    call, changed, error, message
):
    with pytest.raises(error, match=message):
        call(**arguments(changed))


@pytest.mark.parametrize("backend", ["reference", "sdpa", "flex"])
@pytest.mark.parametrize("name", ["key: other d_head", "mask: other n_k", "bias: other n_k"])
def test_a_bad_argument_is_named_whatever_the_backend(backend, name):
    changed, error, message = BAD[name]
    with pytest.raises(error, match=message):
        attention(**arguments(changed), backend=backend)


@pytest.mark.parametrize(
    ("backend", "error", "message"),
    [
        ("Sdpa", ValueError, "backend must be one of auto, sdpa, .*'Sdpa'"),
        ("", ValueError, "backend.*''"),
        (None, TypeError, "backend.*NoneType"),
        (["sdpa"], TypeError, "backend.*list"),
    ],
)
def test_an_unknown_backend_is_refused_with_the_names_there_are(backend, error, message):
    with pytest.raises(error, match=message):
        attention(*qkv(), backend=backend)


def test_the_good_arguments_of_this_file_are_good():
    assert attention(**arguments({})).shape == (2, 4, 5, 3)
