"""Mixture of experts (MoE): router, load balance, the experts' computation, and the layer that joins them.

    x ─→ router ─→ Routing ─→ dispatcher.dispatch ─→ experts ─→ dispatcher.combine ─→ + shared(x) ─→ y
                      │            (rows sorted by expert, groups padded)
                      ├─→ balance: losses over EP groups, over single experts, and on the size of the logits
                      ├─→ counts by expert ─→ bias update, once a step
                      └─→ observer, if there is one

`router.py` and `balance.py` are pure maths. `dispatch.py` moves rows: on one rank by default, over a process group when
`parallel/ep.py` replaces the dispatcher. `experts.py` holds the parameters and chooses a back end. A back end knows
groups of rows, but neither tokens nor routing: `cpu_experts.py` on a CPU, or `grouped_experts.py`, which combines a
matrix product (`grouped_mm`, padded `bmm` or `grouped_te.py`) with a SwiGLU (torch's operations or `swiglu_triton.py`).
`backend.py` has the types they share. `stats.py` computes what an observer receives. `elementwise.py` chooses who moves
and plans rows and computes statistics: torch's operations, or the kernels of `rows_triton.py` and `stats_triton.py`.
"""
