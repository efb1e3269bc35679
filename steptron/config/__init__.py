"""Recipes: from YAML and overrides to frozen values.

recipes/*.yaml, key=value          resolve.py   Hydra composes
  → nested dict                    decode.py    strict: unknown keys and wrong types are errors
  → Recipe (schema.py)             validate.py  ranges, and rules across sections
  → runs/NAME/recipe.yaml          resolve.py   `to_yaml`; `load_recipe` reads it back
"""
