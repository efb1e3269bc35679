"""The parts of `benchmarks/gpu.py`: each is a function that yields rows, and runs in a process of its own.

rows.py        a row, comparison with float64, time of a function on the device
reference.py   attention, experts and the other formulas once more, in float64
attention.py   parity: attention kernels and the ring          experts.py   parity: back ends of the experts
formulas.py    parity: loss, norm, RoPE, router, optimizers    steps.py     parity: three steps of a small model
fake.py        operators on fake CUDA tensors, an expert layer counted on the meta device
speed.py       roofs of the device, kernels beside their roof
training.py    a step of a model with the widths of the 196B: time, memory, waits, kernels, monitoring, compiling
state.py       copies of the metrics plane, checkpoints, repeated steps: bit by bit
packages.py    packages and attention kernels that may be installed    nccl.py   a collective that times out
"""
