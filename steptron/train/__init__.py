"""The training run: stages in order, steps in a stage, one page per step.

cli ─► start.py ─► run.py: the components ──────────────────────────┐
        │                                                           │
        └─► loop.py (stages, checkpoints, rewinds) ─► step.py ─► engines/ ─► network, optimizer
              │                                        │
              │                                        └─► guard.py: may this update be made?
              └─► recorder.py ─► sinks.py · report.py

start       device.py, process_group.py, run_folder.py, lock.py, log_files.py, mirror_remote.py, balance_groups.py
state       counters.py: what a checkpoint keeps besides tensors · rewind.py: how a run goes back
statistics  instrumentation.py: observers on the network · peak_flops.py: the denominator of `mfu`
outside     signals.py: stop and save · inspect.py: `steptron inspect`
"""
