"""Models to and from the formats of other programs.

    checkpoint ── hf.export_hf ──▶ the released Hugging Face format ── hf.import_hf ──▶ checkpoint

What a tensor is called there, and what config.json holds, is model/hf_map.py's part; here are files.
"""
