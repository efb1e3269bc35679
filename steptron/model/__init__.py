"""The network: rows and inputs, blocks, MTP heads, what is read off its outputs, initialisation, names in the released format.

Rows ─ Inputs ─ embedding ─ layers 0…L−1 ─┬─ norm ────────────┬─ output matrices ─ losses, log-probabilities, logits (heads.py)
                                          └─ mtp 0 ─ mtp 1 … ─┘
"""
