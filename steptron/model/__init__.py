"""The network: blocks, MTP heads, initialisation, names in the released format, arithmetic per token.

tokens ─ embedding ─ layers 0…L−1 ─┬─ norm ─ lm_head ─ loss
                                   └─ mtp 0 ─ mtp 1 … ─ a loss each
"""
