"""The update of parameters: the optimizer of each parameter, Muon, AdamW, and the schedules by tokens.

gradients → groups.py ─┬─ matrices → muon.py (each expert its own matrix; shards.py: the ranks that hold its pieces)
                       └─ the rest → adamw.py
schedule.py: learning rate and bias rate, functions of the stage's tokens
"""
