"""The layout proof: train the user's recipe, made small, for a few steps on many ranks and on one, and compare
everything.

    recipe ─ shrink.py ─► small recipe, mesh ─┬─ trial.py on gloo ranks ──┐
                                              └─ trial.py on one process ─┴─ compare.py ─► rows: quantity, error, where
"""
