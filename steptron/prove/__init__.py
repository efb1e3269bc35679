"""The layout proof: the user's recipe, made small, trained for a few steps on many ranks and on one, and everything compared.

recipe ─ shrink.py ─► small recipe, small mesh ─┬─ trial.py on gloo ranks ──┐
                                                └─ trial.py on one process ─┴─ compare.py ─► rows: quantity, worst error, where
"""
