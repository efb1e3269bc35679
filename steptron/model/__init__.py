"""The network: inputs, layers, MTP heads, losses and logits, initial values, and tensor names of the released format.

Rows ─ Inputs ─ embedding ─ layers 0…L−1 ─┬─ norm ────────────┬─ output matrices ─ losses, log-probabilities, logits
                                          └─ mtp 0 ─ mtp 1 … ─┘
"""
