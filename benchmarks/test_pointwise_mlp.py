"""pytest-benchmark cases of ``pointwise_mlp``: ``pytest benchmarks --benchmark-only``.

A group per use, stage and pass holds every contender of ``dsnet bench``, which also interleaves
them, checks them against float64 and compares.
"""

from .contenders import in_both_directions, of, on_every_stage, run


@of("pointwise_mlp")
@in_both_directions
@on_every_stage
def test_pointwise_mlp(benchmark, case, contender, stage, backward):
    run(benchmark, case, contender, stage, backward)
