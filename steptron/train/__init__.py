"""The run: stages in order, steps in a stage, one page a step.

cli → loop.py (stages, checkpoints, metrics) → step.py (one global batch) → model, optimizer
      build.py makes each component from the recipe; state.py holds the counters that a checkpoint keeps
"""
