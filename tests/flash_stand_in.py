"""A stand-in for the `flash_attn` package on the CPU: the same functions, numerically true, computed with plain torch.

Only the kernels are replaced. Everything around them is transformers' own: unpadding, packed rows, windows, the choice
between the padded and the variable-length function, and padding again.
"""

import sys
from types import ModuleType

import pytest
import torch
from transformers import modeling_flash_attention_utils, modeling_utils
from transformers.modeling_flash_attention_utils import _pad_input, _unpad_input


def attend(query, key, value, causal, scale, window):
    """One sequence: query (seq_q, heads, dim) on key and value (seq_k, kv_heads, dim), aligned at the end."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("qhd,khd->hqk", query.double(), key.double()) * scale
    query_index = torch.arange(query.shape[0])[:, None] + key.shape[0] - query.shape[0]
    key_index = torch.arange(key.shape[0])[None, :]
    left, right = window
    allowed = torch.ones(query.shape[0], key.shape[0], dtype=torch.bool)
    if left >= 0:
        allowed &= key_index >= query_index - left
    if causal:
        allowed &= key_index <= query_index
    elif right >= 0:
        allowed &= key_index <= query_index + right
    probabilities = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("hqk,khd->qhd", probabilities, value.double()).to(query.dtype)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False
):
    assert dropout_p == 0.0 and softcap == 0.0
    rows = [attend(*row, causal, softmax_scale, window_size) for row in zip(q, k, v)]
    return torch.stack(rows)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    deterministic=False,
):
    assert dropout_p == 0.0 and softcap == 0.0
    output = torch.zeros_like(q)
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert max_seqlen_q >= max(end - start for start, end in zip(starts_q, starts_q[1:]))
    for index in range(len(starts_q) - 1):
        queries, keys = slice(*starts_q[index : index + 2]), slice(*starts_k[index : index + 2])
        output[queries] = attend(q[queries], k[keys], v[keys], causal, softmax_scale, window_size)
    return output


def flash_attn_with_kvcache(*args, **kwargs):
    raise NotImplementedError("the stand-in has no paged cache")


@pytest.fixture
def flash_attention_on_cpu(monkeypatch):
    """Makes `attn_implementation="flash_attention_2"` work on the CPU, through transformers' real code path."""
    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    package.__dict__.update(
        flash_attn_func=flash_attn_func,
        flash_attn_varlen_func=flash_attn_varlen_func,
        flash_attn_with_kvcache=flash_attn_with_kvcache,
        bert_padding=padding,
    )
    padding.__dict__.update(pad_input=_pad_input, unpad_input=_unpad_input)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(modeling_flash_attention_utils, "is_flash_attn_2_available", lambda **kwargs: True)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    version_2 = modeling_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
    monkeypatch.setitem(version_2, "general_availability_check", lambda **kwargs: True)
    monkeypatch.setattr(modeling_utils.PreTrainedModel, "_flash_attn_can_dispatch", lambda self, *args, **kwargs: True)
