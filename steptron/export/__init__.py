"""Conversion of models to and from the formats of other programs.

    checkpoint ── hf.export_hf ──▶ the released Hugging Face format ── hf.import_hf ──▶ checkpoint

model/hf_map.py has the names of tensors in that format, model/hf_config.py its config.json; this package reads and
writes the files.
"""
