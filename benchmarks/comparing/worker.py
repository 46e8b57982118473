"""Runs the calls of one checkout: ``python worker.py ROOT THREADS``, with ROOT on PYTHONPATH.

Requests are JSON objects, a line each, on stdin; each has one answer on stdout, which holds
``error`` if anything went wrong:

- ``{"load": FILE, "values": FILE}`` takes the call described in the first file, runs it once and
  saves its outputs and gradients to the second → ``{"chosen": {operation: backend}}``;
- ``{"repeats": N}`` → ``{"seconds": of one call}``.

The file stands alone: it serves checkouts older and newer than itself, by their public names.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Sequence[Tensor]]
"""Returns outputs and gradients."""


def operation(job: dict[str, Any]) -> tuple[Call, list[str], dict[str, str]]:
    """The call, the names of what it returns, and the backend that runs it."""
    kernels = importlib.import_module("dsnet_kernels")
    function = partial(getattr(kernels, job["operation"]), **job["constants"])
    tensors, grads = job["tensors"], job["grads"]
    outputs = [f"out {i}" for i in range(job["outputs"])]
    chosen = {}
    if hasattr(kernels, "explain"):
        dispatched = [tensors[name] for name in job["dispatched"]]
        options = {name: {**tensors, **job["constants"]}[name] for name in job["options"]}
        found = kernels.explain(job["operation"], *dispatched, **options)
        chosen = {job["operation"]: found.chosen}
    if grads is None:
        return lambda: _tuple(function(**tensors)), outputs, chosen
    leaves = {name: value.detach().requires_grad_() for name, value in tensors.items()}

    def forward_backward() -> Sequence[Tensor]:
        found = _tuple(function(**leaves))
        return *found, *torch.autograd.grad(found, list(leaves.values()), grads)

    return forward_backward, [*outputs, *(f"grad {name}" for name in leaves)], chosen


def network(job: dict[str, Any]) -> tuple[Call, list[str], dict[str, str]]:
    """Inference of what ``dsnet.optimize`` returns, or a forward and backward without a step."""
    dsnet = importlib.import_module("dsnet")
    model = dsnet.create_model(job["name"])
    model.load_state_dict(job["state"])
    model = model.train(job["training"]).to(memory_format=torch.channels_last)
    images, labels = job["images"], job["labels"]
    if not job["training"]:
        if hasattr(dsnet, "optimize"):
            model = dsnet.optimize(model)
        return lambda: _tuple(model(_channels_last(images))), ["logits"], {}
    parameters = dict(model.named_parameters())

    def step() -> Sequence[Tensor]:
        logits = model(_channels_last(images))
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        return logits, *torch.autograd.grad(loss, list(parameters.values()))

    return step, ["logits", *(f"grad {name}" for name in parameters)], {}


def _tuple(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


class Worker:
    """The call in force, and the answers to requests about it."""

    def __init__(self) -> None:
        self.call: Call = tuple
        self.inference = False

    def load(self, source: str, values: str) -> dict[str, Any]:
        job = torch.load(source)
        make = operation if job["kind"] == "op" else network
        self.inference = job["inference"]
        with torch.inference_mode(self.inference):
            self.call, names, chosen = make(job)
            found = [value.detach().clone() for value in self.call()]
        torch.save(dict(zip(names, found, strict=True)), values)
        return {"chosen": chosen}

    def time(self, repeats: int) -> dict[str, Any]:
        with torch.inference_mode(self.inference):
            start = time.perf_counter()
            for _ in range(repeats):
                self.call()
            return {"seconds": (time.perf_counter() - start) / repeats}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            if "load" in request:
                return self.load(request["load"], request["values"])
            return self.time(request["repeats"])
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}".split("\n")[0]}


def main(root: str, threads: str) -> None:
    # What a library prints must not stand among the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(int(threads))
    kernels = importlib.import_module("dsnet_kernels")
    found = Path(kernels.__file__).resolve()
    if not found.is_relative_to(Path(root).resolve()):
        raise SystemExit(f"dsnet_kernels: expected that of {root}, got {found}")
    worker = Worker()
    print(json.dumps({"ready": str(found)}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
