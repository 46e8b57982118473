"""Every kernel once on small inputs: ``python -m benchmarks.gpu.small_inputs cuda``.

Forward and backward of each operation on each of its kernel backends, in float32 and bfloat16, on
small stages of the network and on one of odd sizes with channels that fill no vector.
"""

import argparse
import dataclasses
import sys

import torch

import dsnet_kernels
from dsnet.bench.cases import CASES, Stage, stages
from dsnet.bench.ops import make_inputs, ours

SIZE = (64, 96)
BACKENDS = {"cuda": ("cuda", "triton"), "cpu": ("cpu", "reference")}
DTYPES = (torch.float32, torch.bfloat16)


def small_stages() -> list[Stage]:
    regular = stages("dsnet_tiny", batch=2, size=SIZE)
    odd = dataclasses.replace(regular[0], channels=34, local_channels=17, grid=(5, 9))
    return [*regular, odd]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.small_inputs")
    parser.add_argument("device", choices=list(BACKENDS))
    device = parser.parse_args().device
    count = 0
    for case in CASES:
        available = dsnet_kernels.available_backends(case.operation)
        for backend in (name for name in BACKENDS[device] if name in available):
            for stage in small_stages():
                for dtype in DTYPES:
                    inputs = make_inputs(case, stage, dtype, backward=True)
                    inputs = inputs.map(lambda value: value.to(device))
                    values = ours(backend, case, inputs).values()
                    if not all(torch.isfinite(value).all() for value in values.values()):
                        raise RuntimeError(f"{case.operation} {backend} {stage}: not finite")
                    count += 1
    print(f"{count} calls forward and backward on {device}")
    return 0 if count else 1


if __name__ == "__main__":
    sys.exit(main())
