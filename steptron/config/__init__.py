"""Recipes: from YAML and overrides to frozen values.

recipes/*.yaml, key=value          resolve.py   Hydra composes
  → nested dict                    decode.py    strict: unknown keys and wrong types are errors
  → Recipe (schema.py, kernels.py) validate.py  ranges, and rules across sections
  → no relative paths              paths.py     `absolute`
  → runs/NAME/recipe.yaml          resolve.py   `to_yaml`; `paths.load_run` reads it back
    runs/NAME/run.json             identity.py  who the run is, and where its folder was
Recipe (schema.py)
  → docs/recipe.md                 reference.py every key with type, range, default and docstring
"""
