"""Mixture of experts: routing, balance, the experts themselves, and the layer that joins them.

    x ─→ router ─→ Routing ─→ dispatcher.dispatch ─→ experts ─→ dispatcher.combine ─→ + shared(x) ─→ y
                      │            (rows sorted by expert, groups padded)
                      ├─→ balance: EP-group loss
                      ├─→ counts by expert ─→ bias update, once a step
                      └─→ observer, if there is one

`router.py` and `balance.py` are pure maths. `dispatch.py` moves rows: locally here, over a process group where a dispatcher with one
is put in its place. `experts.py` is the grouped SwiGLU; it knows neither tokens nor routing, only groups of rows.
"""
