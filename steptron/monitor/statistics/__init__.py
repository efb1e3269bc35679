"""Statistics of one step: a fixed slot for each value in one float32 buffer per rank, filled without a host wait.

registry.py       the meaning of each slot     plane.py      the buffer and its layout
reduction.py      how parts of a statistic are combined, and how derived ones are computed
probes.py         hooks on modules             weights.py    parameters and gradients
reduced_stats.py  the front of the buffer, which all ranks sum once a step
host_copy.py      the copy to the host while training continues
gather.py         the planes of all ranks on rank 0 · merge.py the combination of planes with different registries
frame.py          a step's values as sinks receive them
summary.py        a plane as a few hundred numbers · downsample.py many steps as a few hundred buckets
"""
