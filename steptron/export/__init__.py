"""Models to and from the formats of other programs.

    checkpoint ── hf.export_hf ──▶ the released Hugging Face format ── hf.import_hf ──▶ checkpoint

The name of a tensor there is model/hf_map.py's part, config.json is model/hf_config.py's; here are files.
"""
