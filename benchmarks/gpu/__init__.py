"""The one GPU command: ``python -m benchmarks.gpu --out DIR``.

Builds for the visible GPU, tests, runs the sanitizers, measures, and writes a record. Each phase is
a process of its own with a time limit, so that none can take another down; ``--dry-run`` goes the
same way on a machine without a GPU.
"""
