"""Statistics of one step: a fixed slot for each value in one float32 buffer of the rank, filled on the device without a host wait.

registry.py       which slot holds what        plane.py      the buffer and its layout
probes.py         hooks on modules             weights.py    parameters and gradients
reduced_stats.py  the front that all ranks sum once a step
host_copy.py      the copy to the host while training continues
gather.py         the planes of all ranks on rank 0 · merge.py how planes of different registries are put together
frame.py          a step's values as sinks receive them
summary.py        a plane in a few hundred numbers · downsample.py many steps in a few hundred buckets
"""
