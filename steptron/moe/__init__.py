"""Mixture of experts: routing, balance, the experts themselves, and the layer that joins them.

    x ─→ router ─→ Routing ─→ dispatcher.dispatch ─→ experts ─→ dispatcher.combine ─→ + shared(x) ─→ y
                      │            (rows sorted by expert, groups padded)
                      ├─→ balance: losses of EP groups, of single experts, of the logits' size
                      ├─→ counts by expert ─→ bias update, once a step
                      └─→ observer, if there is one

`router.py` and `balance.py` are pure maths. `dispatch.py` moves rows: locally here, over a process group where a dispatcher with one
is put in its place. `experts.py` holds the parameters and chooses a back end, which knows neither tokens nor routing, only groups of rows:
`blocks.py` on a CPU; `products.py` with a product of `grouped_mm`, padded `bmm` or `grouped_te.py`, and a SwiGLU of torch or
`swiglu_triton.py`; `backend.py` is what they have in common. `stats.py` is what an observer sees.
"""
