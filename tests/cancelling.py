"""Σ|terms| of the gradients of key biases, whose terms cancel.

A bias of all keys adds one number to all logits of a query, which the softmax does not see: the
gradient is exactly zero, and its error is that of the terms alone.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from harness import Inputs, Results, evaluate, mapped
from torch import Tensor

from dsnet_kernels.reference import common, dropout


def of_key_biases(
    reference: Callable[..., Any], biases: tuple[str, ...], inputs: Inputs, grads: list[Tensor]
) -> Results:
    """Σ|terms| in the part of the keys of each gradient, (3·h·d), zero in the others.

    ``biases`` are the biases of the keys in the order in which the reference attends to these. With
    weights P, their gradients dP and δ = Σ P·dP, a term is P·(dP − δ)·q / √d.
    """
    module = importlib.import_module(reference.__module__)
    calls = []

    def recording(q, k, v, dropout_p, seed=None, first_head=0):
        out = common.attend(q, k, v, dropout_p, seed, first_head)
        call = {"q": q, "k": k, "v": v, "p": dropout_p, "seed": seed, "first_head": first_head}
        out.register_hook(lambda grad: call.update(grad=grad))
        calls.append(call)
        return out

    with mock.patch.object(module, "attend", recording):
        evaluate(reference, mapped(inputs, Tensor.double), [grad.double() for grad in grads])
    return {f"grad {name}": _terms(**call) for name, call in zip(biases, calls, strict=True)}


def _terms(q, k, v, p, seed, first_head, grad) -> Tensor:
    scale = 1 / math.sqrt(q.shape[-1])
    grad = grad.unflatten(2, (q.shape[1], -1)).transpose(1, 2)
    weights = torch.softmax(q @ k.mT * scale, dim=-1)
    grad_weights = grad @ v.mT
    if p > 0:
        keep = dropout.keep_mask(weights.shape, p, seed, first_head)
        grad_weights = torch.where(keep, grad_weights / (1 - p), 0.0)
    delta = (weights * grad_weights).sum(-1, keepdim=True)
    terms = weights * (grad_weights.abs() + delta.abs())
    of_keys = torch.einsum("bhij,bhic->hc", terms, q.abs()).flatten() * scale
    return torch.cat([torch.zeros_like(of_keys), of_keys, torch.zeros_like(of_keys)]).detach()
